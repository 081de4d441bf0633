"""What the benchmark asks of PyTorch that PyTorch does not document."""

import torch

from benchmarks.cases import CASES
from gatednorm.bench.providers import compiled


def test_the_backward_of_a_compiled_norm_can_be_timed_alone():
    """torch.compile would give its buffers away in the first backward."""
    before = torch._functorch.config.donated_buffer
    try:
        assert all(callable(function) for function in compiled(CASES[0]))
        assert torch._functorch.config.donated_buffer is False
    finally:
        torch._functorch.config.donated_buffer = before

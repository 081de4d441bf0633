"""Models whose heads lie on several ranks; what runs on them is in tests/helpers/model_ranks.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.tensor_parallel import check_ranks
from small_models import small_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="not in this torch")


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param("2", marks=pytest.mark.slow),
        pytest.param("4", marks=pytest.mark.slow),
        pytest.param(
            "gpus",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU"),
            ],
        ),
    ],
)
def test_against_one_process(ranks):
    """Logits, loss and gradients, parameters and wholes, generation, and what is refused."""
    done = subprocess.run(
        [sys.executable, "tests/helpers/model_ranks.py", ranks],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


def test_one_head_on_one_rank():
    check_ranks(small_model("gated_deltanet", num_heads=1, num_v_heads=1), 1)

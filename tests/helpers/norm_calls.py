"""Kinds of norm, by parameters of a test; and a call with the gradients of all that it is given."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from norm_cases import Inputs, Layout, same_bits

# is_rms_norm, norm_before_gate, gated
ORDERS = [
    pytest.param(True, True, True, id="rms-gate_after"),
    pytest.param(True, False, True, id="rms-gate_before"),
    pytest.param(False, True, True, id="layer-gate_after"),
    pytest.param(False, False, True, id="layer-gate_before"),
    pytest.param(False, True, False, id="layer-plain"),
]
# is_rms_norm, norm_before_gate, gated, weight
GATES = [
    pytest.param(True, True, True, True, id="rms-gate_after-weight"),
    pytest.param(True, False, True, True, id="rms-gate_before-weight"),
    pytest.param(False, True, True, True, id="layer-gate_after-weight"),
    pytest.param(False, False, False, True, id="layer-plain-weight"),
    pytest.param(True, True, True, False, id="rms-gate_after"),
]


def x_of(*shape, dtype=torch.float32) -> torch.Tensor:
    """The same random values each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def leaves_of(i: Inputs) -> list[torch.Tensor | None]:
    """x, weight, bias and z of their own, that gradients are asked for."""
    given = (i.x, i.weight, i.bias, i.z)
    return [None if t is None else t.detach().requires_grad_() for t in given]


def gradients(function, i: Inputs) -> tuple[torch.Tensor, ...]:
    """The result of `function(x, weight, bias, z)`, and the gradients of those that are there."""
    leaves = leaves_of(i)
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], i.dy)


def check_that_rows_keep_their_bits(run, tensors: list, parts: list[slice]) -> None:
    """`run(*tensors)` gives results with a row for each row of the tensors, whose bits depend on
    that row alone: not on the others, nor on where it lies (`x[1:]` is unaligned at odd widths)."""

    def compare(part, given, rows=slice(None)):
        for got, want in zip(run(*given), whole, strict=True):
            assert same_bits(got[rows], want[part]), (part, rows)

    def each(change):
        return [None if t is None else change(t) for t in tensors]

    whole = run(*tensors)
    for part in parts:
        compare(part, each(lambda t, part=part: t[part]))
    for layout in (Layout(offset=1), Layout(offset=3, right=5), Layout(left=8, right=8)):
        compare(slice(None), each(lambda t, layout=layout: layout.place(t, t.dtype, t.device)[0]))
    compare(slice(None), each(lambda t: torch.cat([t[5:], t])), slice(len(whole[0]) - 5, None))


# ---- on a GPU ----


def randn(*shape, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)


def kernels_of(function) -> list[str]:
    """Names of what ran on the GPU, copies and fills included."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        function()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [e.name for e in profiler.events() if e.device_type == cuda]

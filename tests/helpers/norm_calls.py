"""Kinds of norm, by parameters of a test; and a call with the gradients of all that it is given."""

import pytest
import torch

from norm_cases import Inputs

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


def leaves_of(i: Inputs) -> list[torch.Tensor | None]:
    """x, weight, bias and z of their own, that gradients are asked for."""
    given = (i.x, i.weight, i.bias, i.z)
    return [None if t is None else t.detach().requires_grad_() for t in given]


def gradients(function, i: Inputs) -> tuple[torch.Tensor, ...]:
    """The result of `function(x, weight, bias, z)`, and the gradients of those that are there."""
    leaves = leaves_of(i)
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], i.dy)

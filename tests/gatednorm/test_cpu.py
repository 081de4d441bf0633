"""The closed-form CPU path: blocks of rows, fp64, what it promises, and that it stands alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gatednorm
from gatednorm import cpu, reference
from norm_calls import ORDERS
from norm_cases import (
    Case,
    Layout,
    cases,
    check,
    differentiate,
    inputs_of,
    same_bits,
    through_autograd,
    through_buffers,
)


@settings(max_examples=200)
@given(
    case=cases([torch.float32, torch.bfloat16]),
    block=st.sampled_from([1, 300, 2000, 20_000]),
    route=st.sampled_from([through_autograd, through_buffers]),
)
def test_blocks_of_any_size(monkeypatch, case, block, route):
    """One row at a time, a few, all at once: blocks cover every row, statistics fall in place."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "BLOCK_BYTES", block)
        check(case, "cpu", route)


@pytest.mark.parametrize("outer", [(7,), (3, 5), (2, 3, 4)], ids=str)
def test_blocks_that_cut_inside_outer_dimensions(monkeypatch, outer):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 3 * 16 * 4)  # three rows
    order = tuple(reversed(range(len(outer))))
    layouts = dict.fromkeys(("x", "dy", "dz"), Layout(order=order, left=2))
    for is_rms_norm in (True, False):
        check(Case(outer, 16, 1, is_rms_norm, bias=True, layouts=layouts), "cpu", through_buffers)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gradcheck(is_rms_norm, norm_before_gate, gated, activation):
    """Against finite differences in fp64, which know nothing of the formula."""
    i = inputs_of(
        Case((4,), 5, 2, is_rms_norm, norm_before_gate, gated, bias=True, dtype=torch.float64)
    )
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias, i.z) if t is not None]

    def norm(x, w, b, z=None):
        return gatednorm.layernorm_fn(
            x, w, b, z, 1e-3, 5, norm_before_gate, is_rms_norm, activation=activation
        )

    assert torch.autograd.gradcheck(norm, leaves)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
@pytest.mark.parametrize("width", [1, 17, 512, 20_000], ids="D{}".format)
def test_inference_has_the_bits_of_training(width, is_rms_norm, norm_before_gate, gated):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = Case((37,), width, 1, is_rms_norm, norm_before_gate, gated, bias=True, dtype=dtype)
        i = inputs_of(case)
        given = (i.x, i.weight, i.bias, i.z)
        options = dict(is_rms_norm=is_rms_norm, **case.options)
        training = gatednorm.layernorm_fn(*given, **options)
        assert same_bits(training, gatednorm.rms_norm_gated(*given, **options))
        assert same_bits(training, gatednorm.layernorm_forward(*given, **options)[0])


def test_a_default_device_for_new_tensors_changes_nothing():
    case = Case((6,), 8, 2)
    i = inputs_of(case, "cpu")
    want = through_autograd(case, i)
    with torch.device("meta"):
        leaves = [t.detach().requires_grad_() for t in (i.x, i.weight, i.z)]
        y = gatednorm.rmsnorm_fn(*leaves[:2], None, leaves[2], **case.options)
        grads = torch.autograd.grad(y, leaves, i.dy)
    for name, t in zip(("y", "dx", "dw", "dz"), (y, *grads), strict=True):
        assert same_bits(t, want[name]), name


def test_large_offset_in_layer_norm():
    """x = 1000 + noise: the mean is subtracted before the squares are summed."""
    x = 1000 + torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    got = gatednorm.layernorm_fn(x)
    want = reference.gated_norm_ref(x.double(), is_rms_norm=False)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_groups_of_one_channel_have_no_gradient():
    """Gate before, layer norm: `u - mean` is 0 and not an ulp, which `rstd` would multiply by a
    thousand."""
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(258, 64, generator=g) + shift for shift in (100, 0))
    leaves = [x.requires_grad_(), z.requires_grad_()]
    y = gatednorm.layernorm_fn(x, z=z, group_size=1, norm_before_gate=False)
    for grad in torch.autograd.grad(y, leaves, torch.randn(258, 64, generator=g)):
        assert not grad.any()


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
def test_groups_without_variance(is_rms_norm, norm_before_gate, gated):
    """Equal values in each group, large ones: as far from float64 as the reference in fp32."""
    case = Case((258,), 16, 4, is_rms_norm, norm_before_gate, gated, bias=True, eps=1e-6)
    i = inputs_of(case)
    i.x.copy_((i.x[:, ::16] + 100).repeat_interleave(16, 1))
    if gated and not norm_before_gate:
        i.z.copy_(i.z[:, ::16].repeat_interleave(16, 1))
    got, plain = through_autograd(case, i), differentiate(case, i)
    for name, truth in differentiate(case, i, torch.float64).items():
        error, granted = ((t[name] - truth).abs().max() for t in (got, plain))
        assert error <= 1.5 * granted + 1e-6 * truth.abs().max(), name


def test_the_reference_is_not_on_the_path(monkeypatch):
    """Or the tests would compare it with itself."""

    def called(*args, **kwargs):
        raise AssertionError("the CPU path called the reference")

    case = Case((5,), 16, 2)
    i = inputs_of(case)
    monkeypatch.setattr(reference, "gated_norm_ref", called)
    monkeypatch.setattr(reference, "rms_norm_ref", called)
    through_autograd(case, i)
    assert not hasattr(cpu, "gated_norm_ref")

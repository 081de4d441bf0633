"""The norm and the projection after it, against float64 and against the two apart."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import gatednorm
from gatednorm import GatedNormLinear, autograd, gated_norm_linear, norm_then_linear
from norm_calls import ORDERS
from norm_cases import Case, Layout, inputs_of, poisoned_memory, same_bits

FEATURES = 6


CASES = [
    Case((5,), 24, 2),
    Case((9,), 12, 1, activation="sigmoid", zero_centered=True),
    Case((9,), 600, 1, bias=True),  # two pieces
    Case((3,), 40, 3, weight=False, norm_before_gate=False),
    Case((2, 5), 16, 1, is_rms_norm=False, bias=True, numerics="qwen3_next"),
    Case((7,), 16, 2, is_rms_norm=False, bias=True, norm_before_gate=False, numerics="mamba2"),
    Case((5,), 32, 1, gated=False),
    Case((5, 2), 32, 1, layouts={"x": Layout(order=(1, 0)), "z": Layout(left=32)}),
    Case((33,), 129, 1, is_rms_norm=False, weight=False, layouts={"z": Layout(right=3)}),
]


def ours(case, i, linear_weight, linear_bias):
    leaves = [
        None if t is None else t.detach().requires_grad_()
        for t in (i.x, i.z, i.weight, linear_weight, i.bias, linear_bias)
    ]
    x, z, w, lw, b, lb = leaves
    with poisoned_memory():
        out = gated_norm_linear(
            x, z, w, lw, bias=b, linear_bias=lb, is_rms_norm=case.is_rms_norm, **case.options
        )
        return out, [t for t in leaves if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id())
def test_outputs_and_gradients_against_float64(path, case, dtype):
    case = replace(case, dtype=dtype)
    i = inputs_of(case, path.device)
    g = torch.Generator().manual_seed(1)
    linear = torch.randn(FEATURES, case.width, generator=g).to(path.device, dtype)
    offset = torch.randn(FEATURES, generator=g).to(path.device, dtype)
    dout = torch.randn(*case.outer, FEATURES, generator=g).to(path.device, dtype)
    out, leaves = ours(case, i, linear, offset)
    got = torch.autograd.grad(out, leaves, dout)

    def plain(to, upcast):
        cast = [
            None if t is None else t.detach().to(to or t.dtype).requires_grad_()
            for t in (i.x, i.z, i.weight, linear, i.bias, offset)
        ]
        x, z, w, lw, b, lb = cast
        y = gatednorm.gated_norm_ref(
            x, w, b, z, upcast=upcast, is_rms_norm=case.is_rms_norm, **case.options
        )
        out = F.linear(y.to(lw.dtype), lw, lb)
        given = [t for t in cast if t is not None]
        return [out, *torch.autograd.grad(out, given, dout.to(out.dtype))]

    truth, other = plain(torch.float64, True), plain(None, True)
    for mine, exact, theirs in zip((out, *got), truth, other, strict=True):
        assert mine.dtype == theirs.dtype
        errors = [t.double() - exact for t in (mine, theirs)]
        error, allowed = (e.abs().max() for e in errors)
        assert error <= 2 * allowed + exact.abs().max() * torch.finfo(dtype).eps
        error, allowed = (e.norm() for e in errors)
        if dtype not in path.dtypes:  # the interpreter truncates
            allowed += exact.norm() * torch.finfo(dtype).eps / 2
        assert error <= 2 * allowed


def test_batched_gradients(path):
    x = torch.randn(3, 4, 16, device=path.device, requires_grad=True)
    linear = torch.randn(8, 16, device=path.device, requires_grad=True)
    out = gated_norm_linear(x, x, None, linear)
    cotangents = torch.randn(5, *out.shape, device=path.device)
    of_all = torch.autograd.grad(out, (x, linear), cotangents, True, is_grads_batched=True)
    for i, one in enumerate(cotangents):
        for mine, alone in zip(
            of_all, torch.autograd.grad(out, (x, linear), one, True), strict=True
        ):
            torch.testing.assert_close(mine[i], alone)


@pytest.mark.parametrize("numerics", ["fp32", "mamba2"])
@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
def test_the_output_that_the_backward_writes_is_that_of_the_forward(
    small, path, is_rms_norm, norm_before_gate, gated, numerics
):
    """The gradient of the projection's weight for a `dout` of one in one row is `y` of that row.
    The two gates differ in fp32 by an ulp, which hardly ever shows after the rounding to bf16."""
    case, i = small(
        is_rms_norm, norm_before_gate, gated, bias=True, numerics=numerics, dtype=torch.bfloat16
    )
    options = {"is_rms_norm": is_rms_norm, **case.options}
    linear = torch.zeros(1, case.width, device=path.device, dtype=case.dtype, requires_grad=True)
    y = gatednorm.layernorm_fn(i.x, i.weight, i.bias, i.z, **options)
    out = gated_norm_linear(i.x, i.z, i.weight, linear, bias=i.bias, **options)
    rows = [torch.autograd.grad(row.sum(), linear, retain_graph=True)[0] for row in out]
    found = torch.cat(rows)
    torch.testing.assert_close(found, y, rtol=0.01, atol=0.01)
    assert (found == y).float().mean() > 0.95


def test_heads_of_a_token_are_one_row_of_the_product(path):
    x, z = torch.randn(2, 3, 5, 4, 8, device=path.device).unbind(0)
    x.requires_grad_()
    w, linear = torch.randn(8, device=path.device), torch.randn(6, 32, device=path.device)
    out = gated_norm_linear(x, z, w, linear)
    y = gatednorm.rmsnorm_fn(x, w, None, z)
    assert out.shape == (3, 5, 6)
    assert same_bits(out.detach(), F.linear(y.flatten(-2), linear).detach())
    dout = torch.randn_like(out)
    got, want = (torch.autograd.grad(o, x, dout)[0] for o in (out, F.linear(y.flatten(-2), linear)))
    assert same_bits(got, want)


@pytest.mark.parametrize("shape", [(32,), (4, 8), (2, 3, 1, 32)], ids=["row", "heads", "one_head"])
@pytest.mark.parametrize("precision", [None, "fp8_emulated"])
def test_few_dimensions(shape, precision):
    """One row alone, the heads of one token, tokens of one head: as the two modules apart."""
    torch.manual_seed(0)
    features, columns = (128, 128) if precision else (6, 32)
    shape = (*shape[:-1], shape[-1] * columns // 32)
    heads = len(shape) % 2 == 0
    norm = gatednorm.RMSNorm(shape[-1])
    linear = GatedNormLinear(columns, features).linear
    x = torch.randn(shape, requires_grad=True)
    out = norm_then_linear(norm, linear, x, None, heads=heads, precision=precision)
    apart = F.linear(norm(x).flatten(-2) if heads else norm(x), linear.weight)
    assert out.shape == apart.shape
    error = 0.08 if precision else 1e-5  # e4m3 rounds by 2.5% on average, and two operands
    dout = torch.randn_like(out)
    leaves = (x, norm.weight, linear.weight)
    for got, want in zip(
        (out, *torch.autograd.grad(out, leaves, dout)),
        (apart, *torch.autograd.grad(apart, leaves, dout)),
        strict=True,
    ):
        assert (got - want).norm() <= error * want.norm()


@pytest.mark.parametrize("precision", [None, "fp8_emulated"])
def test_a_frozen_projection_costs_no_gradient(precision):
    x, frozen = torch.randn(128, 128, requires_grad=True), torch.randn(128, 128)
    flops = []
    for weight in (frozen, frozen.clone().requires_grad_()):
        out = gated_norm_linear(x, None, None, weight, precision=precision)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] == 2 * flops[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_the_graph_holds_one_tensor_of_rows_less_than_the_two_apart(path, dtype, is_rms_norm):
    rows, width = 32, 64
    x, z = (
        torch.randn(rows, width, device=path.device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    w = torch.ones(width, device=path.device, requires_grad=True)
    linear = torch.randn(FEATURES, width, device=path.device, dtype=dtype, requires_grad=True)

    def held(function):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({(t.data_ptr(), t.shape): t.numel() * t.element_size()}) or t,
            lambda t: t,
        ):
            out = function()
        assert out.requires_grad
        return sum(saved.values())

    options = {"is_rms_norm": is_rms_norm}
    together = held(lambda: gated_norm_linear(x, z, w, linear, **options))
    apart = held(lambda: F.linear(gatednorm.layernorm_fn(x, w, None, z, **options), linear))
    assert apart - together == rows * width * x.element_size()


def test_autocast_runs_the_product_in_its_dtype(path):
    x, z = torch.randn(2, 4, 8, device=path.device).unbind(0)
    linear = torch.randn(6, 8, device=path.device, requires_grad=True)
    offset = torch.randn(6, device=path.device, requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = gated_norm_linear(x, z, None, linear, linear_bias=offset)
    want = F.linear(
        gatednorm.rmsnorm_fn(x, None, None, z).bfloat16(), linear.bfloat16(), offset.bfloat16()
    )
    assert same_bits(out.detach(), want.detach())
    out.sum().backward()
    assert linear.grad.dtype == offset.grad.dtype == torch.float32


@pytest.mark.parametrize("change", ["hook", "pre_hook", "class", "forward", "norm"])
def test_a_projection_that_is_not_plain_is_called(change):
    """A LoRA adapter, a quantised layer or a hook must never be skipped."""
    module, x = GatedNormLinear(8, 6), torch.randn(4, 8)
    want = module(x, x) + 1
    linear = module.linear
    if change == "hook":
        linear.register_forward_hook(lambda m, i, out: out + 1)
    elif change == "pre_hook":
        bias = torch.linalg.lstsq(linear.weight.detach(), torch.ones(6, 1)).solution[:, 0]
        linear.register_forward_pre_hook(lambda m, i: (i[0] + bias,))
    elif change == "class":
        module.linear = torch.nn.Sequential(linear, AddOne())
    elif change == "forward":
        plain = linear.forward
        linear.forward = lambda y: plain(y) + 1
    else:
        bias = torch.linalg.lstsq(linear.weight.detach(), torch.ones(6, 1)).solution[:, 0]
        module.norm.register_forward_hook(lambda m, i, out: out + bias)
    torch.testing.assert_close(module(x, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 4, 8)], ids=["rows", "tokens"])
def test_no_tokens_of_heads(path, shape):
    x = torch.ones(shape, device=path.device, requires_grad=True)
    linear = torch.ones(6, 32, device=path.device, requires_grad=True)
    out = gated_norm_linear(x, x, None, linear)
    assert out.shape == (*shape[:-2], 6)
    out.sum().backward()
    assert torch.equal(linear.grad, torch.zeros_like(linear))


def test_frozen_projection_writes_no_output_again(path, monkeypatch):
    asked, run = [], autograd.run_backward
    monkeypatch.setattr(
        autograd, "run_backward", lambda *given: asked.append(given[-2]) or run(*given)
    )
    x = torch.randn(4, 8, device=path.device, requires_grad=True)
    linear, found = torch.randn(6, 8, device=path.device), []
    for weight in (linear, linear.clone().requires_grad_()):
        (dx,) = torch.autograd.grad(gated_norm_linear(x, x, None, weight).sin().sum(), x)
        found.append(dx)
    assert asked == [False, True]
    assert same_bits(*found)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_the_meta_device(compiled):
    module = GatedNormLinear(8, 6, num_heads=2, device="meta")
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    assert call(torch.empty(3, 2, 8, device="meta")).shape == (3, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "rule"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"linear_weight": torch.ones(6, 8).int()}, TypeError, "linear_weight must be float32"),
        ({"linear_bias": torch.ones(6).int()}, TypeError, "linear_bias must be float32"),
    ],
    ids=["number", "weight", "bias"],
)
def test_projections_of_other_kinds_are_refused(arguments, error, rule):
    given = {"x": torch.ones(4, 8), "z": None, "weight": None, "linear_weight": torch.ones(6, 8)}
    with pytest.raises(error, match=rule):
        gated_norm_linear(**given | arguments)


@pytest.mark.parametrize(("heads", "columns"), [(True, 8), (False, 32)])
def test_heads_are_not_guessed(heads, columns):
    linear, x = GatedNormLinear(columns, 6).linear, torch.ones(5, 4, 8)
    with pytest.raises(ValueError, match=rf"heads={heads}, got {columns}; pass another"):
        norm_then_linear(gatednorm.RMSNorm(8), linear, x, None, heads=heads)


def test_forward_mode_of_the_projection_is_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(4, 8), torch.ones(4, 8))
        with pytest.raises(RuntimeError, match="gated_norm_linear has no forward-mode"):
            gated_norm_linear(x, None, None, torch.ones(6, 8))


class AddOne(torch.nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_the_module_is_norm_and_projection(heads, is_rms_norm):
    module = GatedNormLinear(8, 6, num_heads=heads, is_rms_norm=is_rms_norm, linear_bias=True)
    keys = ["norm.weight", *([] if is_rms_norm else ["norm.bias"]), "linear.weight", "linear.bias"]
    assert list(module.state_dict()) == keys
    shape = (4, 8) if heads == 1 else (4, heads, 8)
    x, z = torch.randn(2, *shape).unbind(0)
    y = module.norm(x, z)
    want = module.linear(y if heads == 1 else y.flatten(-2))
    module.norm.register_forward_pre_hook(lambda *_: pytest.fail("called, not read"))
    module.norm.hooked = False
    assert same_bits(module(x, z).detach(), want.detach())
    assert repr(module)


def test_it_compiles_into_one_graph_for_any_number_of_rows():
    module = GatedNormLinear(8, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x, z = torch.randn(2, rows, 8).unbind(0)
        grads = []
        for function in (module, compiled):
            out = function(x, z)
            grads.append([out.detach(), *torch.autograd.grad(out.sum(), list(module.parameters()))])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused(path):
    x = torch.randn(4, 8, device=path.device, requires_grad=True)
    linear = torch.randn(6, 8, device=path.device)
    (dx,) = torch.autograd.grad(gated_norm_linear(x, x, None, linear).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()


X = torch.ones(4, 3, 8)
MISTAKES = {
    "no_x": ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    "no_weight": ({"linear_weight": None}, TypeError, "linear_weight must be a torch.Tensor"),
    "columns": ({"linear_weight": torch.ones(6, 9)}, ValueError, "got [6, 9] for x [4, 3, 8]"),
    "one_dimension": ({"linear_weight": X[0, 0]}, ValueError, "linear_weight must be [N, D]"),
    "device": (
        {"linear_weight": torch.ones(6, 8, device="meta")}, ValueError, "of x, got meta and cpu",
    ),
    "bias": ({"linear_bias": torch.ones(5)}, ValueError, "linear_bias must be [N], got [5]"),
    "number": ({"linear_bias": 1.0}, TypeError, "linear_bias must be a torch.Tensor, got float"),
    "gate": ({"z": torch.ones(3, 8)}, ValueError, "z must have the shape of x"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be a finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "rule"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input_is_one_clear_error(arguments, error, rule):
    given = {"x": X, "z": X, "weight": None, "linear_weight": torch.ones(6, 8), **arguments}
    x, z, weight, linear = (given.pop(name) for name in ("x", "z", "weight", "linear_weight"))
    with pytest.raises(error, match=re.escape(rule)):
        gated_norm_linear(x, z, weight, linear, **given)


def test_the_module_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads must be an int of at least 1, got 0"):
        GatedNormLinear(8, 6, num_heads=0)
    with pytest.raises(ValueError, match="out_features must be an int of at least 1, got True"):
        GatedNormLinear(8, True)
    with pytest.raises(TypeError, match="is_rms_norm must be True or False, got 'yes'"):
        GatedNormLinear(8, 6, is_rms_norm="yes")
    with pytest.raises(ValueError, match="group_size must divide hidden_size"):
        GatedNormLinear(8, 6, group_size=3)
    block = GatedNormLinear(8, 6)
    block.linear.register_forward_hook(lambda *_: None)
    block.precision = "fp16"
    with pytest.raises(ValueError, match="precision must be one of fp8, fp8_emulated, got 'fp16'"):
        block(X, X)

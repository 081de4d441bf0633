"""The functions that users call: views, what is written over, edges, their contract."""

import pytest
import torch

import gatednorm
from gatednorm import autograd
from norm_calls import ORDERS, x_of
from norm_cases import Case, Layout, check, inputs_of, same_bits, through_autograd


def test_one_sequence_of_time_first_memory(path):
    """A dimension of size 1 has a stride that means nothing: batches of one when decoding."""
    memory = torch.randn(5, 32, device=path.device)
    x = memory.view(1, 5, 32)[..., :16]
    want = gatednorm.rms_norm_gated(x)
    time_first = memory.view(5, 1, 32).transpose(0, 1)
    assert time_first.stride() != memory.view(1, 5, 32).stride()
    for out in (time_first[..., 16:], time_first[..., :16]):
        assert same_bits(gatednorm.rms_norm_gated(x, out=out), want)


def test_autograd_notices_what_is_written_over(path):
    """PyTorch refuses a backward through values that were written over since: by kernels too."""
    h = torch.randn(4, 8, device=path.device, requires_grad=True)
    a = h * 1
    b = a.sin()
    with torch.no_grad():
        gatednorm.rms_norm_gated(a, out=a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        b.sum().backward()

    x, dy, dx, dz = (torch.randn(4, 8, device=path.device) for _ in range(4))
    _, mean, rstd = gatednorm.layernorm_forward(x, z=dy, is_rms_norm=True)
    before = dx._version, dz._version
    gatednorm.layernorm_backward(dy, x, None, None, dy, mean, rstd, is_rms_norm=True, dx=dx, dz=dz)
    assert dx._version > before[0]
    assert dz._version > before[1]


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("where", ["x", "z"])
def test_out_may_be_an_input(path, where, norm_before_gate):
    for width, layout in ((40, Layout(left=3, right=2)), (20_000, Layout())):
        layouts = {"x": layout, "z": layout}
        case = Case((3,), width, 1, norm_before_gate=norm_before_gate, layouts=layouts)
        i = inputs_of(case, path.device)
        given = (i.x, i.weight, None, i.z)
        want = gatednorm.rms_norm_gated(*given, **case.options)
        out = getattr(i, where)
        assert gatednorm.rms_norm_gated(*given, **case.options, out=out) is out
        if path.kernels:  # the CPU path's blocks depend on the strides of `out`
            assert same_bits(out, want)
        torch.testing.assert_close(out, want)


PACKED = {
    "columns": lambda p: [p[:, i * 8 : (i + 1) * 8] for i in range(3)],
    "heads": lambda p: [p.view(6, 6, 4)[:, i * 2 : (i + 1) * 2] for i in range(3)],
    "interleaved_heads": lambda p: [p.view(6, 2, 12)[..., i * 4 : (i + 1) * 4] for i in range(3)],
    "rows": lambda p: [p[i::3, :8] for i in range(3)],
    "batch_heads_time": lambda p: [
        p.view(2, 3, 6, 4)[:, :, i * 2 : (i + 1) * 2].transpose(1, 2) for i in range(3)
    ],
}


@pytest.mark.parametrize("slices", PACKED)
def test_slices_of_a_packed_buffer(path, slices):
    """`x`, `z` and `out` share a buffer and no element; so do `dx` and `dz`, written straight into
    the gradient of a packed projection."""
    packed = x_of(6, 24).to(path.device)
    before = packed.clone()
    x, z, out = PACKED[slices](packed)
    want, _, rstd = gatednorm.layernorm_forward(x, z=z, is_rms_norm=True)
    gatednorm.rms_norm_gated(x, z=z, out=out)
    torch.testing.assert_close(out, want)
    dy = out.copy_(PACKED[slices](before)[2])
    assert same_bits(packed, before)

    dx, dz, rest = PACKED[slices](torch.full((6, 24), 7.0, device=path.device))
    args = (dy, x, None, None, z, None, rstd)
    want = gatednorm.layernorm_backward(*args, is_rms_norm=True)
    got = gatednorm.layernorm_backward(*args, is_rms_norm=True, dx=dx, dz=dz)
    assert got[0] is dx
    assert got[3] is dz
    torch.testing.assert_close((dx, dz), (want[0], want[3]))
    assert (rest == 7.0).all()


@pytest.mark.parametrize("outer", [(0,), (3, 0), (0, 2, 3)], ids=str)
def test_zero_rows(path, launched, outer):
    """No rows: results of the right shape, zero gradients of the parameters, no launch."""
    for is_rms_norm in (True, False):
        case = Case(outer, 16, 2, is_rms_norm, bias=True)
        got = through_autograd(case, inputs_of(case, path.device))
        assert got["y"].shape == got["dx"].shape == got["dz"].shape == case.shape
        assert got["dw"].abs().sum() == got["db"].abs().sum() == 0
        i = inputs_of(case, path.device)
        assert gatednorm.rms_norm_gated(i.x, i.weight, i.bias, i.z).shape == case.shape
    assert launched == []


@pytest.mark.parametrize(
    ("inner", "layout"),
    [
        pytest.param((), Layout(), id="dense"),
        pytest.param((), Layout(left=1, right=2, offset=1), id="unaligned_slice"),
        pytest.param((3,), Layout(right=8), id="tokens_heads"),
        pytest.param((3, 2), Layout(order=(0, 2, 1), right=8), id="batch_heads_time"),
        pytest.param((3,), Layout(order=(1, 0)), id="transposed"),
        pytest.param((), Layout(expand=True), id="one_row_repeated"),
    ],
)
def test_any_number_of_rows_after_another(path, inner, layout):
    """Checked once for all numbers of rows: the next one has its own results and its own errors."""
    for rows in (5, 1, 2, 3, 0, 5):
        case = Case((rows, *inner), 12, 2, layouts={"x": layout, "z": layout})
        i = inputs_of(case, path.device)
        want = gatednorm.rms_norm_ref(i.x, i.weight, None, i.z, **case.options)
        torch.testing.assert_close(
            gatednorm.rms_norm_gated(i.x, i.weight, None, i.z, **case.options), want
        )
        with pytest.raises(ValueError, match=rf"^z must .*\({rows + 3}, .*and \({rows}, "):
            gatednorm.rms_norm_gated(i.x, z=torch.ones(rows + 3, *case.shape[1:]).to(i.x.device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
def test_a_bad_row_touches_no_other(path, is_rms_norm, norm_before_gate, gated, bad):
    """With the kernels, the bits of the others stay."""
    case = Case((12,), 40, 2, is_rms_norm, norm_before_gate, gated, bias=True)
    clean = through_autograd(case, inputs_of(case, path.device))
    others = [row for row in range(12) if row != 5]
    for name in ("x", "z", "dy") if gated else ("x", "dy"):
        spoilt = inputs_of(case, path.device)
        getattr(spoilt, name)[5, 3] = bad
        got = through_autograd(case, spoilt)
        for result in got.keys() - {"dw", "db"}:
            pair = got[result][others], clean[result][others]
            assert not path.kernels or same_bits(*pair), (name, result)
            torch.testing.assert_close(*pair)


def test_one_row_without_outer_dimensions(path):
    check(Case((), 40, 2, bias=True), path.device)


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_width_one(path, is_rms_norm, norm_before_gate):
    """A row of one channel, and groups of one channel; any stride will do for one channel."""
    for groups in (1, 5):
        check(Case((9,), 1, groups, is_rms_norm, norm_before_gate, bias=True), path.device)
    x = x_of(9, 7).to(path.device)[:, 3:4].as_strided((9, 1), (7, 5))
    x = x.requires_grad_()
    got = gatednorm.layernorm_fn(x, is_rms_norm=is_rms_norm)
    want = gatednorm.gated_norm_ref(x, is_rms_norm=is_rms_norm)
    torch.testing.assert_close(got, want)
    slopes = (torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (got, want))
    torch.testing.assert_close(*slopes)


def test_alias_and_defaults(path):
    """`swish` is `silu`; `rmsnorm_fn` is `layernorm_fn` told so; eps is 1e-6, and the gate is the
    last tensor."""
    i = inputs_of(Case((5,), 16, 2), path.device)
    given = (i.x, i.weight, None, i.z)
    plain = gatednorm.rmsnorm_fn(*given)
    assert same_bits(plain, gatednorm.rmsnorm_fn(*given, activation="swish"))
    assert same_bits(plain, gatednorm.layernorm_fn(*given, is_rms_norm=True))
    assert same_bits(plain, gatednorm.rmsnorm_fn(*given, 1e-6, None, True))
    assert same_bits(plain, gatednorm.rms_norm_gated(*given))
    torch.testing.assert_close(plain, gatednorm.rms_norm_ref(*given, 1e-6, None, True))
    layer = gatednorm.layernorm_fn(*given)
    torch.testing.assert_close(layer, gatednorm.gated_norm_ref(*given, is_rms_norm=False))


def test_a_mean_that_rms_norm_has_no_use_for(path, monkeypatch):
    """Callers of other copies pass one; no kernel gets it, whose code was compiled for none."""
    means, module = [], autograd.backend(path.device)

    def watched(*arguments, run=module.backward):
        means.append(arguments[6])
        return run(*arguments)

    monkeypatch.setattr(module, "backward", watched)
    case = Case((9,), 16, 1)
    i = inputs_of(case, path.device)
    want = through_autograd(case, i)
    given, options = (i.x, i.weight, None, i.z), {"is_rms_norm": True, **case.options}
    _, none, rstd = gatednorm.layernorm_forward(*given, **options)
    for mean in (rstd, none, i.x.new_empty(0)):
        dx, dw, _, dz = gatednorm.layernorm_backward(i.dy, *given, mean, rstd, **options)
        for name, t in (("dx", dx), ("dw", dw), ("dz", dz)):
            assert same_bits(t, want[name]), name
    assert means == [None] * 4


def test_statistics(path):
    """`mean` and `rstd` are fp32 `[rows, groups]` of what is normalised."""
    for is_rms_norm in (True, False):
        case = Case((3, 4), 24, 2, is_rms_norm, norm_before_gate=False, dtype=torch.float16)
        i = inputs_of(case, path.device)
        given = (i.x, i.weight, None, i.z)
        _, mean, rstd = gatednorm.layernorm_forward(*given, is_rms_norm=is_rms_norm, **case.options)
        u = (i.x.double() * torch.nn.functional.silu(i.z.double())).view(12, 2, 24)
        m = u.mean(-1) * (not is_rms_norm)
        want = torch.rsqrt((u - m[..., None]).pow(2).mean(-1) + case.eps)
        assert rstd.dtype == torch.float32
        torch.testing.assert_close(rstd.double(), want, rtol=1e-5, atol=0)
        assert (mean is None) == is_rms_norm
        if mean is not None:
            torch.testing.assert_close(mean.double(), m, rtol=1e-5, atol=1e-6)


def test_public_names_have_their_contract():
    """The argument names and order that code written for the copies relies on."""
    import inspect

    names = ["x", "weight", "bias", "z", "eps", "group_size", "norm_before_gate"]
    for function, extra in (
        ("rmsnorm_fn", []), ("layernorm_fn", ["is_rms_norm"]), ("rms_norm_gated", []),
        ("rms_norm_ref", ["upcast"]),
    ):  # fmt: skip
        parameters = inspect.signature(getattr(gatednorm, function)).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == names + extra, function
        defaults = {p.name: p.default for p in parameters}
        assert (defaults["eps"], defaults["group_size"], defaults["norm_before_gate"]) == (
            1e-6, None, True,
        )  # fmt: skip
    assert autograd.LayerNormFn is gatednorm.LayerNormFn

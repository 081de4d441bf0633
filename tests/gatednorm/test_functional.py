"""The functions that users call: every bad input refused before a launch, views, edges."""
# ruff: noqa: E501 (one line for each bad input)

import pytest
import torch

import gatednorm
from gatednorm import autograd, cpu
from norm_calls import ORDERS
from norm_cases import Case, Layout, check, inputs_of, same_bits, through_autograd
from paths import TRITON

FUNCTIONS = ("layernorm_fn", "rmsnorm_fn", "rms_norm_gated", "layernorm_forward")


@pytest.fixture
def launched(path, monkeypatch) -> list:
    """The launches, forward and backward, of whichever path runs."""
    calls = []
    modules = [cpu]
    if TRITON:
        from gatednorm.kernels import launch

        modules.append(launch)
    for module in modules:
        for name in ("forward", "backward"):
            run = getattr(module, name)

            def counted(*args, run=run, name=name):
                calls.append(name)
                return run(*args)

            monkeypatch.setattr(module, name, counted)
    return calls


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# name: error, pattern for value, rule and remedy, arguments by the name of the parameter
BAD = {
    "x_not_a_tensor": (TypeError, r"x must be a torch\.Tensor, got list", {"x": [1.0, 2.0]}),
    "x_none": (TypeError, r"x must be a torch\.Tensor, got NoneType", {"x": None}),
    "x_integers": (TypeError, r"x must be float32.*got torch\.int64.*x\.to\(", {"x": torch.ones(4, 8).long()}),
    "x_complex": (TypeError, r"x must be float32.*got torch\.complex64", {"x": torch.ones(4, 8) + 0j}),
    "x_scalar": (ValueError, r"at least one channel.*got shape \(\)", {"x": torch.tensor(1.0)}),
    "x_no_channels": (ValueError, r"at least one channel.*\(4, 0\)", {"x": torch.ones(4, 0)}),
    "x_transposed": (ValueError, r"last dimension of x must have unit stride, got strides \(1, 4\).*x\.contiguous\(\)", {"x": torch.ones(8, 4).t()}),
    "x_every_other": (ValueError, r"unit stride.*\(16, 2\)", {"x": torch.ones(4, 16)[:, ::2]}),
    "x_repeated_channel": (ValueError, r"unit stride", {"x": torch.ones(4, 1).expand(4, 8)}),
    "x_four_strides": (ValueError, r"at most 3, got sizes \(2, 2, 2, 2\).*\.contiguous\(\)", {"x": torch.ones(3, 3, 3, 3, 9)[:2, :2, :2, :2, :8]}),
    "z_not_a_tensor": (TypeError, r"z must be a torch\.Tensor, got float", {"z": 1.0}),
    "z_integers": (TypeError, r"z must be float32.*torch\.int32.*z\.to\(", {"z": torch.ones(4, 8).int()}),
    "z_shape": (ValueError, r"z must have the shape of x, got \(4, 7\) and \(4, 8\)", {"z": torch.ones(4, 7)}),
    "z_broadcast": (ValueError, r"z must have the shape of x, got \(1, 8\)", {"z": torch.ones(1, 8)}),
    "z_rows": (ValueError, r"z must have the shape of x, got \(3, 8\) and \(4, 8\)", {"z": torch.ones(3, 8)}),
    "z_transposed": (ValueError, r"last dimension of z.*z\.contiguous\(\)", {"z": torch.ones(8, 4).t()}),
    "z_device": (ValueError, r"z must be on the device of x, got meta and cpu.*z\.to\('cpu'\)", {"z": torch.ones(4, 8, device="meta")}),
    "weight_length": (ValueError, r"weight must have one entry per channel, got shape \(7,\) and D=8", {"weight": torch.ones(7)}),
    "weight_two_dims": (ValueError, r"weight must have one entry.*\(1, 8\)", {"weight": torch.ones(1, 8)}),
    "weight_strided": (ValueError, r"weight must have unit stride.*weight\.contiguous\(\)", {"weight": torch.ones(16)[::2]}),
    "weight_integers": (TypeError, r"weight must be float32.*int64", {"weight": torch.ones(8).long()}),
    "weight_device": (ValueError, r"weight must be on the device of x", {"weight": torch.ones(8, device="meta")}),
    "bias_length": (ValueError, r"bias must have one entry per channel, got shape \(9,\) and D=8", {"bias": torch.ones(9)}),
    "bias_not_a_tensor": (TypeError, r"bias must be a torch\.Tensor, got int", {"bias": 0}),
    "group_size_no_divisor": (ValueError, r"group_size must divide.*got group_size=3 and D=8; use a divisor of 8, or None", {"group_size": 3}),
    "group_size_zero": (ValueError, r"group_size must divide.*group_size=0", {"group_size": 0}),
    "group_size_negative": (ValueError, r"group_size must divide.*group_size=-4", {"group_size": -4}),
    "group_size_larger": (ValueError, r"group_size must divide.*group_size=16", {"group_size": 16}),
    "group_size_float": (TypeError, r"group_size must be an int or None, got 2\.5", {"group_size": 2.5}),
    "eps_negative": (ValueError, r"eps must be a finite number of at least 0, got -1e-05", {"eps": -1e-5}),
    "eps_nan": (ValueError, r"eps must be a finite.*nan", {"eps": float("nan")}),
    "eps_inf": (ValueError, r"eps must be a finite.*inf", {"eps": float("inf")}),
    "eps_text": (ValueError, r"eps must be a finite.*'small'", {"eps": "small"}),
    "activation": (ValueError, r"activation must be one of silu, swish, sigmoid, got 'relu'", {"activation": "relu"}),
    "activation_none": (ValueError, r"activation must be one of.*None", {"activation": None}),
    "numerics": (ValueError, r"numerics must be one of fp32, mamba2, qwen3_next, torchtitan, got 'bf16'", {"numerics": "bf16"}),
    "out_dtype": (TypeError, r"out_dtype must be float32.*torch\.int8", {"out_dtype": torch.int8}),
    "flag_text": (TypeError, r"norm_before_gate must be True or False, got 'no'", {"norm_before_gate": "no"}),
    "flag_none": (TypeError, r"norm_before_gate must be True or False, got None", {"norm_before_gate": None}),
    "flag_tensor": (TypeError, r"zero_centered must be True or False, got tensor\(True\)", {"zero_centered": torch.tensor(True)}),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(launched, case, function):
    """One line: the value, the rule, the remedy; and nothing was launched."""
    error, pattern, changed = BAD[case]
    arguments = {
        "x": torch.ones(4, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
        "z": None,
    } | changed
    if "activation" in changed:
        arguments["z"] = torch.ones(4, 8)
    with pytest.raises(error, match=pattern) as caught:
        getattr(gatednorm, function)(**arguments)
    assert "\n" not in str(caught.value)
    assert launched == []


BAD_OUT = {
    "not_a_tensor": (TypeError, r"out must be a torch\.Tensor, got str", lambda x, z: "out"),
    "shape": (ValueError, r"out must have the shape of x, got \(8, 4\)", lambda x, z: torch.ones(8, 4)),
    "rows": (ValueError, r"out must have the shape of x, got \(5, 8\) and \(4, 8\)", lambda x, z: torch.ones(5, 8)),
    "integers": (TypeError, r"out must be float32", lambda x, z: torch.ones(4, 8).int()),
    "transposed": (ValueError, r"last dimension of out", lambda x, z: torch.ones(8, 4).t()),
    "one_row_repeated": (ValueError, r"out must not overlap itself", lambda x, z: torch.ones(1, 8).expand(4, 8)),
    "rows_that_overlap": (ValueError, r"out must not overlap itself", lambda x, z: torch.ones(64).as_strided((4, 8), (3, 1))),
    "other_dtype": (TypeError, r"out must have out_dtype", lambda x, z: torch.ones(4, 8).half()),
    "shifted_by_one": (ValueError, r"out overlaps x", lambda x, z: x._base[:4, 1:9]),
    "shifted_by_a_row": (ValueError, r"out overlaps x", lambda x, z: x._base[1:5, :8]),
    "other_strides": (ValueError, r"out overlaps z", lambda x, z: z._base.view(-1)[:32].view(4, 8)),
    "other_steps_between": (ValueError, r"out overlaps x", lambda x, z: x._base.as_strided((4, 8), (16, 1), 8)),
    "on_the_weight": (ValueError, r"out overlaps weight", None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OUT)
def test_bad_out(launched, path, case):
    error, pattern, make = BAD_OUT[case]
    x, z = (x_of(6, 12)[:4, :8] for _ in range(2))
    memory = torch.ones(4, 8)
    weight = memory.view(-1)[8:16] if make is None else torch.ones(8)
    out = memory if make is None else make(x, z)
    kept = [t.clone() for t in (x, z, weight)]
    kwargs = {"out_dtype": torch.float32} if case == "other_dtype" else {}
    for function in (gatednorm.rms_norm_gated, gatednorm.layernorm_forward):
        with pytest.raises(error, match=pattern):
            function(x, weight, None, z, out=out, **kwargs)
    assert launched == []
    assert all(same_bits(a, b) for a, b in zip((x, z, weight), kept, strict=True))


def test_a_device_without_a_kernel():
    with pytest.raises(ValueError, match=r"x must be on one of cpu, .*got meta; .* \.cpu\(\)"):
        gatednorm.layernorm_forward(torch.ones(4, 8, device="meta"))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_is_no_out(launched, path, name):
    """Also where it has the shape of the only row: later rows, and later calls, need it."""
    x, parameter = (torch.randn(8, device=path.device) for _ in range(2))
    with pytest.raises(ValueError, match=f"out must not be {name}, .* None for a new tensor"):
        gatednorm.rms_norm_gated(x, **{name: parameter}, out=parameter)
    assert launched == []


def test_one_sequence_of_time_first_memory(path):
    """A dimension of size 1 has a stride that means nothing: batches of one when decoding."""
    memory = torch.randn(5, 32, device=path.device)
    x = memory.view(1, 5, 32)[..., :16]
    want = gatednorm.rms_norm_gated(x)
    time_first = memory.view(5, 1, 32).transpose(0, 1)
    assert time_first.stride() != memory.view(1, 5, 32).stride()
    for out in (time_first[..., 16:], time_first[..., :16]):
        assert same_bits(gatednorm.rms_norm_gated(x, out=out), want)


@pytest.mark.parametrize(
    "case", ["activation", "numerics", "group_size_zero", "eps_nan", "flag_text"]
)
def test_bad_options_of_the_reference(case):
    error, pattern, changed = BAD[case]
    with pytest.raises(error, match=pattern):
        gatednorm.rms_norm_ref(torch.ones(4, 8), None, None, torch.ones(4, 8), **changed)


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


BAD_BACKWARD = {
    "dy_shape": (ValueError, r"^dy must have the shape of", {"dy": torch.ones(5, 8)}),
    "dy_integers": (TypeError, r"^dy must be float32", {"dy": torch.ones(4, 8).int()}),
    "dy_transposed": (ValueError, r"dimension of dy .* unit stride", {"dy": torch.ones(8, 4).t()}),
    "dy_none": (TypeError, r"^dy must be a torch\.Tensor, got None", {"dy": None}),
    "dx_not_a_tensor": (TypeError, r"^dx must be a torch\.Tensor, got list", {"dx": [1.0]}),
    "dz_dtype": (TypeError, r"^dz must be torch\.float32 like", {"dz": torch.ones(4, 8).half()}),
    "rstd_shape": (ValueError, r"rstd must be .*\[rows, groups\].*\[4, 2\]", {"rstd": torch.ones(4, 2)}),
    "rstd_dtype": ((ValueError, TypeError), r"rstd", {"rstd": torch.ones(4, 1).half()}),
    "mean_missing": (ValueError, r"mean", {"is_rms_norm": False}),
    "dx_shape": (ValueError, r"^dx must have the shape", {"dx": torch.ones(4, 4)}),
    "dx_transposed": (ValueError, r"dimension of dx .* unit stride", {"dx": torch.ones(8, 4).t()}),
    "dx_repeated": (ValueError, r"^dx must not overlap itself", {"dx": torch.ones(1, 8).expand(4, 8)}),
    "group_size": (ValueError, r"group_size must divide", {"group_size": 5}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_bad_backward(launched, path, case):
    error, pattern, changed = BAD_BACKWARD[case]
    z = torch.ones(4, 8)
    arguments = {
        "dy": torch.ones(4, 8), "x": torch.ones(4, 8), "weight": torch.ones(8), "bias": None, "z": z, "mean": None,
        "rstd": torch.ones(4, 1), "is_rms_norm": True,
    }  # fmt: skip
    with pytest.raises(error, match=pattern):
        gatednorm.layernorm_backward(**(arguments | changed))
    assert launched == []


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("target", ["dx", "dz"])
@pytest.mark.parametrize("source", ["dy", "x", "z", "other"])
def test_gradient_over_an_input_is_refused(
    launched, path, source, target, is_rms_norm, norm_before_gate
):
    """`dz=dy`, `dx=x`, or `dx` and `dz` the same memory: what is written is read again."""
    case = Case((9,), 16, 1, is_rms_norm, norm_before_gate)
    i = inputs_of(case, path.device)
    kwargs = dict(is_rms_norm=is_rms_norm, **case.options)
    given = (i.x, i.weight, None, i.z)
    _, mean, rstd = gatednorm.layernorm_forward(*given, **kwargs)
    memory = {"dy": i.dy, "x": i.x, "z": i.z, "other": torch.empty_like(i.x)}[source]
    written = {"dx": memory, "dz": memory} if source == "other" else {target: memory}
    launched.clear()
    with pytest.raises(ValueError, match=r"must not be|overlap"):
        gatednorm.layernorm_backward(i.dy, *given, mean, rstd, **kwargs, **written)
    assert launched == []


# ---- edges ----


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
    """`swish` is `silu`; `rmsnorm_fn` is `layernorm_fn` told so; eps is 1e-6, the gate comes last."""
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


@pytest.mark.parametrize("name", ["x", "z", "weight", "bias", "out"])
def test_inference_refuses_to_cut_a_graph(launched, path, name):
    tensors = {k: torch.ones(4, 8) for k in ("x", "z", "out")} | {
        k: torch.ones(8) for k in ("weight", "bias")
    }
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name} requires a gradient.*rmsnorm_fn.*no_grad"):
        gatednorm.rms_norm_gated(**tensors)
    assert launched == []
    with torch.no_grad():
        gatednorm.rms_norm_gated(**tensors)
    with torch.inference_mode():
        gatednorm.rms_norm_gated(**tensors)
    assert launched == ["forward", "forward"]


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

"""What the functions refuse, before any launch: value, rule and remedy in one error."""
# ruff: noqa: E501 (one line for each bad input)

import re

import pytest
import torch

import gatednorm
from gatednorm import quantize_fp8_ref
from norm_calls import x_of
from norm_cases import Case, inputs_of, same_bits

FUNCTIONS = ("layernorm_fn", "rmsnorm_fn", "rms_norm_gated", "layernorm_forward")


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


@pytest.mark.parametrize(
    "case", ["activation", "numerics", "group_size_zero", "eps_nan", "flag_text"]
)
def test_bad_options_of_the_reference(case):
    error, pattern, changed = BAD[case]
    with pytest.raises(error, match=pattern):
        gatednorm.rms_norm_ref(torch.ones(4, 8), None, None, torch.ones(4, 8), **changed)


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


@pytest.mark.parametrize(
    ("y", "arguments", "rule"),
    [
        (torch.ones(2, 128), {"scaling": "row-wise"}, "scaling must be one of 1x128"),
        (torch.ones(2, 128), {"scale": torch.ones(())}, "scale must be given with"),
        (torch.ones(2, 128), {"scaling": "tensorwise"}, "scale must be given with"),
        (
            torch.ones(2, 128), {"scaling": "tensorwise", "scale": torch.ones(2, 1)},
            "scale must be one float32 number, got torch.float32 of shape (2, 1)",
        ),
        (torch.ones(2, 0), {"scaling": "rowwise"}, "got [2, 0] in torch.float32"),
        (torch.ones(2, 100), {}, "of blocks of [1, 128] with scaling='1x128', got [2, 100]"),
        (torch.ones(2, 128), {"scaling": "128x128"}, "of blocks of [128, 128]"),
        (torch.ones(1, 2, 128), {}, "y must be [rows, K] in float32"),
        (torch.ones(2, 128).bfloat16(), {}, "in torch.bfloat16; flatten and convert it"),
    ],
    ids=[
        *("name", "a_scale", "no_scale", "scales", "no_columns", "columns", "rows", "dimensions"),
        "dtype",
    ],
)  # fmt: skip
def test_the_reference_refuses_what_it_would_get_wrong(y, arguments, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        quantize_fp8_ref(y, **arguments)


def test_the_reference_takes_a_scale_that_is_a_tensor():
    with pytest.raises(TypeError, match=r"scale must be a torch\.Tensor, got float; pass"):
        quantize_fp8_ref(torch.ones(2, 128), "tensorwise", 0.02)

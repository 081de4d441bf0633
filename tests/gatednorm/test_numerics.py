"""Values and gradients against float64, for every combination of options, sizes, layouts, dtypes;
and the rounding points of each model family, bit for bit."""

import importlib
import importlib.util
import inspect
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gatednorm
from gatednorm import gated_norm_ref
from gatednorm.families import FAMILIES
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
    ulps,
)
from paths import GPU

ROUTES = st.sampled_from([through_autograd, through_buffers])


@settings(max_examples=600)
@given(case=cases([torch.float32, torch.float16, torch.bfloat16, torch.float64]), route=ROUTES)
def test_generated_cpu(case, route):
    """Values and gradients, inputs untouched, nothing read or written outside of a view."""
    check(case, "cpu", route)


@settings(max_examples=40 if GPU else 100)
@given(data=st.data())
def test_generated_kernels(kernels, data):
    """The same for the Triton kernels; fewer, because each one compiles or is interpreted."""
    case = data.draw(cases(kernels.dtypes, max_elements=30_000 if GPU else 9_000))
    check(case, kernels.device, data.draw(ROUTES))


GATES = {
    "plain": {"gated": False},
    "gate_after": {"norm_before_gate": True},
    "gate_before": {"norm_before_gate": False},
}
CROSS = [
    Case((5,), 17, groups, norm == "rms", activation=act, **GATES[gate], weight=w != "no_weight",
         zero_centered=w == "zero_centered", bias=bias)
    for norm, gate, act, w, bias, groups in itertools.product(
        ["rms", "layer"], GATES, ["silu", "sigmoid"], ["no_weight", "weight", "zero_centered"],
        [False, True], [1, 3],
    )
    if gate != "plain" or act == "silu"
]  # fmt: skip


@pytest.mark.parametrize("case", CROSS, ids=Case.id)
def test_every_combination_of_options(path, case):
    check(case, path.device)


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("others", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dtypes(path, others, is_rms_norm, norm_before_gate):
    """Gate, parameters and result in dtypes of their own; those of a path: paths.NormPath."""
    for dtype, name in itertools.product(path.dtypes, ("z_dtype", "w_dtype", "out_dtype")):
        case = Case((7,), 40, 1, is_rms_norm, norm_before_gate, bias=True, dtype=dtype)
        check(replace(case, **{name: others}), path.device, through_buffers)


PACKED = Layout(left=64, right=32)
HEADS = Layout(order=(0, 1), left=16, right=16, offset=8)
TIME_INSIDE = Layout(order=(0, 2, 1), right=8)


@pytest.mark.parametrize(
    ("outer", "layout"),
    [
        pytest.param((6,), PACKED, id="packed_slice"),
        pytest.param((5,), Layout(left=1, right=2, offset=1), id="unaligned_slice"),
        pytest.param((4, 3), HEADS, id="tokens_heads"),
        pytest.param((2, 3, 4), TIME_INSIDE, id="batch_heads_time"),
        pytest.param((3, 4), Layout(order=(1, 0)), id="transposed"),
        pytest.param((6,), Layout(expand=True), id="one_row_repeated"),
    ],
)
@pytest.mark.parametrize("only", ["x", "z", "dy", "out", "dx", "dz", "all"])
def test_strides(path, outer, layout, only):
    """Each tensor alone, and all together, in a layout that is not contiguous."""
    names = ("x", "z", "dy", "out", "dx", "dz") if only == "all" else (only,)
    case = Case(outer, 24, 2, norm_before_gate=False, layouts=dict.fromkeys(names, layout))
    check(case, path.device, through_buffers)


# ---- bugs that users of other copies met ----


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_backward_keeps_to_its_group(path, is_rms_norm, norm_before_gate):
    """state-spaces/mamba#547: the backward ignored group_size. Groups of very different sizes, and
    a gradient that enters one group alone and must leave through it alone."""
    case = Case((6,), 24, 4, is_rms_norm, norm_before_gate, bias=True)
    inputs = inputs_of(case, path.device)
    powers = torch.tensor([1.0, 100.0, 0.01, 10.0], device=path.device)
    inputs.x.mul_(powers.repeat_interleave(24))
    inputs.dy.zero_()[:, 24:48] = 1.0
    got = through_autograd(case, inputs)
    for name in ("dx", "dz"):
        touched = got[name].unflatten(-1, (4, 24)).abs().amax(-1) > 0
        assert touched.any(0).tolist() == [False, True, False, False], name
    dx = differentiate(case, inputs, torch.float64)["dx"]
    torch.testing.assert_close(got["dx"].double(), dx, rtol=1e-4, atol=1e-5 * float(dx.abs().max()))


@pytest.mark.parametrize("numerics", ["fp32", "mamba2", "qwen3_next", "torchtitan"])
def test_gradient_of_the_gate_takes_the_value_before_it(path, numerics):
    """flash-linear-attention#1071: a recompute kept the value from the wrong side of the gate. With
    gates near 0 the two sides differ by orders of magnitude."""
    case = Case((9,), 48, 1, bias=True, numerics=numerics, dtype=torch.float16)
    inputs = inputs_of(case, path.device)
    inputs.z.copy_(torch.linspace(-9, 9, 48).repeat(9, 1))
    got = through_autograd(case, inputs)
    dz = differentiate(case, inputs, torch.float64)["dz"]
    error = (got["dz"].double() - dz).abs()
    assert (error.amax(0) <= 4e-3 * dz.abs().amax(0) + 1e-7).all()


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
def test_the_slope_of_a_gate_that_is_nearly_open(kernels, norm_before_gate):
    """Sigmoid's slope is `s * (1 - s)`, and where s is nearly 1 that difference has few digits."""
    case = Case((5,), 48, 1, norm_before_gate=norm_before_gate, activation="sigmoid")
    inputs = inputs_of(case, kernels.device)
    inputs.z.copy_(torch.linspace(-12, 12, 48).repeat(5, 1))
    got = through_autograd(case, inputs)
    dz, z = differentiate(case, inputs, torch.float64)["dz"], inputs.z.double()
    slope = torch.sigmoid(z) * torch.sigmoid(-z)
    scale = slope * (dz / slope).abs().amax(-1, keepdim=True)
    assert ((got["dz"].double() - dz).abs() <= 1e-5 * scale).all()


def gradients_of_rounded_values(case: Case, inputs) -> dict[str, torch.Tensor]:
    """`dw`, and `dz` of a gate after, in fp64 from the values that a forward with these rounding
    points multiplies; the roundings themselves count as constants."""
    x, z, w, dy = (t.float() for t in (inputs.x, inputs.z, inputs.weight, inputs.dy))
    s = torch.sigmoid(z)
    act, slope = z * s, s + z * s * (1 - s)
    u = x if case.norm_before_gate else x * act
    xhat = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + case.eps)
    if case.numerics in ("mamba2", "qwen3_next"):
        xhat = xhat.to(case.dtype).float()
    h = xhat * w
    if case.numerics == "torchtitan":
        h = h.to(case.dtype).float()
    if case.numerics == "qwen3_next":
        h = h.to(torch.promote_types(case.dtype, inputs.weight.dtype)).float()
    g = dy * act if case.norm_before_gate else dy
    found = {"dw": (g.double() * xhat.double()).sum(0)}
    if case.norm_before_gate:
        found["dz"] = dy.double() * h.double() * slope.double()
    return found


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("w_dtype", [None, torch.float32], ids=["w_as_x", "w_fp32"])
@pytest.mark.parametrize("numerics", ["fp32", "mamba2", "qwen3_next", "torchtitan"])
def test_gradients_take_the_rounded_values(path, numerics, w_dtype, norm_before_gate):
    """Results kept in fp32 show which values the backward multiplied: those that the forward
    rounded, and not those of another family, by at least a factor of ten."""
    dtype = torch.bfloat16 if torch.bfloat16 in path.dtypes else torch.float16
    case = Case(
        (37,), 64, 1, True, norm_before_gate, numerics=numerics, dtype=dtype,
        z_dtype=torch.float32, w_dtype=w_dtype,
    )  # fmt: skip
    inputs = inputs_of(case, path.device)
    got = through_autograd(case, inputs)
    truths = {
        name: gradients_of_rounded_values(replace(case, numerics=name), inputs)
        for name in ("fp32", "mamba2", "qwen3_next", "torchtitan")
    }
    for name in ("dw", "dz"):
        if name not in truths[numerics] or got[name].dtype != torch.float32:
            continue
        off = {other: (got[name] - truth[name]).norm() for other, truth in truths.items()}
        for other, truth in truths.items():
            if not torch.equal(truth[name], truths[numerics][name]):
                assert off[numerics] < 0.1 * off[other], (name, other)


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
def test_extreme_values(path, norm_before_gate):
    """Gates that saturate, rows of zeros, rows of 1e-18 and 1e+18: finite, and right."""
    case = Case((6,), 64, 1, True, norm_before_gate, weight=False, eps=1e-6)
    i = inputs_of(case, path.device)
    i.x.mul_(torch.tensor([1.0, 0.0, 1e-18, 1e18, 1.0, 1e-3], device=path.device)[:, None])
    i.z.copy_(torch.linspace(-120, 120, 64).repeat(6, 1))
    i.z[3] = 1.0
    i.dy.fill_(1.0)
    got = through_autograd(case, i)
    for name, want in differentiate(case, i, torch.float64).items():
        assert got[name].isfinite().all()
        # a row of its own scale; dx of the row of 1e18 is below what fp32 holds
        scale = want.abs().amax(-1, keepdim=True)
        error = (got[name] - want).abs()
        assert (error <= 1e-5 * scale + 1e-6 * scale.clamp(max=1)).all(), name


# ---- rounding points of the model families ----


def _installed() -> list:
    """The families that the installed transformers knows; `find_spec` imports no model file."""
    if importlib.util.find_spec("transformers") is None:
        return []
    return [
        pytest.param(*key, id=key[1].removesuffix("RMSNormGated"))
        for key in FAMILIES
        if importlib.util.find_spec(key[0].rpartition(".")[0])
    ]


@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32], ids=["w_bf16", "w_fp32"])
@pytest.mark.parametrize(("where", "name"), _installed())
def test_reference_equals_the_family(where, name, w_dtype):
    """The family's own PyTorch code on the CPU, bf16 activations: equal in every bit."""
    numerics, activation, after, _ = FAMILIES[where, name]
    module = importlib.import_module(where)
    # Before transformers 5.20 NemotronH took Zamba2's class; before 5.23 some had no groups.
    norm = getattr(module, name, None) or module.Zamba2RMSNormGated
    group_size = 32 if "group_size" in inspect.signature(norm).parameters else None
    made = norm(96, **({"group_size": group_size} if group_size else {}))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 96, generator=g).bfloat16()
    z = torch.randn(3, 50, 96, generator=g).mul(2).bfloat16()
    made.weight.data = torch.randn(96, generator=g).to(w_dtype)
    with torch.no_grad():
        theirs = made(x, z)
        ours = gated_norm_ref(
            x, made.weight, None, z, made.variance_epsilon, group_size, after,
            numerics=numerics, activation=activation, out_dtype=theirs.dtype,
        )  # fmt: skip
    assert same_bits(ours, theirs)
    other = {"mamba2": "fp32", "qwen3_next": "fp32", "fp32": "mamba2"}[numerics]
    differs = gated_norm_ref(
        x, made.weight, None, z, made.variance_epsilon, group_size, after,
        numerics=other, activation=activation, out_dtype=theirs.dtype,
    )  # fmt: skip
    assert not same_bits(differs, theirs)  # or this test could not tell them apart


def test_the_table_of_families():
    """docs/numerics.md names the options that the test above uses."""
    document = (Path(__file__).parents[2] / "docs/numerics.md").read_text()
    rows = re.findall(
        r"^\| (\w.+) \| `(\w+)` \| `(\w+)` \| (`True`|`False`|its .+) \| .+ \|$", document, re.M
    )
    documented = {
        family.split(" (")[0]: (numerics, activation, "True" in after or "its" in after)
        for names, numerics, activation, after in rows
        for family in names.split(", ")
    }
    tested = {name.removesuffix("RMSNormGated"): f[:3] for (_, name), f in FAMILIES.items()}
    assert documented == tested


@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("w_dtype", [None, torch.float32], ids=["w_as_x", "w_fp32"])
@pytest.mark.parametrize("numerics", ["fp32", "mamba2", "qwen3_next", "torchtitan"])
def test_bits_of_the_reference(path, numerics, w_dtype, norm_before_gate, is_rms_norm):
    """At least 99.99% of the elements equal the reference; the rest are one unit off, two or four
    where values are rounded on their way.

    In bf16, and in fp16 where the interpreter cannot judge bf16: fp16 rounds eight times as finely,
    so eight times as many elements lie close enough to a rounding boundary for fp32 noise to cross.
    """
    dtype = torch.bfloat16 if torch.bfloat16 in path.dtypes else torch.float16
    rows = 2000 if dtype == torch.bfloat16 else 200
    case = Case(
        (rows,), 128, 1, is_rms_norm, norm_before_gate, numerics=numerics, dtype=dtype,
        w_dtype=w_dtype, layouts={"z": Layout(right=128)},
    )  # fmt: skip
    inputs = inputs_of(case, path.device)
    given_tensors = (inputs.x, inputs.weight, inputs.bias, inputs.z)
    got = gatednorm.layernorm_fn(*given_tensors, is_rms_norm=is_rms_norm, **case.options)
    want = gated_norm_ref(*given_tensors, is_rms_norm=is_rms_norm, **case.options)
    off = ulps(got, want)
    # fp32 noise that crosses a boundary moves a value by one unit, and the next rounding can double
    # that, where a product takes the value from the start of a binade to the end of one. With the
    # gate first no product follows the second of qwen3_next's.
    twice = numerics == "qwen3_next" and w_dtype is None and norm_before_gate
    assert int(off.max()) <= (1 if numerics == "fp32" else 4 if twice else 2)
    share = float((off > 0).double().mean())
    assert share <= (1e-4 if dtype == torch.bfloat16 else 8e-4), f"{share:.2%} differ"

"""The registered operators and all that traces: opcheck, compile, export, subclasses."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import gatednorm
from norm_calls import GATES, gradients, leaves_of
from norm_cases import Case, inputs_of, same_bits


@pytest.fixture
def compiler(path):
    """`inductor` on a GPU; without one, tracing and autograd of the compiler, run eagerly."""
    torch._dynamo.reset()
    yield "inductor" if path.device == "cuda" else "aot_eager"
    torch._dynamo.reset()


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), GATES)
@pytest.mark.parametrize(
    "op", ["forward", "forward_outer_stats", "forward_out", "backward", "backward_with_output"]
)
def test_opcheck(small, op, is_rms_norm, norm_before_gate, gated, weight):
    kind = (is_rms_norm, norm_before_gate, gated, weight)
    _case, i = small(*kind, outer=(2, 3), bias=not is_rms_norm)
    options = (1e-5, 8, norm_before_gate, is_rms_norm, "silu", False, "fp32", None)
    given = (i.x, i.weight, i.bias, i.z)
    if op == "forward":
        args = (*leaves_of(i), *options)
    elif op == "forward_outer_stats":
        args = (*leaves_of(i), *options, None, True)
    elif op == "forward_out":
        args = (*given, torch.empty_like(i.x), *options)
    else:
        _, mean, rstd = torch.ops.gatednorm.forward(*given, *options)
        args = (i.dy, *given, mean, rstd, *options, op == "backward_with_output")
    name = op.removesuffix("_with_output").removesuffix("_outer_stats")
    operator = getattr(torch.ops.gatednorm, name)
    torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), GATES)
def test_a_program_that_an_earlier_version_compiled(
    small, is_rms_norm, norm_before_gate, gated, weight
):
    """As torch.compile keeps it on a disk: arguments by position, `with_output` unheard of."""
    kind = (is_rms_norm, norm_before_gate, gated, weight)
    _case, i = small(*kind, outer=(2, 3), bias=not is_rms_norm)
    options = (1e-6, 8, norm_before_gate, is_rms_norm)
    given = (i.x, i.weight, i.bias, i.z)
    others = (*options, "silu", False, "fp32", None)
    y, mean, rstd = torch.ops.gatednorm.forward.default(*given, *others)
    assert rstd.shape == (i.x[..., 0].numel(), i.x.shape[-1] // 8)
    dx, dw, db, dz, *_ = torch.ops.gatednorm.backward.default(i.dy, *given, mean, rstd, *others)
    wanted = gradients(lambda *leaves: gatednorm.layernorm_fn(*leaves, *options), i)
    got = [t for t in (y, dx, dw, db, dz) if t.numel()]
    assert [same_bits(*pair) for pair in zip(got, wanted, strict=True)] == [True] * len(got)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), GATES)
def test_compile(small, compiler, is_rms_norm, norm_before_gate, gated, weight):
    """One graph, values and gradients as in eager mode."""
    case, i = small(is_rms_norm, norm_before_gate, gated, weight)

    def norm(x, w, b, z):
        return gatednorm.layernorm_fn(x * 2, w, b, z, is_rms_norm=is_rms_norm, **case.options) + 1

    compiled = torch.compile(norm, fullgraph=True, backend=compiler)
    for got, want in zip(gradients(compiled, i), gradients(norm, i), strict=True):
        torch.testing.assert_close(got, want)


def test_compile_with_dynamic_shapes(path, compiler):
    """Any number of rows: what the first call compiled serves the others."""
    counter = CompileCounterWithBackend(compiler)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def norm(x, w, z):
        return gatednorm.rmsnorm_fn(x, w, None, z, group_size=8, norm_before_gate=False)

    compiled = []
    for rows in (5, 9, 33):
        i = inputs_of(Case((rows, 3), 8, 2), path.device)
        leaves = [t.detach().requires_grad_() for t in (i.x, i.weight, i.z)]
        y = norm(*leaves)
        want = gatednorm.rmsnorm_fn(i.x, i.weight, None, i.z, group_size=8, norm_before_gate=False)
        torch.testing.assert_close(y, want)
        for g in torch.autograd.grad(y, leaves, i.dy):
            assert g.isfinite().all()
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 3


def test_compile_inference(small, compiler):
    """`rms_norm_gated`, with and without `out`, and with a packed slice for it."""
    case, i = small()

    def norm(x, w, z, out):
        gatednorm.rms_norm_gated(x, w, None, z, out=out[:, 16:], **case.options)
        return gatednorm.rms_norm_gated(x, w, None, z, **case.options) * 2

    want_out = torch.zeros(6, 48, device=i.x.device)
    got_out = want_out.clone()
    want = norm(i.x, i.weight, i.z, want_out[:, :32])
    got = torch.compile(norm, fullgraph=True, backend=compiler)(i.x, i.weight, i.z, got_out[:, :32])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_out, want_out)


@pytest.mark.parametrize("norm_path", ["training", "inference"])
def test_export(path, norm_path):
    norm = gatednorm.RMSNorm(16, norm_before_gate=False, group_size=8, device=path.device)
    norm.requires_grad_(norm_path == "training").path = norm_path
    i = inputs_of(Case((6,), 8, 2), path.device)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(norm, (i.x, i.z), dynamic_shapes=({0: rows}, {0: rows}))
    assert "gatednorm" in str(program.graph)
    other = inputs_of(Case((11,), 8, 2, seed=1), path.device)
    with torch.no_grad():
        assert same_bits(program.module()(other.x, other.z), norm(other.x, other.z))


@pytest.mark.parametrize("norm_path", gatednorm.NORM_PATHS)
@pytest.mark.parametrize("bad", ["z", "weight", "group_size"])
def test_export_refuses_what_the_call_would(small, bad, norm_path):
    function = gatednorm.rmsnorm_fn if norm_path == "training" else gatednorm.rms_norm_gated
    _case, i = small()
    z = torch.ones(6, 8, device=i.x.device) if bad == "z" else i.z
    weight = torch.ones(5, device=i.x.device) if bad == "weight" else i.weight
    groups = 3 if bad == "group_size" else None

    class Norm(torch.nn.Module):
        def forward(self, x):
            return function(x, weight, None, z, group_size=groups)

    with pytest.raises(Exception, match=rf"{bad} must"):
        torch.export.export(Norm(), (i.x,))


def test_selective_checkpointing_sees_the_operator(small):
    """A policy that keeps the norm's result is asked about it by name."""
    case, i = small()
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append(str(op))
        return CheckpointPolicy.MUST_SAVE

    def norm(*leaves):
        return gatednorm.rmsnorm_fn(*leaves, **case.options)

    want = gradients(norm, i)
    got = gradients(
        lambda *leaves: checkpoint(
            norm, *leaves, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        ),
        i,
    )  # fmt: skip
    assert "gatednorm.forward.default" in asked
    for a, b in zip(got, want, strict=True):
        assert same_bits(a, b)


def test_a_trace_of_torchscript(small):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = gatednorm.RMSNorm(16)

        def forward(self, x, z):
            return self.norm(x, z) + gatednorm.rms_norm_gated(x, None, None, z)

    _case, i = small()
    module = Both().to(i.x.device).requires_grad_(False)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (i.x, i.z)), saved)
    saved.seek(0)
    assert same_bits(torch.jit.load(saved)(i.x + 1, i.z), module(i.x + 1, i.z))


def test_fake_and_meta_tensors():
    for is_rms_norm in (True, False):
        x = torch.empty(3, 5, 16, device="meta", dtype=torch.float16)
        y = gatednorm.layernorm_fn(x, z=x, is_rms_norm=is_rms_norm, out_dtype=torch.float32)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "meta")
        assert gatednorm.rms_norm_gated(x, z=x).shape == x.shape
        with pytest.raises(RuntimeError, match="out must have the shape of x"):
            gatednorm.rms_norm_gated(x, out=torch.empty(3, device="meta"))
        with FakeTensorMode():
            x = torch.empty(3, 5, 16, requires_grad=True)
            gatednorm.layernorm_fn(x, z=x, is_rms_norm=is_rms_norm).sum().backward()
            assert x.grad.shape == x.shape


META = {"x": (6, 16), "weight": (16,), "bias": (16,), "z": (6, 16), "out": (6, 16)}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *(("layernorm_fn", name) for name in ("weight", "bias", "z")),
        *(("rms_norm_gated", name) for name in ("weight", "bias", "z", "out")),
    ],
)
def test_meta_tensors_and_others_are_refused(path, function, name):
    """With x on the meta device as with x elsewhere; also where a compiler traces the call."""
    function = getattr(gatednorm, function)
    x = torch.empty(META["x"], device="meta")
    other = {name: torch.empty(META[name], device=path.device)}
    rule = rf"{name} must be on the device of x, got {other[name].device} and meta"
    with pytest.raises(ValueError, match=rule):
        function(x, **other)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=rule):
        torch.compile(function, fullgraph=True, backend="eager")(x, **other)


BAD_META = {
    "no_channels": ({"x": torch.empty(2, 0, device="meta")}, "at least one channel"),
    "integers": ({"x": torch.empty(2, 8, device="meta", dtype=torch.int32)}, "must be float32"),
    "group_of_none": ({"group_size": 0}, "group_size must divide 8, got 0"),
    "negative_group": ({"group_size": -4}, "group_size must divide 8, got -4"),
    "activation": ({"activation": "relu"}, "activation must be one of"),
    "out_dtype": ({"out_dtype": torch.int8}, "out_dtype must be float32"),
    "weight": ({"weight": [1.0]}, "weight must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("function", [gatednorm.rmsnorm_fn, gatednorm.rms_norm_gated])
@pytest.mark.parametrize("case", BAD_META)
def test_the_rules_hold_for_meta_tensors_too(case, function):
    changed, rule = BAD_META[case]
    arguments = {"x": torch.empty(2, 8, device="meta"), **changed}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rule):
        function(**arguments)


@pytest.mark.parametrize("norm_path", gatednorm.NORM_PATHS)
def test_a_module_refuses_a_meta_tensor(path, norm_path):
    norm = gatednorm.LayerNorm(16, device=path.device, path=norm_path).requires_grad_(False)
    x = torch.empty(6, 16, device="meta")
    rule = rf"weight must be on the device of x, got {norm.weight.device} and meta"
    with pytest.raises(ValueError, match=rule):
        norm(x)
    with pytest.raises(Exception, match=rule):
        torch.export.export(norm, (x,))


def test_a_subclass_of_tensor_differentiates(small):
    """Its gradient comes back as a plain tensor."""

    class Named(torch.Tensor):
        pass

    case, i = small()
    x = i.x.detach().as_subclass(Named).requires_grad_()
    gatednorm.rmsnorm_fn(x, i.weight, None, i.z, **case.options).sum().backward()
    plain = i.x.detach().requires_grad_()
    gatednorm.rmsnorm_fn(plain, i.weight, None, i.z, **case.options).sum().backward()
    assert same_bits(x.grad.as_subclass(torch.Tensor), plain.grad)


@pytest.mark.parametrize("wrapped", [0, 1, 3], ids=["x", "weight", "z"])
def test_a_subclass_without_memory_of_its_own(small, wrapped):
    """DTensor's kind: whichever argument is one, the call goes through the operators."""
    case, i = small()
    given = [i.x, i.weight, None, i.z]
    want = gatednorm.rms_norm_gated(*given, **case.options)
    given[wrapped] = TwoTensor(given[wrapped], given[wrapped].clone())
    got = gatednorm.rms_norm_gated(*given, **case.options)
    assert same_bits(got.a if isinstance(got, TwoTensor) else got, want)


@pytest.mark.parametrize("function", ["layernorm_forward", "layernorm_backward"])
def test_the_bare_functions_refuse_tensors_without_memory(small, function):
    _case, i = small()
    x = TwoTensor(i.x, i.x.clone())
    given = (x,) if function == "layernorm_forward" else (i.dy, x, None, None, None, None, None)
    with pytest.raises(TypeError, match="takes plain tensors, got TwoTensor; use layernorm_fn"):
        getattr(gatednorm, function)(*given)


def test_the_bare_functions_take_a_parameter_class_of_ones_own(small):
    """As vLLM's, which have memory like any other."""

    class Named(torch.nn.Parameter):
        pass

    case, i = small()
    weight = i.weight.as_subclass(Named)
    found = gatednorm.layernorm_forward(i.x, weight, None, i.z, is_rms_norm=True, **case.options)
    want = gatednorm.rms_norm_gated(i.x, i.weight, None, i.z, **case.options)
    assert same_bits(found[0], want)

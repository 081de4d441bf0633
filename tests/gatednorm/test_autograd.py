"""A good citizen of PyTorch: torch.library, compile, export, checkpointing, autocast, memory."""

import contextlib
import gc
import subprocess
import sys

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
from gatednorm import autograd
from norm_cases import Case, Layout, inputs_of, same_bits, through_autograd

OPTIONS = [
    pytest.param(True, True, True, True, id="rms-gate_after-weight"),
    pytest.param(True, False, True, True, id="rms-gate_before-weight"),
    pytest.param(False, True, True, True, id="layer-gate_after-weight"),
    pytest.param(False, False, False, True, id="layer-plain-weight"),
    pytest.param(True, True, True, False, id="rms-gate_after"),
]


@pytest.fixture
def small(path):
    def make(is_rms_norm=True, norm_before_gate=True, gated=True, weight=True, **kwargs):
        case = Case((6,), 8, 2, is_rms_norm, norm_before_gate, gated, weight=weight, **kwargs)
        return case, inputs_of(case, path.device)

    return make


@pytest.fixture
def compiler(path):
    """`inductor` on a GPU; without one, tracing and autograd of the compiler, run eagerly."""
    torch._dynamo.reset()
    yield "inductor" if path.device == "cuda" else "aot_eager"
    torch._dynamo.reset()


def leaves_of(i):
    given = (i.x, i.weight, i.bias, i.z)
    return [None if t is None else t.detach().requires_grad_() for t in given]


def gradients(function, i):
    leaves = leaves_of(i)
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], i.dy)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), OPTIONS)
@pytest.mark.parametrize("op", ["forward", "forward_out", "backward"])
def test_opcheck(small, op, is_rms_norm, norm_before_gate, gated, weight):
    _case, i = small(is_rms_norm, norm_before_gate, gated, weight, bias=not is_rms_norm)
    options = (1e-5, 8, norm_before_gate, is_rms_norm, "silu", False, "fp32", None)
    given = (i.x, i.weight, i.bias, i.z)
    if op == "forward":
        args = (*leaves_of(i), *options)
    elif op == "forward_out":
        args = (*given, torch.empty_like(i.x), *options)
    else:
        _, mean, rstd = torch.ops.gatednorm.forward(*given, *options)
        args = (i.dy, *given, mean, rstd, *options)
    torch.library.opcheck(getattr(torch.ops.gatednorm, op).default, args)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), OPTIONS)
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


@pytest.mark.parametrize("bad", ["z", "weight", "group_size"])
def test_export_refuses_what_the_call_would(small, bad):
    _case, i = small()
    z = torch.ones(6, 8, device=i.x.device) if bad == "z" else i.z
    weight = torch.ones(5, device=i.x.device) if bad == "weight" else i.weight
    groups = 3 if bad == "group_size" else None

    class Norm(torch.nn.Module):
        def forward(self, x):
            return gatednorm.rmsnorm_fn(x, weight, None, z, group_size=groups)

    with pytest.raises(Exception, match=rf"{bad} must"):
        torch.export.export(Norm(), (i.x,))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_activation_checkpointing(small, reentrant):
    """flash-linear-attention#1071: what is computed again is what was computed."""
    case, i = small(numerics="qwen3_next", dtype=torch.float16)

    def norm(x, w, b, z):
        return gatednorm.rmsnorm_fn(x, w, b, z, **case.options).sin()

    def checkpointed(*leaves):
        return checkpoint(norm, *leaves, use_reentrant=reentrant)

    given, plain = leaves_of(i), leaves_of(i)
    y, want = checkpointed(*given), norm(*plain)
    assert same_bits(y, want)
    y.backward(i.dy)
    want.backward(i.dy)
    for a, b in zip(given, plain, strict=True):
        assert a is b is None or same_bits(a.grad, b.grad)


@pytest.mark.parametrize("first", ["moved", "kept"])
@pytest.mark.parametrize("strided", ["x", "z"])
def test_saved_tensors_that_come_back_with_other_strides(path, strided, first):
    """Offloading (`save_on_cpu`) brings a slice of a packed projection back dense."""
    layouts = {strided: Layout(left=8, right=8)}
    case = Case((6,), 8, 2, layouts=layouts)
    i = inputs_of(case, path.device)
    dense = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().contiguous(), lambda t: t)
    want = gradients(lambda x, w, b, z: gatednorm.rms_norm_ref(x, w, b, z, **case.options), i)
    for moved in ("kept", "moved", "kept") if first == "kept" else ("moved", "kept"):
        leaves = leaves_of(i)
        with dense if moved == "moved" else contextlib.nullcontext():
            y = gatednorm.rmsnorm_fn(*leaves, **case.options)
        got = torch.autograd.grad(y, [t for t in leaves if t is not None], i.dy)
        for a, b in zip(got, want[1:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("transform", ["vmap", "grad", "vjp", "jvp", "jacrev"])
@pytest.mark.parametrize(
    "function", ["layernorm_fn", "rmsnorm_fn", "rms_norm_gated", "layernorm_forward"]
)
def test_function_transforms_are_refused(small, function, transform):
    _case, i = small()
    norm = getattr(gatednorm, function)
    if function == "layernorm_forward":  # it returns the statistics too
        norm = lambda x: gatednorm.layernorm_forward(x)[0]  # noqa: E731
    calls = {
        "vmap": lambda: torch.func.vmap(norm)(i.x),
        "grad": lambda: torch.func.grad(lambda x: norm(x).sum())(i.x),
        "vjp": lambda: torch.func.vjp(norm, i.x),
        "jvp": lambda: torch.func.jvp(norm, (i.x,), (i.x,)),
        "jacrev": lambda: torch.func.jacrev(norm)(i.x),
    }
    with pytest.raises(RuntimeError, match=r"torch\.func.*rms_norm_ref") as caught:
        calls[transform]()
    assert "\n" not in str(caught.value)


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


FUNCTIONS = [gatednorm.rmsnorm_fn, gatednorm.rms_norm_gated, gatednorm.layernorm_forward]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_forward_mode_is_refused(small, function):
    """Also where no graph is recorded, which would drop the tangent."""
    _case, i = small()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        function(i.x)
        x = torch.autograd.forward_ad.make_dual(i.x, i.x)
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*rms_norm_ref"):
            function(x)


def test_batched_gradients(small):
    """What a vectorised Jacobian asks for, row by row the gradients of a loop."""
    case, i = small()
    given = [t.requires_grad_() for t in (i.x, i.weight, i.z)]
    y = gatednorm.rmsnorm_fn(i.x, i.weight, None, i.z, **case.options)
    dys = torch.stack([i.dy, -2 * i.dy, i.dy.flip(0)])
    batched = torch.autograd.grad(y, given, dys, is_grads_batched=True, retain_graph=True)
    for n, dy in enumerate(dys):
        single = torch.autograd.grad(y, given, dy, retain_graph=True)
        for got, want in zip(batched, single, strict=True):
            assert same_bits(got[n], want)


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.double], ids=["half", "double"])
def test_saved_tensors_that_come_back_as_others(small, change):
    case, i = small()
    x = i.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
        y = gatednorm.rmsnorm_fn(x, i.weight, None, i.z, **case.options)
    with pytest.raises(
        RuntimeError, match=r"^x was saved .* as torch.float32 on .* brought it back"
    ):
        y.sum().backward()


def test_a_trace_of_torchscript(small):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = gatednorm.RMSNorm(16)

        def forward(self, x, z):
            return self.norm(x, z) + gatednorm.rms_norm_gated(x, None, None, z)

    _case, i = small()
    module = Both().to(i.x.device).requires_grad_(False)
    traced = torch.jit.trace(module, (i.x, i.z))
    assert same_bits(traced(i.x + 1, i.z), module(i.x + 1, i.z))


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


def test_without_triton_the_way_out_is_named(monkeypatch):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(autograd.importlib, "import_module", missing)
    with pytest.raises(RuntimeError, match=r"a cuda device need .* triton.*gatednorm\[triton\]"):
        autograd.backend.__wrapped__("cuda")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "operator"])
def test_second_derivative_is_refused(small, compiled):
    _case, i = small()
    x = i.x.requires_grad_()
    if compiled:
        options = (1e-5, None, True, True, "silu", False, "fp32", None)
        y = torch.ops.gatednorm.forward(x, None, None, None, *options)[0]
    else:
        y = gatednorm.rmsnorm_fn(x)

    def twice():
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.sum(), x)

    with pytest.raises(RuntimeError, match=r"second derivative.*rms_norm_ref") as caught:
        twice()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_x(small, path, dtype):
    case, i = small(dtype=dtype)
    want = through_autograd(case, i)
    with torch.autocast(path.device, dtype=torch.bfloat16):
        got = through_autograd(case, i)
        y = gatednorm.rms_norm_gated(i.x, i.weight, None, i.z, **case.options)
    assert y.dtype == dtype
    for name in want:
        assert same_bits(got[name], want[name]), name


def test_gradient_of_a_sum(small):
    """The gradient that `sum()` hands in is one number, expanded."""
    case, i = small(False, bias=True)
    leaves = leaves_of(i)
    gatednorm.layernorm_fn(*leaves, **case.options).sum().backward()
    i.dy.fill_(1.0)
    want = gradients(lambda *t: gatednorm.layernorm_fn(*t, **case.options), i)[1:]
    for leaf, grad in zip(leaves, want, strict=True):
        assert same_bits(leaf.grad, grad)


def test_gradient_that_no_kernel_can_address(path):
    """Strides that do not merge into three outer dimensions, chosen by autograd, not the user."""
    i = inputs_of(Case((2, 3, 2, 3), 8, 1), path.device)
    leaves = [t.detach().requires_grad_() for t in (i.x, i.z)]
    y = gatednorm.rmsnorm_fn(leaves[0], z=leaves[1])
    dy = i.dy.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4)
    got = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(y, leaves, i.dy), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("wanted", ["x", "w", "b", "z"])
def test_one_gradient_alone(small, wanted):
    """Frozen parameters, a gate without a gradient: the others are as they would be."""
    case, i = small(False, bias=True)
    everything = through_autograd(case, i)
    given = {"x": i.x, "w": i.weight, "b": i.bias, "z": i.z}
    given = {k: t.detach() for k, t in given.items()}
    given[wanted].requires_grad_()
    y = gatednorm.layernorm_fn(*given.values(), **case.options)
    (grad,) = torch.autograd.grad(y, given[wanted], i.dy)
    assert same_bits(grad, everything[f"d{wanted}"])


# ---- memory ----


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), OPTIONS)
def test_what_is_kept_for_the_backward(path, is_rms_norm, norm_before_gate, gated, weight):
    """The inputs themselves, and one fp32 number (layer norm: two) per row and group."""
    case = Case((64,), 32, 4, is_rms_norm, norm_before_gate, gated, weight=weight, bias=True,
                dtype=torch.float16)  # fmt: skip
    i = inputs_of(case, path.device)
    given = [t for t in leaves_of(i) if t is not None]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gatednorm.layernorm_fn(*leaves_of(i), is_rms_norm=is_rms_norm, **case.options)
    mine = {t.untyped_storage().data_ptr() for t in given}
    extra = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in mine)
    assert extra == 64 * 4 * 4 * (1 if is_rms_norm else 2)
    assert y.data_ptr() not in kept


def test_inference_keeps_nothing(path):
    """No graph, no statistics: afterwards the result is the only new tensor."""
    case = Case((64,), 32, 4, False, bias=True)
    i = inputs_of(case, path.device)
    given = (i.x, i.weight, i.bias, i.z)
    gatednorm.rms_norm_gated(*given, is_rms_norm=False, **case.options)
    gc.collect()
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved"), lambda t: t):
        y = gatednorm.rms_norm_gated(*given, is_rms_norm=False, **case.options)
    gc.collect()
    new = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    assert y.grad_fn is None
    assert [t.data_ptr() for t in new] == [y.data_ptr()]


# ---- tensors that hold nothing ----


def test_fake_and_meta_tensors():
    for is_rms_norm in (True, False):
        x = torch.empty(3, 5, 16, device="meta", dtype=torch.float16)
        y = gatednorm.layernorm_fn(x, z=x, is_rms_norm=is_rms_norm, out_dtype=torch.float32)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "meta")
        assert gatednorm.rms_norm_gated(x, z=x).shape == x.shape
        with FakeTensorMode():
            x = torch.empty(3, 5, 16, requires_grad=True)
            gatednorm.layernorm_fn(x, z=x, is_rms_norm=is_rms_norm).sum().backward()
            assert x.grad.shape == x.shape


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, gatednorm
x, z = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
norm = gatednorm.RMSNorm(8)
norm(x, z).sum().backward()
norm.path = "inference"
with torch.no_grad():
    norm(x, z)
assert not any(name.startswith("triton.") for name in sys.modules), "triton was imported"
print("fine", x.grad.shape == x.shape)
"""


def test_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["fine", "True"], done.stderr

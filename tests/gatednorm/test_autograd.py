"""Under autograd: what is saved, what hooks may bring back, which derivatives there are."""

import contextlib
import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gatednorm
from gatednorm import autograd
from norm_calls import GATES, gradients, leaves_of
from norm_cases import Case, Layout, inputs_of, same_bits, through_autograd


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


def test_a_tensor_that_outlived_its_transform(small):
    """One kept from inside torch.func.grad is an ordinary tensor once that has ended."""
    case, i = small()
    kept = []
    torch.func.grad(lambda x: (kept.append(x * 1), x.sum())[1])(i.x)
    w = i.weight.detach().requires_grad_()
    y = gatednorm.rmsnorm_fn(kept[0], w, None, i.z, **case.options)
    want = gatednorm.rmsnorm_fn(i.x, w, None, i.z, **case.options)
    assert same_bits(y.detach(), want.detach())
    for got, expected in zip(*(torch.autograd.grad(t, w, i.dy) for t in (y, want)), strict=True):
        assert same_bits(got, expected)


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
    with pytest.raises(RuntimeError, match=r"torch\.func.*gated_norm_ref") as caught:
        calls[transform]()
    assert "\n" not in str(caught.value)


FUNCTIONS = [gatednorm.rmsnorm_fn, gatednorm.rms_norm_gated, gatednorm.layernorm_forward]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_forward_mode_is_refused(small, function):
    """Also where no graph is recorded, which would drop the tangent."""
    _case, i = small()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        function(i.x)
        x = torch.autograd.forward_ad.make_dual(i.x, i.x)
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*gated_norm_ref"):
            function(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("by", ["is_grads_batched", "vmap"])
def test_batched_gradients(small, by):
    """What a vectorised Jacobian asks for, row by row the gradients of a loop."""
    case, i = small()
    given = [t.requires_grad_() for t in (i.x, i.weight, i.z)]
    y = gatednorm.rmsnorm_fn(i.x, i.weight, None, i.z, **case.options)
    dys = torch.stack([i.dy, -2 * i.dy, i.dy.flip(0)])
    if by == "vmap":
        batched = torch.func.vmap(lambda dy: torch.autograd.grad(y, given, dy, retain_graph=True))(
            dys
        )
    else:
        batched = torch.autograd.grad(y, given, dys, is_grads_batched=True, retain_graph=True)
    for n, dy in enumerate(dys):
        single = torch.autograd.grad(y, given, dy, retain_graph=True)
        for got, want in zip(batched, single, strict=True):
            assert same_bits(got[n], want)


BROUGHT_BACK = {
    "transposed": ("x", r"strides \(1, 6\)", lambda t: t.mT.contiguous().mT),
    "expanded": ("weight", r"strides \(0,\)", lambda t: t[:1].expand(16)),
    "every_other": ("weight", r"strides \(2,\)", lambda t: t.repeat_interleave(2)[::2]),
    "column": ("rstd", r"strides \(2, 1\)", lambda t: t.repeat(1, 2)[:, :1]),
    "fewer_rows": ("x", r"\(3, 16\)", lambda t: t[:3]),
    "half": ("x", "torch.float16 and not as torch.float32", torch.Tensor.half),
    "double": ("x", "torch.float64 and not as torch.float32", torch.Tensor.double),
    "weight_as_half": ("weight", "torch.float16", lambda t: t.half()),
}  # fmt: skip


@pytest.mark.parametrize("case", BROUGHT_BACK)
def test_saved_tensors_that_come_back_as_others(path, case):
    """A kernel would read other elements, or beyond the tensor's end, and say nothing."""
    name, got, change = BROUGHT_BACK[case]
    shape = {"x": (6, 16), "weight": (16,), "rstd": (6, 1)}[name]
    i = inputs_of(Case((6,)), path.device)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: change(t) if t.shape == shape else t
    ):
        y = gatednorm.rmsnorm_fn(i.x.requires_grad_(), i.weight, None, i.z)
    with pytest.raises(RuntimeError, match=f"^hooks of saved tensors must .*{name}.*{got}") as e:
        y.sum().backward()
    assert "\n" not in str(e.value)


def test_a_graph_of_the_gradients_that_passes_by_the_norm(small):
    """create_graph=True alone is no second derivative: of a head's, say."""
    case, i = small()
    x = i.x.requires_grad_()
    head = torch.full((16,), 2.0, device=x.device, requires_grad=True)
    y = gatednorm.rmsnorm_fn(x, i.weight, None, i.z, **case.options)
    plain = torch.autograd.grad(((y * head) ** 2).sum(), [x, head], retain_graph=True)
    dx, dhead = torch.autograd.grad(((y * head) ** 2).sum(), [x, head], create_graph=True)
    assert same_bits(dx, plain[0])
    (second,) = torch.autograd.grad(dhead.sum(), head)
    torch.testing.assert_close(second, 2 * (y * y).sum(0).detach())


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

    with pytest.raises(RuntimeError, match=r"second derivative.*gated_norm_ref") as caught:
        twice()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
def test_autocast_changes_nothing(small, path, norm_before_gate, dtype, inside):
    """The dtype of x stays, forward and backward, with the same bits."""
    case, i = small(False, norm_before_gate, dtype=dtype, bias=True)
    want = through_autograd(case, i)
    with torch.autocast(path.device, dtype=inside):
        got = through_autograd(case, i)
        y = gatednorm.rms_norm_gated(i.x, i.weight, i.bias, i.z, is_rms_norm=False, **case.options)
    for name in want:
        assert same_bits(got[name], want[name]), name
    assert same_bits(y, want["y"])


def test_gradient_of_a_sum(small):
    """The gradient that `sum()` hands in is one number, expanded."""
    case, i = small(False, bias=True)
    leaves = leaves_of(i)
    gatednorm.layernorm_fn(*leaves, **case.options).sum().backward()
    i.dy.fill_(1.0)
    want = gradients(lambda *t: gatednorm.layernorm_fn(*t, **case.options), i)[1:]
    for leaf, grad in zip(leaves, want, strict=True):
        assert same_bits(leaf.grad, grad)


def test_gradient_of_a_sum_over_no_rows(path):
    x = torch.randn(0, 16, device=path.device, requires_grad=True)
    weight = torch.ones(16, device=path.device, requires_grad=True)
    gatednorm.rmsnorm_fn(x, weight).sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


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


@pytest.mark.parametrize("group_size", [32, 640], ids=["one_piece", "two_pieces"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["after", "before"])
def test_gradients_of_frozen_parameters_are_not_computed(
    path, norm_before_gate, group_size, monkeypatch
):
    """The inputs' have the bits that they have beside them."""
    case = Case((5,), group_size, 2, False, norm_before_gate, bias=True)
    i, found = inputs_of(case, path.device), []
    run = autograd.run_backward

    def recorded(*arguments):
        found.append(run(*arguments))
        return found[-1]

    monkeypatch.setattr(autograd, "run_backward", recorded)
    for frozen in (True, False):
        x, weight, bias, z = (t.detach().requires_grad_() for t in leaves_of(i))
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        y = gatednorm.layernorm_fn(x, weight, bias, z, is_rms_norm=False, **case.options)
        y.backward(i.dy)
    (dx, dw, db, dz, _), (*expected, _) = found
    assert (dw, db) == (None, None)
    assert same_bits(dx, expected[0])
    assert same_bits(dz, expected[3])
    assert all(t is not None for t in expected)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated", "weight"), GATES)
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

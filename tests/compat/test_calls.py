"""The calls that the peers' callers make, against float64 and against the operator's own bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gatednorm
from gatednorm.compat import fla, mamba, sglang, vllm
from norm_cases import same_bits

DTYPES = [
    pytest.param(dtype, id=name)
    for dtype, name in (
        (torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float64, "fp64"),
    )
]  # fmt: skip
NORMS = [pytest.param(True, id="rms"), pytest.param(False, id="layer")]


def random(*shape, dtype=torch.float32, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)


def plain(x, g, weight, bias, residual, is_rms_norm, activation, eps=1e-6):
    """`norm(x + residual) * w * act(g)` and the sum, in the dtype that they come in."""
    total = x if residual is None else x + residual
    y = gatednorm.gated_norm_ref(
        total, weight, bias, g, eps, is_rms_norm=is_rms_norm, activation=activation
    )
    return y, total


class Copies(TorchDispatchMode):
    """Counts the operators that copy a tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


# ---- shapes ----


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
def test_a_strided_gate_per_head_beside_flat_rows_is_not_copied(norm_before_gate):
    """SGLang's Qwen models in prefill: x [T*H, D], z a slice [T, H, D] of the projection."""
    tokens, heads, width = 5, 3, 8
    x, w = random(tokens * heads, width), random(width, seed=1)
    z = random(tokens, 2, heads, width, seed=2)[:, 1]
    assert not z.is_contiguous()
    with Copies() as copies, torch.no_grad():
        y = sglang.layernorm_fn(x, w, None, z, norm_before_gate=norm_before_gate, is_rms_norm=True)
    assert copies.seen == []
    assert y.shape == x.shape
    want = gatednorm.rmsnorm_fn(x, w, None, z.reshape(x.shape), norm_before_gate=norm_before_gate)
    assert same_bits(y, want)


def test_the_gate_of_kda_may_lack_the_batch():
    """SGLang's and vLLM's KDA: x [1, N, H, D] and g [N, H, D]."""
    x, g, w = random(1, 4, 2, 8, grad=True), random(4, 2, 8, seed=1), random(8, seed=2)
    y = fla.rms_norm_gated(x, g, w, None, "sigmoid", eps=1e-5)
    assert y.shape == x.shape
    want = gatednorm.rmsnorm_fn(x[0], w, None, g, 1e-5, activation="sigmoid")
    assert same_bits(y[0].detach(), want.detach())
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("call", [fla.layernorm_fn, mamba.layernorm_fn, vllm.layernorm_fn])
def test_what_has_no_unit_stride_is_copied_as_the_peers_do(call):
    x, z, w = random(8, 6).t(), random(8, 6, seed=1).t(), random(8, 2, seed=2)[:, 0]
    want = gatednorm.layernorm_fn(x.contiguous(), w.contiguous(), None, z.contiguous())
    assert same_bits(call(x, w, None, z), want)


def test_many_outer_dimensions_are_copied_where_they_do_not_merge():
    x = random(2, 3, 4, 5, 8).permute(3, 1, 0, 2, 4)
    w = random(8, seed=1)
    assert same_bits(mamba.rmsnorm_fn(x, w, None), gatednorm.rmsnorm_fn(x.contiguous(), w, None))


@pytest.mark.parametrize(
    ("z", "rule"),
    [
        (torch.ones(7, 8), "z must have the shape of x"),
        (torch.ones(12, 4), "z must have the shape of x"),
        ([1.0], "must be a torch.Tensor, got list"),
    ],
    ids=["rows", "width", "list"],
)
@pytest.mark.parametrize("linear", [False, True], ids=["norm", "linear"])
def test_a_gate_that_does_not_fit_is_one_clear_error(z, rule, linear):
    x, w = torch.ones(6, 8), torch.ones(8)
    call = fla.rms_norm_swish_gate_linear if linear else fla.rms_norm_gated
    projection = (torch.ones(4, 8), None) if linear else ()
    with pytest.raises((TypeError, ValueError), match=rule):
        call(x, z, w, None, *projection)


# ---- the two functions called rms_norm_gated, and defaults ----


def test_the_functions_of_one_name_are_told_apart():
    x, z, w = random(4, 8), random(4, 8, seed=1), random(8, seed=2)
    rms = gatednorm.rms_norm_gated(x, w, None, z)
    layer = gatednorm.rms_norm_gated(x, w, None, z, is_rms_norm=False)
    assert same_bits(sglang.rms_norm_gated(x=x, weight=w, bias=None, z=z), layer)
    assert same_bits(sglang.rms_norm_gated(x=x, weight=w, bias=None, z=z, is_rms_norm=True), rms)
    assert same_bits(vllm.rms_norm_gated(x, w, z=z), rms)
    assert same_bits(fla.rms_norm_gated(x, z, w, None), rms)
    with pytest.raises(TypeError):
        sglang.rms_norm_gated(x, w, None, z)


@pytest.mark.parametrize(
    ("module", "norm_before_gate"),
    [
        (fla.RMSNormGated, False), (mamba.RMSNorm, True), (sglang.RMSNorm, True),
        (vllm.RMSNormGated, False),
    ],
    ids=["fla", "mamba", "sglang", "vllm"],
)  # fmt: skip
def test_the_default_order_of_the_gate_is_that_of_the_peer(module, norm_before_gate):
    x, z = random(4, 8), random(4, 8, seed=1)
    want = gatednorm.rmsnorm_fn(x, torch.ones(8), None, z, 1e-5, None, norm_before_gate)
    assert same_bits(module(8)(x, z).detach(), want)


@pytest.mark.parametrize("peer", [fla, mamba, sglang, vllm], ids=lambda p: p.__name__[17:])
def test_the_autograd_function_by_name(peer):
    x, z, w = random(4, 8, grad=True), random(4, 8, seed=1), random(8, seed=2)
    got = peer.LayerNormFn.apply(x, w, None, z, 1e-5, 4, False, True)
    want = gatednorm.rmsnorm_fn(x, w, None, z, 1e-5, 4, False)
    assert same_bits(got.detach(), want.detach())
    assert got.requires_grad


def test_nothing_is_saved_where_gradients_are_off():
    norm, x = mamba.RMSNorm(8), random(4, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            norm(x, x)
        assert saved == []
        norm(x, x)
    assert saved


# ---- residual and projection ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rms_norm", NORMS)
@pytest.mark.parametrize("prenorm", [False, True], ids=["", "prenorm"])
@pytest.mark.parametrize("residual", [None, "same", "fp32"], ids=["", "residual", "residual_fp32"])
@pytest.mark.parametrize("linear", [False, True], ids=["norm", "linear"])
def test_a_residual_and_a_projection_against_float64(dtype, is_rms_norm, prenorm, residual, linear):
    rows, width, features = (2, 5), 16, 12
    kind = {None: dtype, "same": dtype, "fp32": torch.float32}[residual]
    inputs = {
        "x": random(*rows, width, dtype=dtype),
        "g": random(*rows, width, dtype=dtype, seed=1),
        "weight": random(width, seed=2),
        "bias": None if is_rms_norm else random(width, seed=3),
        "residual": None if residual is None else random(*rows, width, dtype=kind, seed=4),
        "linear_weight": random(features, width, dtype=dtype, seed=5) if linear else None,
        "linear_bias": random(features, dtype=dtype, seed=6) if linear else None,
    }
    grads = [random(*rows, features if linear else width, seed=7), random(*rows, width, seed=8)]

    def run(function, to):
        leaves = {
            name: None if t is None else t.to(to(t)).requires_grad_() for name, t in inputs.items()
        }
        results = function(**leaves)[: 1 + prenorm]
        given = {name: t for name, t in leaves.items() if t is not None}
        dy = [grad.to(r.dtype) for grad, r in zip(grads, results, strict=False)]
        got = torch.autograd.grad(results, list(given.values()), dy)
        return [r.detach() for r in results], dict(zip(given, got, strict=True))

    def ours(x, g, weight, bias, residual, linear_weight, linear_bias):
        if linear:
            call = (
                fla.rms_norm_swish_gate_linear if is_rms_norm else fla.layer_norm_swish_gate_linear
            )
            result = call(x, g, weight, bias, linear_weight, linear_bias, residual, prenorm)
        else:
            call = fla.rms_norm_gated if is_rms_norm else fla.layer_norm_gated
            result = call(x, g, weight, bias, "swish", residual, prenorm)
        return result if prenorm else (result,)

    def truth(x, g, weight, bias, residual, linear_weight, linear_bias):
        y, total = plain(x, g, weight, bias, residual, is_rms_norm, "silu")
        if linear:
            y = torch.nn.functional.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
        return y.to(x.dtype), total

    got, got_grads = run(ours, lambda t: t.dtype)
    want, want_grads = run(truth, lambda t: torch.float64)
    theirs, their_grads = run(truth, lambda t: t.dtype)  # plain PyTorch in the same dtypes
    named = [
        *((f"result {i}", *r) for i, r in enumerate(zip(got, want, theirs, strict=True))),
        *((name, got_grads[name], want_grads[name], their_grads[name]) for name in got_grads),
    ]
    assert got[0].dtype == dtype
    for name, mine, exact, other in named:
        if name in inputs:
            assert mine.dtype == inputs[name].dtype, name
        error = (mine.double() - exact).abs().max()
        allowed = (other.double() - exact).abs().max()
        ulp = exact.abs().max() * torch.finfo(mine.dtype).eps
        assert error <= 2 * allowed + ulp, (name, error, allowed)


def test_the_sum_is_normalised_before_it_is_rounded():
    x, residual = (
        random(64, 256, dtype=torch.bfloat16),
        random(64, 256, dtype=torch.bfloat16, seed=1),
    )
    g, w = random(64, 256, dtype=torch.bfloat16, seed=2), torch.ones(256)
    y, total = fla.rms_norm_gated(x, g, w, None, residual=residual, prenorm=True)
    exact = x.float() + residual.float()
    assert same_bits(total, exact.bfloat16())
    assert same_bits(y, gatednorm.rmsnorm_fn(exact, w, None, g, out_dtype=torch.bfloat16))
    assert not same_bits(y, gatednorm.rmsnorm_fn(total, w, None, g))


def test_without_a_residual_prenorm_returns_x():
    x, w = random(4, 8, dtype=torch.bfloat16), torch.ones(8)
    for in_fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        y, total = fla.rms_norm_gated(x, x, w, None, prenorm=True, residual_in_fp32=in_fp32)
        assert total.dtype == dtype
        assert same_bits(total, x.to(dtype))
        assert y.dtype == x.dtype


def test_a_residual_of_another_shape_is_refused():
    x, w = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match="residual must have the shape of x, got"):
        fla.rms_norm_gated(x, x, w, None, residual=torch.ones(1, 8))


def test_the_projection_needs_its_weight():
    x = torch.ones(4, 8)
    with pytest.raises(TypeError, match="linear_weight must be a"):
        fla.FusedRMSNormGatedLinear(8)(x, x)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_projection_keeps_x_and_the_gate_and_no_output_of_the_norm(autocast):
    x, g, linear = random(4, 8, grad=True), random(4, 8, seed=1), random(6, 8, seed=2, grad=True)
    norm, saved = fla.FusedRMSNormGatedLinear(8), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x, g, linear)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    wide = [t for t in saved if t.shape == x.shape]
    assert len(wide) == 2
    assert {t.data_ptr() for t in wide} == {x.data_ptr(), g.data_ptr()}
    y.sum().backward()
    assert linear.grad.dtype == torch.float32
    grad = torch.autograd.grad(norm(x, g, linear).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


# ---- the pair without autograd ----


@pytest.mark.parametrize("is_rms_norm", NORMS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
def test_the_private_pair_of_mamba(is_rms_norm, groups, norm_before_gate):
    rows, width = 5, 12
    x, w, dy = random(rows, width), random(width, seed=1), random(rows, width, seed=2)
    bias = None if is_rms_norm else random(width, seed=3)
    packed = random(rows, 2 * width, seed=4)
    z, size = packed[:, width:], width // groups
    options = {"group_size": size, "norm_before_gate": norm_before_gate, "is_rms_norm": is_rms_norm}
    out = torch.full((rows, width), float("nan"))
    y, mean, rstd = mamba._layer_norm_fwd(x, w, bias, 1e-5, z, out=out, **options)
    assert y is out
    u = (x if norm_before_gate else x * torch.nn.functional.silu(z)).double()
    u = u.view(rows, groups, size).transpose(0, 1)  # group after group
    if is_rms_norm:
        assert mean is None
    else:
        torch.testing.assert_close(mean.double(), u.mean(-1).reshape(-1), atol=1e-6, rtol=1e-6)
    centred = u if is_rms_norm else u - u.mean(-1, keepdim=True)
    want = (centred.square().mean(-1) + 1e-5).rsqrt().reshape(-1)
    torch.testing.assert_close(rstd.double(), want, atol=1e-6, rtol=1e-6)

    gradient = torch.full_like(packed, float("nan"))
    dx, dw, db, dz, again = mamba._layer_norm_bwd(
        dy, x, w, bias, 1e-5, mean, rstd, z, recompute_output=True, dz=gradient[:, width:],
        out=torch.empty_like(y), **options,
    )  # fmt: skip
    assert same_bits(again, y)
    assert dz.data_ptr() == gradient[:, width:].data_ptr()
    assert gradient[:, :width].isnan().all()
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, bias, z)]
    result = gatednorm.layernorm_fn(*leaves, eps=1e-5, **options)
    assert same_bits(y, result.detach())
    grads = torch.autograd.grad(result, [t for t in leaves if t is not None], dy)
    for got, want in zip([t for t in (dx, dw, db, dz) if t is not None], grads, strict=True):
        assert same_bits(got, want)
    assert len(mamba._layer_norm_bwd(dy, x, w, bias, 1e-5, mean, rstd, z, **options)) == 4

    act = {"activation": "sigmoid", **options}
    _, mean, rstd = mamba._layer_norm_fwd(x, w, bias, 1e-5, z, **act)
    dx, *_ = mamba._layer_norm_bwd(dy, x, w, bias, 1e-5, mean, rstd, z, **act)
    result = gatednorm.layernorm_fn(*leaves, eps=1e-5, **act)
    assert same_bits(dx, torch.autograd.grad(result, leaves[0], dy)[0])


def test_the_forward_of_vllm_writes_over_its_input():
    x, z, w = random(4, 8), random(4, 8, seed=1), random(8, seed=2)
    want = gatednorm.rmsnorm_fn(x, w, None, z, activation="sigmoid")
    y, _, _ = vllm.layer_norm_fwd(
        x, w, None, 1e-6, z, out=x, is_rms_norm=True, activation="sigmoid"
    )
    assert y is x
    assert same_bits(x, want)


# ---- torch.compile ----


def test_every_door_compiles_into_one_graph():
    x, z, w = random(2, 3, 8, grad=True), random(2, 3, 8, seed=1), random(8, seed=2, grad=True)
    linear = random(6, 8, seed=3, grad=True)
    norms = torch.nn.ModuleList([fla.FusedRMSNormGated(8), mamba.RMSNorm(8, group_size=4)])

    def step(x, z, w, linear):
        y = fla.rms_norm_gated(x, z, w, None, "sigmoid", residual=z, prenorm=True)[1]
        for norm in norms:
            y = norm(y, z)
        y = sglang.layernorm_fn(y.view(6, 8), w, None, z, is_rms_norm=True).view(x.shape)
        y = vllm.rms_norm_gated(y, w, None, z)
        return fla.rms_norm_swish_gate_linear(y, z, w, None, linear, None)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        y = function(x, z, w, linear)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, w, linear))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)

"""What is saved, and which launcher runs: LayerNormFn and the torch.library registration.

Eager calls go from LayerNormFn straight to a launcher. Everything that traces (torch.compile,
torch.export, fake and meta tensors, tensor subclasses) sees the registered operators
`gatednorm::forward`, `gatednorm::backward` and `gatednorm::forward_out`, whose implementations run
the same launchers.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # autograd must know of what a kernel writes

from .problem import DEVICES, Problem, check_backward, describe, rows_of

SAVED = ("x", "weight", "bias", "z", "mean", "rstd")
PLAIN_TENSORS = (Tensor, torch.nn.Parameter, type(None))


@functools.cache
def backend(device_type: str) -> ModuleType:
    """The module whose `forward` and `backward` run on this device; triton is imported late."""
    try:
        return importlib.import_module(
            ".cpu" if device_type == "cpu" else ".launch", package=__package__
        )
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"tensors on a {device_type} device need the package triton, got none that can be "
            f"imported ({error}); pip install triton, or move them with .cpu()"
        ) from error


def traced(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call must go through the registered operators instead of a launcher: for tensors
    that are no memory of their own, and where somebody watches the operators."""
    for t in (x, *others):
        if type(t) not in PLAIN_TENSORS and isinstance(t, Tensor):
            return True
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._is_tracing():  # torch.jit.trace
        return True
    return isinstance(x, Tensor) and x.is_meta


def run_forward(
    p: Problem, x: Tensor, weight, bias, z, out: Tensor | None, save_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Allocate what is missing and launch; returns `y`, `mean`, `rstd` (None where not kept)."""
    if out is None:
        out = torch.empty_like(x, dtype=p.out_dtype, memory_format=torch.contiguous_format)
    else:
        increment_version(out)
    mean = rstd = None
    if save_stats:
        stats = (p.n_rows, p.n_groups)
        rstd = torch.empty(stats, dtype=p.compute_dtype, device=x.device)
        if not p.is_rms_norm:
            mean = torch.empty_like(rstd)
    if p.n_rows:
        backend(x.device.type).forward(p, x, z, weight, bias, out, mean, rstd)
    return out, mean, rstd


def run_backward(
    p: Problem, dy: Tensor, x: Tensor, weight, bias, z, mean, rstd: Tensor, dx=None, dz=None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward; returns `dx`, `dw`, `db`, `dz` (None where there is no such input)."""
    for given in (dx, dz):
        if given is not None:
            increment_version(given)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dz is None and z is not None:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    if p.n_rows == 0:
        return (
            dx,
            None if weight is None else torch.zeros_like(weight),
            None if bias is None else torch.zeros_like(bias),
            dz,
        )
    dw, db = backend(x.device.type).backward(p, dy, x, z, weight, bias, mean, rstd, dx, dz)
    return dx, dw, db, dz


def _addressable(p: Problem, dy: Tensor, x: Tensor, z: Tensor | None) -> Tensor:
    """The gradient itself, or a copy where autograd hands in one that no kernel can address.

    The one place where something is copied: the gradient of `sum()` is an expanded scalar without
    unit stride. The user did not choose its strides and could not be asked to change them.
    """
    if dy.is_contiguous():
        return dy
    dense = dy.stride(-1) == 1 or p.width == 1
    if dense:
        try:
            rows_of(p.shape, *(t.stride() for t in (dy, x, z) if t is not None), _dense(p.shape))
        except ValueError:
            dense = False
    return dy if dense else dy.contiguous()


def _check_saved(p: Problem, *saved: Tensor | None) -> None:
    """Hooks of saved tensors may bring back anything; a kernel is compiled for what was saved.

    Other strides are fine where rows stay rows: offloading brings back a slice dense.
    """
    device = p.device
    for name, t, (shape, dtype) in zip(SAVED, saved, p.saved, strict=True):
        if t is None:
            continue
        if t.dtype != dtype or t.device != device or t.shape != shape:
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}"
        elif t.is_contiguous() or (name in ("x", "z") and 1 in (t.stride(-1), p.width)):
            continue
        else:
            got = f"one with strides {t.stride()}"
        raise RuntimeError(
            f"{name} was saved for the backward as {dtype} {tuple(shape)} on {device}, and a hook "
            f"of saved tensors brought it back as {got}; have it bring back the same"
        )


@functools.lru_cache(maxsize=4096)
def _dense(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides)


class LayerNormFn(torch.autograd.Function):
    """The gated norm under autograd.

    `LayerNormFn.apply(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm,
    activation, zero_centered, numerics, out_dtype)`; shapes and options as in
    :func:`gatednorm.layernorm_fn`. Kept for the backward: `x`, `z`, the parameters and one
    `rstd` (for layer norm also `mean`) per row and group, in fp32 (fp64 for fp64).
    """

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        z=None,
        eps=1e-6,
        group_size=None,
        norm_before_gate=True,
        is_rms_norm=False,
        activation="silu",
        zero_centered=False,
        numerics="fp32",
        out_dtype=None,
    ):
        options = (
            eps, group_size, norm_before_gate, is_rms_norm,
            activation, zero_centered, numerics, out_dtype,
        )  # fmt: skip
        ctx.options = options
        if traced(x, weight, bias, z):
            y, mean, rstd = torch.ops.gatednorm.forward(x, weight, bias, z, *options)
            ctx.problem = None
        else:
            p = describe(x, weight, bias, z, None, *options)
            y, mean, rstd = run_forward(p, x, weight, bias, z, None, save_stats=True)
            ctx.problem = p
        ctx.save_for_backward(x, weight, bias, z, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, z, mean, rstd = ctx.saved_tensors
        # Batched gradients (is_grads_batched, vmap) have no memory of their own either. Where the
        # gradients get a graph too (create_graph), the operator refuses a second derivative later.
        if (
            ctx.problem is None
            or torch.is_grad_enabled()
            or traced(dy, x, weight, bias, z)
            or torch._C._functorch.is_legacy_batchedtensor(dy)
            or torch._C._functorch.is_functorch_wrapped_tensor(dy)
        ):
            grads = _backward_op(dy, x, weight, bias, z, mean, rstd, ctx.options)
        else:
            _check_saved(ctx.problem, x, weight, bias, z, mean, rstd)
            dy = _addressable(ctx.problem, dy, x, z)
            grads = run_backward(ctx.problem, dy, x, weight, bias, z, mean, rstd)
        return *grads, *(None,) * len(ctx.options)


# ---- torch.library ----

_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? z"
_OPTIONS = (
    "float eps, int? group_size, bool norm_before_gate, bool is_rms_norm, "
    "str activation, bool zero_centered, str numerics, ScalarType? out_dtype"
)
_library = torch.library.Library("gatednorm", "DEF")
_library.define(f"forward({_INPUTS}, {_OPTIONS}) -> (Tensor y, Tensor mean, Tensor rstd)")
_library.define(f"forward_out({_INPUTS}, Tensor(a!) out, {_OPTIONS}) -> ()")
_library.define(
    f"backward(Tensor dy, {_INPUTS}, Tensor mean, Tensor rstd, {_OPTIONS}) "
    "-> (Tensor dx, Tensor dw, Tensor db, Tensor dz)"
)


def _none_to_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an absent one becomes a tensor of no elements."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _forward_impl(x, weight, bias, z, *options):
    p = describe(x, weight, bias, z, None, *options)
    return _none_to_empty(x, *run_forward(p, x, weight, bias, z, None, save_stats=True))


def _forward_out_impl(x, weight, bias, z, out, *options):
    p = describe(x, weight, bias, z, out, *options)
    run_forward(p, x, weight, bias, z, out, save_stats=False)


def _backward_impl(dy, x, weight, bias, z, mean, rstd, *options):
    p = describe(x, weight, bias, z, None, *options)
    mean = None if p.is_rms_norm else mean
    dy = _addressable(p, dy, x, z)
    check_backward(p, dy, x, weight, bias, z, mean, rstd, None, None)
    grads = run_backward(p, dy, x, weight, bias, z, mean, rstd)
    return _none_to_empty(x, *grads)


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_shapes(x, weight, bias, z, out, group_size) -> None:
    """The rules of `describe` for sizes that may be symbols."""
    torch._check(x.dim() > 0, lambda: "x must have at least one dimension")
    width = x.shape[-1]
    for name, t in (("z", z), ("out", out)):
        if t is None:
            continue
        rule = f"{name} must have the shape of x, {tuple(x.shape)}"
        torch._check(t.dim() == x.dim(), lambda rule=rule: rule)
        for mine, theirs in zip(t.shape, x.shape, strict=True):
            torch._check(mine == theirs, lambda rule=rule: rule)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            torch._check(t.dim() == 1, lambda name=name: f"{name} must be [D]")
            torch._check(t.shape[0] == width, lambda name=name: f"{name} must be [{width}]")
    torch._check(width % (group_size or 1) == 0, lambda: f"group_size must divide {width}")


def _forward_fake(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, *rest):
    _check_shapes(x, weight, bias, z, None, group_size)
    out_dtype, width = rest[-1] or x.dtype, x.shape[-1]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    rstd = x.new_empty((rows, width // (group_size or width)), dtype=_stats_dtype(x))
    mean = x.new_empty(0) if is_rms_norm else torch.empty_like(rstd)
    return x.new_empty(x.shape, dtype=out_dtype), mean, rstd


def _forward_out_fake(x, weight, bias, z, out, eps, group_size, *rest):
    _check_shapes(x, weight, bias, z, out, group_size)


def _backward_fake(dy, x, weight, bias, z, mean, rstd, *options):
    dense = (None if t is None else t.new_empty(t.shape) for t in (x, weight, bias, z))
    return _none_to_empty(x, *dense)


def _setup_context(ctx, inputs, output):
    x, weight, bias, z, *options = inputs
    _, mean, rstd = output
    ctx.options = tuple(options)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, z, mean, rstd)


def _backward_op(dy, x, weight, bias, z, mean, rstd, options):
    if mean is None:
        mean = x.new_empty(0)
    grads = torch.ops.gatednorm.backward(dy, x, weight, bias, z, mean, rstd, *options)
    given = (x, weight, bias, z)
    return tuple(None if t is None else g for t, g in zip(given, grads, strict=True))


def _backward_of_forward(ctx, dy, _dmean, _drstd):
    grads = _backward_op(dy, *ctx.saved_tensors, ctx.options)
    return *grads, *(None,) * len(ctx.options)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "the gated norm has no second derivative, which was asked for by way of create_graph=True; "
        "use gatednorm.gated_norm_ref, which PyTorch differentiates at will"
    )


for _name, _impl in (
    ("forward", _forward_impl), ("forward_out", _forward_out_impl), ("backward", _backward_impl),
):  # fmt: skip
    for _device in DEVICES:
        _library.impl(_name, _impl, _device.upper())
torch.library.register_fake("gatednorm::forward", _forward_fake, lib=_library)
torch.library.register_fake("gatednorm::forward_out", _forward_out_fake, lib=_library)
torch.library.register_fake("gatednorm::backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "gatednorm::forward", _backward_of_forward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("gatednorm::backward", _refuse_second_derivative, lib=_library)

"""A call of the norm, and LayerNormFn: one way to save, one backward, two ways in.

Everything that traces sees the operators of operators.py. Eager code with plain tensors calls what
they call: an operator called from Python, and the autograd that PyTorch wraps around it, would make
a forward plus backward take half as long again (benchmarks/NOTES.md).
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # autograd must know of what a kernel writes

from . import distributed
from .call import (
    check_tensors,
    dense_strides,
    describe,
    describe_backward,
    rows_of,
)
from .options import Options, make_options

Maybe = Tensor | None
PLAIN_TENSORS = (Tensor, torch.nn.Parameter, type(None))
# `gatednorm`; another in a copy of the package that a kernel hub imports under a name of its own:
# PyTorch takes each operator once.
NAMESPACE = __package__.replace(".", "_")
ops = getattr(torch.ops, NAMESPACE)


@functools.cache
def backend(device_type: str) -> ModuleType:
    """The module whose `forward` and `backward` run on this device; triton is imported late."""
    try:
        name = ".cpu" if device_type == "cpu" else ".kernels.launch"
        return importlib.import_module(name, package=__package__)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"tensors on a {device_type} device need the package triton, got none that can be "
            f"imported ({error}); pip install triton, or move them with .cpu()"
        ) from error


@functools.cache
def dtensors(kind: type) -> ModuleType | None:
    """The module for DTensors, which has registered the operators' rules, if `kind` is one."""
    if not kind.__module__.startswith("torch.distributed.tensor"):
        return None
    module = importlib.import_module(".dtensor", package=__package__)
    module.register(ops.forward.default, ops.backward.default)
    return module


def _has_rules(kind: type) -> bool:
    return dtensors(kind) is not None


# Whether tensors of a type are DTensors, for which the operators then have their rules: a program
# that is compiled may be the first to have one, and this runs while it is traced.
has_rules: Callable[[type], bool] = torch.compiler.assume_constant_result(_has_rules)


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its operator: for tensors without memory of their own, and
    where operators are recorded."""
    for t in tensors:
        if type(t) not in PLAIN_TENSORS and isinstance(t, Tensor):
            return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    x = tensors[0]
    return torch._C._len_torch_dispatch_stack() > 0 or (isinstance(x, Tensor) and x.is_meta)


def run_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor | None,
    options: Options,
    save_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check, allocate what is missing and launch; returns `y`, `mean`, `rstd` (None where not
    kept)."""
    ranks = None
    if options.process_group is not None:
        ranks, options = distributed.enter(
            "forward", options, x=x, weight=weight, bias=bias, z=z, out=out
        )
    call = describe(x, weight, bias, z, out, options)
    if out is None:
        out = torch.empty_like(x, dtype=call.out_dtype, memory_format=torch.contiguous_format)
    else:
        increment_version(out)
    mean = rstd = None
    if save_stats:
        stats = (x.numel() // call.width, call.n_groups)
        rstd = torch.empty(stats, dtype=call.compute_dtype, device=x.device)
        if not options.is_rms_norm:
            mean = torch.empty_like(rstd)
    if x.numel():
        kernels = backend(x.device.type)
        if ranks is None:
            kernels.forward(call, x, weight, bias, z, out, mean, rstd)
        else:
            distributed.forward(kernels, ranks, call, x, weight, bias, z, out, mean, rstd)
    return out, mean, rstd


def run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor | None,
    dz: Tensor | None,
    options: Options,
    with_output: bool = False,
    parameters: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Check, allocate what is missing and launch; returns `dx`, `dw`, `db`, `dz` (None where there
    is no such input, and for weight and bias without `parameters`), and with a new `dx` the
    forward's `y` again where asked for (else None)."""
    if options.is_rms_norm:
        mean = None  # RMS norm uses none, but callers written for other copies pass one
    ranks = None
    if options.process_group is not None:
        ranks, options = distributed.enter(
            "backward", options, x=x, weight=weight, bias=bias, z=z, dy=dy
        )
    call = describe_backward(dy, x, weight, bias, z, mean, rstd, dx, dz, options)
    for given in (dx, dz):
        if given is not None:
            increment_version(given)
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dz is None and z is not None:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    y = torch.empty_like(dx, dtype=options.out_dtype) if with_output else None
    if x.numel() == 0:
        dw, db = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
    else:
        kernels = backend(x.device.type)
        tensors = (call, dy, x, weight, bias, z, mean, rstd, dx, dz, y, parameters)
        if ranks is None:
            dw, db = kernels.backward(*tensors)
        else:
            dw, db = distributed.backward(kernels, ranks, *tensors)
    return dx, dw, db, dz, y


def by_rows(x: Tensor, mean: Maybe, rstd: Tensor) -> tuple[Maybe, Tensor]:
    """The operator's statistics as the kernels read them, `[rows, groups]`."""
    if rstd.dim() == 2:
        return mean, rstd
    rows = x.shape[:-1].numel()
    if mean is not None:
        mean = mean.reshape(rows, mean.shape[-1]).contiguous()
    return mean, rstd.reshape(rows, rstd.shape[-1]).contiguous()


def addressable(dy: Tensor, x: Tensor, z: Tensor | None) -> Tensor:
    """The gradient itself, or a copy where autograd hands in one that no kernel can address.

    Nothing else is ever copied. The gradient of `sum()`, for example, is an expanded scalar without
    unit stride; the user did not choose its strides and cannot be asked to change them.
    """
    if not dy.numel():  # whose strides, often zeros, mean nothing
        return dy.new_empty(dy.shape)
    if dy.is_contiguous():
        return dy
    if dy.shape == x.shape and 1 in (dy.stride(-1), dy.shape[-1]):
        strides = (dy.stride(), x.stride(), None if z is None else z.stride())
        try:
            rows_of(dy.shape, *strides, dense_strides(dy.shape))
            return dy
        except ValueError:
            pass
    return dy.contiguous()


# For the options and the operator's flag; PyTorch ignores those for what was not given.
NO_GRADIENTS = (None,) * (len(Options()) + 1)
SAVED = ("x", "weight", "bias", "z", "mean", "rstd")
Saved = tuple[Tensor, Maybe, Maybe, Maybe, Maybe, Tensor]
HOOKS = "hooks of saved tensors must bring back what was saved"


class LayerNormFn(torch.autograd.Function):
    """The gated norm under autograd.

    `LayerNormFn.apply(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm,
    activation, zero_centered, numerics, out_dtype, process_group)`; shapes and options as in
    :func:`gatednorm.layernorm_fn`, a process group by its `group_name`. Kept for the backward:
    `x`, `z`, the parameters and one `rstd` (for layer norm also `mean`) per row and group, in fp32
    (fp64 for fp64).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, z: Maybe = None, *options: Any
    ) -> Tensor:
        return save_forward(ctx, x, weight, bias, z, make_options(*Options(*options)))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        return backward_of(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Maybe) -> Tensor:
        raise RuntimeError(
            "the gated norm has no forward-mode derivative, and an input has a tangent; use "
            "gatednorm.gated_norm_ref there, or torch.autograd"
        )


def save_forward(
    ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, options: Options, *others: Maybe
) -> Tensor:
    """The forward's `y`; what :func:`gradients` needs is kept, and `others` after it."""
    y: Tensor
    if needs_operator(x, weight, bias, z):
        check_tensors(x=x, weight=weight, bias=bias, z=z)  # an operator's errors name no remedy
        has_rules(type(x))
        y, mean, rstd = ops.forward(x, weight, bias, z, *options, True)
    else:
        y, mean, rstd = run_forward(x, weight, bias, z, None, options, save_stats=True)
    save_statistics(ctx, (x, weight, bias, z, mean, rstd), options, *others)
    return y


def save_statistics(ctx: Any, saved: Saved, options: Options, *others: Maybe) -> None:
    """Keep what :func:`gradients` needs, and `others` after it."""
    ctx.options, ctx.dtypes = options, [t is not None and t.dtype for t in saved]
    ctx.save_for_backward(*saved, *others)


def gradients(ctx: Any, dy: Tensor, saved: Saved, with_output: bool = False) -> tuple[Maybe, ...]:
    """The gradients of `x, weight, bias, z` from what :func:`save_forward` kept, and the forward's
    `y` again where asked for, else None."""
    for name, t, dtype in zip(SAVED, saved, ctx.dtypes, strict=True):
        if t is not None and t.dtype != dtype:
            raise RuntimeError(f"{HOOKS}, got {name} as {t.dtype} and not as {dtype}")
    if torch.is_grad_enabled() or needs_operator(dy, *saved) or not _has_memory(dy):
        return _backward_op(dy, *saved, *ctx.options, with_output)
    x, weight, bias, z, mean, rstd = saved
    try:
        return run_backward(
            addressable(dy, x, z), x, weight, bias, z, *by_rows(x, mean, rstd), None, None,
            ctx.options, with_output, any(ctx.needs_input_grad[1:3]),
        )  # fmt: skip
    except distributed.RanksDifferError:
        raise
    except (TypeError, ValueError) as error:  # the forward accepted all of it
        raise RuntimeError(f"{HOOKS}, but {error}") from error


def backward_of(ctx: Any, dy: Tensor, *_: Maybe) -> tuple[Maybe, ...]:
    """The gradients of `x, weight, bias, z`, and None for each option."""
    return *gradients(ctx, dy, ctx.saved_tensors)[:4], *NO_GRADIENTS


def _has_memory(t: Tensor) -> bool:
    """Whether a gradient has memory: a batch of them, from a vectorised Jacobian, has none."""
    try:
        t.data_ptr()
    except RuntimeError:
        return False
    return True


def _backward_op(
    dy: Tensor, x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, mean: Maybe, rstd: Tensor,
    *options: Any,
) -> tuple[Maybe, ...]:  # fmt: skip
    """:func:`run_backward` by way of the operator; `options` and then `with_output`. Under
    `create_graph=True` the gradients refuse to be differentiated."""
    if torch.is_grad_enabled():
        saved = (x, weight, bias, z, mean, rstd)
        return tuple(OnceDifferentiable.apply(_backward_op, dy, *saved, *options))
    if mean is None:
        mean = x.new_empty(0)
    *given, process_group, with_output = options
    results = ops.backward(dy, x, weight, bias, z, mean, rstd, *given, with_output, process_group)
    there = (True, weight is not None, bias is not None, z is not None, options[-1])
    return tuple(t if given else None for t, given in zip(results, there, strict=True))


class OnceDifferentiable(torch.autograd.Function):
    """A backward as a function that has no derivative itself: `apply(function, *arguments)`."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., tuple[Maybe, ...]], *arguments: Any
    ) -> tuple[Maybe, ...]:
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        raise RuntimeError(
            "the gated norm has no second derivative, which was asked for by way of "
            "create_graph=True; use gatednorm.gated_norm_ref, which PyTorch differentiates at will"
        )

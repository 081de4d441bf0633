"""LayerNormFn and the registered operators: one way to save, one backward, two ways in.

`gatednorm::forward`, `gatednorm::backward` and `gatednorm::forward_out` are what everything that
traces sees (torch.compile, torch.export, fake and meta tensors, tensor subclasses). Eager code with
plain tensors calls what they call: an operator called from Python, and the autograd that PyTorch
wraps around it, would make a forward plus backward take half as long again (benchmarks/NOTES.md).
"""

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # autograd must know of what a kernel writes

from . import distributed
from .call import (
    DEVICES,
    check_tensors,
    dense_strides,
    describe,
    describe_backward,
    rows_of,
)
from .options import DTYPES, Options, make_options

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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Check, allocate what is missing and launch; returns `dx`, `dw`, `db`, `dz` (None where there
    is no such input), and with a new `dx` the forward's `y` again where asked for (else None)."""
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
        tensors = (call, dy, x, weight, bias, z, mean, rstd, dx, dz, y)
        if ranks is None:
            dw, db = kernels.backward(*tensors)
        else:
            dw, db = distributed.backward(kernels, ranks, *tensors)
    return dx, dw, db, dz, y


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
        return _backward(ctx, dy)

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
            _addressable(dy, x, z), x, weight, bias, z, *_by_rows(x, mean, rstd), None, None,
            ctx.options, with_output,
        )  # fmt: skip
    except (TypeError, ValueError) as error:  # the forward accepted all of it
        raise RuntimeError(f"{HOOKS}, but {error}") from error


def _backward(ctx: Any, dy: Tensor, *_: Maybe) -> tuple[Maybe, ...]:
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


# ---- torch.library ----

_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? z"
_OPTIONS = (
    "float eps, int? group_size, bool norm_before_gate, bool is_rms_norm, "
    "str activation, bool zero_centered, str numerics, ScalarType? out_dtype"
)
# What torch.compile has kept on a disk calls these after an upgrade too, since PyTorch looks at the
# graph it was given and not at what a backward has become: a new argument comes last and has a
# default, a new result comes last.
_library = torch.library.Library(NAMESPACE, "DEF")
_GROUP = "str? process_group=None"
_library.define(
    # Statistics are [*outer, groups], as DTensors need them; [rows, groups] where it is False.
    f"forward({_INPUTS}, {_OPTIONS}, {_GROUP}, bool outer_stats=False) -> "
    "(Tensor y, Tensor mean, Tensor rstd)"
)
_library.define(f"forward_out({_INPUTS}, Tensor(a!) out, {_OPTIONS}, {_GROUP}) -> ()")
_library.define(
    f"backward(Tensor dy, {_INPUTS}, Tensor mean, Tensor rstd, {_OPTIONS}, "
    f"bool with_output=False, {_GROUP}) -> (Tensor dx, Tensor dw, Tensor db, Tensor dz, Tensor y)"
)


def none_to_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an absent one becomes a tensor of no elements."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _forward_impl(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, *values: Any
) -> tuple[Tensor, ...]:
    options, outer_stats = _split(len(Options()), *values)
    y, *stats = run_forward(x, weight, bias, z, None, make_options(*options), save_stats=True)
    if outer_stats:
        stats = [None if t is None else t.view(*x.shape[:-1], t.shape[-1]) for t in stats]
    return none_to_empty(x, y, *stats)


def _forward_out_impl(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, out: Tensor, *options: Any
) -> None:
    run_forward(x, weight, bias, z, out, make_options(*options), save_stats=False)


def _backward_impl(
    dy: Tensor, x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, mean: Tensor, rstd: Tensor,
    *values: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options, with_output = _split(len(Options()) - 1, *values)
    dy = _addressable(dy, x, z)
    results = run_backward(
        dy, x, weight, bias, z, *_by_rows(x, mean, rstd), None, None, make_options(*options),
        with_output,
    )  # fmt: skip
    return none_to_empty(x, *results)


def _split(at: int, *values: Any) -> tuple[tuple[Any, ...], bool]:
    """The options, and the flag that stands among them in that place; PyTorch leaves out at the end
    what has its default."""
    values += (None,) * (len(Options()) + 1 - len(values))
    return values[:at] + values[at + 1 :], bool(values[at])


def _by_rows(x: Tensor, mean: Maybe, rstd: Tensor) -> tuple[Maybe, Tensor]:
    """The operator's statistics as the kernels read them, `[rows, groups]`."""
    if rstd.dim() == 2:
        return mean, rstd
    rows = x.shape[:-1].numel()
    if mean is not None:
        mean = mean.reshape(rows, mean.shape[-1]).contiguous()
    return mean, rstd.reshape(rows, rstd.shape[-1]).contiguous()


def _addressable(dy: Tensor, x: Tensor, z: Tensor | None) -> Tensor:
    """The gradient itself, or a copy where autograd hands in one that no kernel can address.

    Nothing else is ever copied. The gradient of `sum()`, for example, is an expanded scalar without
    unit stride; the user did not choose its strides and cannot be asked to change them.
    """
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


def check_shapes(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, out: Maybe, options: Options
) -> None:
    """The rules of `describe` for devices, and for sizes that may be symbols. Whether groups fit a
    process group is left to the call itself."""
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
    torch._check(width > 0, lambda: "x must have at least one channel in its last dimension")
    group_size = None if options.process_group else options.group_size
    fits = group_size is None or (group_size > 0 and width % group_size == 0)
    torch._check(fits, lambda: f"group_size must divide {width}, got {group_size}")
    given = {"x": x, "z": z, "out": out, "weight": weight, "bias": bias}
    for name, t in given.items():
        if t is None:
            continue
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(
                f"{name} must be on the device of x, got {t.device} and {x.device}; "
                f"move it with {name}.to('{x.device}')"
            )


def _forward_fake(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given, outer_stats = _split(len(Options()), *values)
    options = Options(*given)
    check_shapes(x, weight, bias, z, None, options)
    outer, width = tuple(x.shape[:-1]), x.shape[-1]
    stats_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if options.process_group is None:
        groups = width // (options.group_size or width)
    else:
        groups = distributed.local_groups(options, width)
    shape = (*outer, groups) if outer_stats else (math.prod(outer), groups)
    rstd = x.new_empty(shape, dtype=stats_dtype)
    mean = x.new_empty(0) if options.is_rms_norm else torch.empty_like(rstd)
    return x.new_empty(x.shape, dtype=options.out_dtype or x.dtype), mean, rstd


def _forward_out_fake(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, out: Tensor, *options: Any
) -> None:
    check_shapes(x, weight, bias, z, out, Options(*options))


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, mean: Tensor, rstd: Tensor,
    *values: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options, with_output = _split(len(Options()) - 1, *values)
    dense = (None if t is None else t.new_empty(t.shape) for t in (x, weight, bias, z))
    dtype = Options(*options).out_dtype or x.dtype
    return none_to_empty(x, *dense, x.new_empty(x.shape, dtype=dtype) if with_output else None)


for _name, _impl, _fake in (
    ("forward", _forward_impl, _forward_fake),
    ("forward_out", _forward_out_impl, _forward_out_fake),
    ("backward", _backward_impl, _backward_fake),
):
    for _device in DEVICES:
        _library.impl(_name, _impl, _device.upper())
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    options, _ = _split(len(Options()), *inputs[4:])
    save_statistics(ctx, (*inputs[:4], *output[1:]), Options(*options))


torch.library.register_autograd(
    f"{NAMESPACE}::forward", _backward, setup_context=_save_op, lib=_library
)

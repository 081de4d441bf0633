"""The operators `gatednorm::forward`, `gatednorm::forward_out` and `gatednorm::backward`, which
everything that traces sees: torch.compile, torch.export, fake and meta tensors, tensor subclasses.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .autograd import (
    NAMESPACE,
    Maybe,
    addressable,
    backward_of,
    by_rows,
    run_backward,
    run_forward,
    save_statistics,
)
from .call import DEVICES
from .options import DTYPES, Options, make_options

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
    dy = addressable(dy, x, z)
    results = run_backward(
        dy, x, weight, bias, z, *by_rows(x, mean, rstd), None, None, make_options(*options),
        with_output,
    )  # fmt: skip
    return none_to_empty(x, *results)


def _split(at: int, *values: Any) -> tuple[tuple[Any, ...], bool]:
    """The options, and the flag that stands among them in that place; PyTorch leaves out at the end
    what has its default."""
    values += (None,) * (len(Options()) + 1 - len(values))
    return values[:at] + values[at + 1 :], bool(values[at])


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


def implement(
    library: torch.library.Library, *operators: tuple[str, Callable[..., Any], Callable[..., Any]]
) -> None:
    """Give operators of a library, by name, what they run and what they run on fake tensors."""
    for name, run, fake in operators:
        for device in DEVICES:
            library.impl(name, run, device.upper())
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


implement(
    _library,
    ("forward", _forward_impl, _forward_fake),
    ("forward_out", _forward_out_impl, _forward_out_fake),
    ("backward", _backward_impl, _backward_fake),
)


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    options, _ = _split(len(Options()), *inputs[4:])
    save_statistics(ctx, (*inputs[:4], *output[1:]), Options(*options))


torch.library.register_autograd(
    f"{NAMESPACE}::forward", backward_of, setup_context=_save_op, lib=_library
)

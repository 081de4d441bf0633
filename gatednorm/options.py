"""The options of a call as one object, made and checked once."""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch

ACTIVATIONS = ("silu", "swish", "sigmoid")
# What a family of models rounds to besides the store, after the norm and after the weight: not at
# all, the dtype of x, or the wider one of x and weight. See `numerics` in functional.py.
ROUNDING = {
    "fp32": (None, None),
    "mamba2": ("x", None),
    "qwen3_next": ("x", "wider"),
    "torchtitan": (None, "x"),
}
BLOCKS = {"1x128": 128, "mxfp8": 32, "nvfp4": 16}  # columns that share a scale
GIVEN = ("tensorwise", "nvfp4")  # scalings of FP8 with a given scale
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Options(NamedTuple):
    """What :func:`gatednorm.layernorm_fn` explains, in the order that the operators take it; a
    process group by its name."""

    eps: float = 1e-6
    group_size: int | None = None
    norm_before_gate: bool = True
    is_rms_norm: bool = False
    activation: str = "silu"
    zero_centered: bool = False
    numerics: str = "fp32"
    out_dtype: torch.dtype | None = None
    process_group: str | None = None


def make_options(*values: Any) -> Options:
    """The checked options of these values, in the order of the fields of :class:`Options`; what was
    checked once is remembered.

    Raises:
        ValueError, TypeError: an option that breaks a rule; names value, rule and remedy.
    """
    try:
        return _remembered(*values)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise TypeError(f"options must be plain numbers, names and dtypes, got {values}") from None


def check_options(*values: Any) -> Options:
    """:func:`make_options` without a memory, which a trace cannot look into."""
    options = Options(*values)
    eps, group_size, out_dtype = options.eps, options.group_size, options.out_dtype
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not number or not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}; 1e-6 is usual")
    if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool)):
        raise TypeError(
            f"group_size must be an int or None, got {group_size!r}; use None for one group"
        )
    for name in ("norm_before_gate", "is_rms_norm", "zero_centered"):
        if not isinstance(flag := getattr(options, name), bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    one_of("activation", options.activation, ACTIVATIONS)
    one_of("numerics", options.numerics, tuple(ROUNDING))
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(
            f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype!r}"
        )
    if options.process_group is not None and not isinstance(options.process_group, str):
        raise TypeError(
            f"process_group must be its group_name or None here, got {options.process_group!r}"
        )
    activation = "silu" if options.activation == "swish" else options.activation
    return options._replace(eps=float(eps), activation=activation)


_remembered = functools.lru_cache(maxsize=1024, typed=True)(check_options)


@functools.cache
def rounding(
    numerics: str, x: torch.dtype, weight: torch.dtype | None
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes that a value is rounded to after the norm and after the weight, None for not."""
    wider = x if weight is None else torch.promote_types(x, weight)
    dtypes = {None: None, "x": x, "wider": wider}
    after_norm, after_weight = ROUNDING[numerics]
    return dtypes[after_norm], dtypes[after_weight]


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which a product of `x` computes: autocast's where that is on, but for fp64."""
    kind = x.device.type
    if x.dtype == torch.float64 or not (has_autocast(kind) and torch.is_autocast_enabled(kind)):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def has_autocast(kind: str) -> bool:
    """Whether a kind of device has autocast. PyTorch 2.11 cannot trace the question: while it
    traces, all have but the meta device."""
    if torch.compiler.is_compiling():
        return kind != "meta"
    return torch.amp.is_autocast_available(kind)


def check_scale(scaling: str, scale: Any) -> None:
    """Raises TypeError or ValueError for a given scale of FP8 that is missing, that has no use, or
    that is not one fp32 number."""
    given = isinstance(scale, torch.Tensor)
    if (scale is not None) != (scaling in GIVEN):
        got = f"one of shape {tuple(scale.shape)}" if given else repr(scale)
        raise ValueError(
            f"scale must be given with scaling='tensorwise' or 'nvfp4' alone, got {got} and "
            f"scaling={scaling!r}; pass one fp32 number with these, or scale=None"
        )
    remedy = "pass torch.tensor(0.01, device=x.device), for example"
    if scale is not None and not given:
        raise TypeError(f"scale must be a torch.Tensor, got {type(scale).__name__}; {remedy}")
    if given and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(
            f"scale must be one float32 number, got {scale.dtype} of shape {tuple(scale.shape)}; "
            f"{remedy}"
        )


def no_autocast(kind: str) -> Any:
    """A context without autocast on devices of a kind, if that has any."""
    return torch.autocast(kind, enabled=False) if has_autocast(kind) else contextlib.nullcontext()


def rows_of(t: torch.Tensor) -> torch.Tensor:
    """`[..., N]` as `[rows, N]`; `flatten` has no rule for batched gradients."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def channels_in_group(group_size: int | None, width: int, what: str, name: str) -> int:
    """The channels in a group of `width`, which an error calls `what` and `name`.

    Raises:
        ValueError: a group size that does not divide the width.
    """
    if group_size is None:
        return width
    if group_size < 1 or width % group_size:
        raise ValueError(
            f"group_size must divide {what}, got group_size={group_size} and {name}={width}; "
            f"use a divisor of {width}, or None for one group"
        )
    return group_size

"""What a call asks for: checked once, described once, remembered for the next call like it.

A tensor of shape `[..., D]` is a set of rows. `rows_of` merges the outer dimensions of all
tensors of a call into at most three that every one of them can address by strides.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "swish", "sigmoid")
# Where a family of models rounds to the input's dtype besides the store:
# (after the norm, after the weight). See `numerics` in functional.py.
ROUNDING = {"fp32": (False, False), "mamba2": (True, False), "qwen3_next": (True, True)}
NUMERICS = tuple(ROUNDING)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "xpu")
MAX_OUTER_DIMS = 3


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """A checked call: `n_rows` rows of `width` channels in `n_groups` groups of `group_size`.

    Calls with the same metadata and options share one Problem, so a launcher keeps in `plans` what
    it worked out for it.
    """

    shape: torch.Size
    n_rows: int
    width: int
    group_size: int
    n_groups: int
    eps: float
    is_rms_norm: bool
    norm_before_gate: bool
    activation: str
    zero_centered: bool
    round_norm: bool
    round_weight: bool
    out_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    saved: tuple[tuple, ...]  # shape and dtype of x, weight, bias, z, mean, rstd
    plans: dict = field(default_factory=dict, repr=False)


class Rows(NamedTuple):
    """Outer sizes, and per tensor its outer strides in elements (equally many)."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_options(eps: float, activation: str, numerics: str, **flags: bool) -> None:
    """The rules that need no tensor; ValueError, TypeError name value, rule and remedy."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not number or not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}; 1e-6 is usual")
    one_of("activation", activation, ACTIVATIONS)
    one_of("numerics", numerics, NUMERICS)


@functools.lru_cache(maxsize=4096)
def rows_of(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Rows:
    """Merge the outer dimensions of tensors `[*outer, D]` that share `shape`.

    Two neighbouring dimensions merge when, in every tensor, a step of the outer one is as long as
    the inner one is in all. Dimensions of size 1 vanish.

    Raises:
        ValueError: when more than three outer dimensions remain.
    """
    sizes: list[int] = []
    merged: list[list[int]] = []
    for dim in range(len(shape) - 1):
        size = shape[dim]
        if size == 1:
            continue
        step = [s[dim] for s in strides]
        if sizes and all(last == size * s for last, s in zip(merged[-1], step, strict=True)):
            sizes[-1] *= size
            merged[-1] = step
        else:
            sizes.append(size)
            merged.append(step)
    if not sizes:
        sizes, merged = [1], [[0] * len(strides)]
    if len(sizes) > MAX_OUTER_DIMS:
        raise ValueError(
            f"the outer dimensions must merge into at most {MAX_OUTER_DIMS}, got sizes "
            f"{tuple(sizes)} for shape {tuple(shape)} with strides "
            f"{', '.join(str(tuple(s)) for s in strides)}; call .contiguous() on the tensor whose "
            "strides do not merge, which copies it"
        )
    return Rows(tuple(sizes), tuple(zip(*merged, strict=True)))


def check_group_size(group_size: int | None, width: int, what: str, name: str) -> int:
    """The channels in a group of `width`, which an error calls `what` and `name`."""
    if group_size is None:
        return width
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(
            f"group_size must be an int or None, got {group_size!r}; use None for one group"
        )
    if group_size < 1 or width % group_size:
        raise ValueError(
            f"group_size must divide {what}, got group_size={group_size} and {name}={width}; "
            f"use a divisor of {width}, or None for one group"
        )
    return group_size


def _check_tensor(name: str, meta: tuple | None, like: tuple | None = None) -> None:
    """One tensor's dtype, device and unit stride; `like` is the metadata of x."""
    if meta is None:
        return
    shape, stride, dtype, device = meta
    if dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {dtype}; "
            f"convert it with {name}.to(torch.float32)"
        )
    if dtype == torch.float64 and device.type != "cpu":
        raise TypeError(
            f"{name} is float64 on {device}, but float64 runs on the CPU only; "
            f"use float32, or move the tensors with .cpu()"
        )
    if len(shape) and shape[-1] > 1 and stride[-1] != 1:
        raise ValueError(
            f"the last dimension of {name} must have unit stride, got strides {tuple(stride)} for "
            f"shape {tuple(shape)}; call {name}.contiguous(), which copies it"
        )
    if like is not None and device != like[3]:
        raise ValueError(
            f"{name} must be on the device of x, got {device} and {like[3]}; "
            f"move it with {name}.to('{like[3]}')"
        )


@functools.lru_cache(maxsize=4096, typed=True)
def _describe(
    x: tuple,
    weight: tuple | None,
    bias: tuple | None,
    z: tuple | None,
    out: tuple | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
    zero_centered: bool,
    numerics: str,
    out_dtype: torch.dtype | None,
) -> Problem:
    _check_tensor("x", x)
    shape, _, dtype, _ = x
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(
            f"x must have at least one channel in its last dimension, got shape {tuple(shape)}"
        )
    if x[3].type not in DEVICES:
        raise ValueError(
            f"x must be on one of {', '.join(DEVICES)} (torch calls AMD GPUs cuda), got {x[3]}; "
            "move the tensors with .cpu(), or use gatednorm.gated_norm_ref"
        )
    width = shape[-1]
    for name, meta in (("z", z), ("out", out)):
        _check_tensor(name, meta, x)
        if meta is not None and meta[0] != shape:
            raise ValueError(
                f"{name} must have the shape of x, got {tuple(meta[0])} and {tuple(shape)}; "
                f"pass one of that shape, or {name}=None"
            )
    for name, meta in (("weight", weight), ("bias", bias)):
        _check_tensor(name, meta, x)
        if meta is not None and meta[0] != (width,):
            raise ValueError(
                f"{name} must have one entry per channel, got shape {tuple(meta[0])} and "
                f"D={width}; pass one of shape ({width},), or {name}=None"
            )
    group_size = check_group_size(group_size, width, "the last dimension of x", "D")
    check_options(
        eps, activation, numerics, norm_before_gate=norm_before_gate, is_rms_norm=is_rms_norm,
        zero_centered=zero_centered,
    )  # fmt: skip
    round_norm, round_weight = ROUNDING[numerics]
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(
            f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype!r}"
        )
    if out_dtype == torch.float64 and x[3].type != "cpu":
        raise TypeError(f"out_dtype float64 runs on the CPU only, and x is on {x[3]}; use float32")
    if out is not None:
        if out_dtype is not None and out[2] != out_dtype:
            raise TypeError(f"out must have out_dtype, got {out[2]} and {out_dtype}")
        _check_no_overlap_within("out", *out[:2])
        out_dtype = out[2]
    rows_of(shape, *(meta[1] for meta in (x, z, out) if meta is not None))
    n_rows = math.prod(shape[:-1])
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = ((None, None) if m is None else (m[0], m[2]) for m in (x, weight, bias, z))
    stats = (torch.Size((n_rows, width // group_size)), compute_dtype)
    return Problem(
        shape=shape,
        n_rows=n_rows,
        width=width,
        group_size=group_size,
        n_groups=width // group_size,
        eps=float(eps),
        is_rms_norm=is_rms_norm,
        norm_before_gate=norm_before_gate,
        activation="silu" if activation == "swish" else activation,
        zero_centered=zero_centered,
        round_norm=round_norm,
        round_weight=round_weight,
        out_dtype=out_dtype or dtype,
        compute_dtype=compute_dtype,
        device=x[3],
        saved=(*inputs, stats, stats),
    )


def _meta(name: str, t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    try:
        return t.shape, t.stride(), t.dtype, t.device
    except AttributeError:
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}") from None


def describe(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
    zero_centered: bool,
    numerics: str,
    out_dtype: torch.dtype | None,
) -> Problem:
    """Check a call and describe it; the checks of a call like an earlier one are remembered.

    Raises:
        ValueError: shapes, strides, devices or option values that do not fit.
        TypeError: something that is no tensor, or a dtype that is not supported.
    """
    if x is None:
        raise TypeError("x must be a torch.Tensor, got None")
    if out is not None:
        for name, other in (("x", x), ("z", z)):
            _check_overlap("out", out, name, other)
        for name, other in (("weight", weight), ("bias", bias)):
            _check_overlap("out", out, name, other, "which every row needs")
    metas = (
        _meta("x", x), _meta("weight", weight), _meta("bias", bias), _meta("z", z),
        _meta("out", out),
    )  # fmt: skip
    options = (
        eps, group_size, norm_before_gate, is_rms_norm, activation, zero_centered, numerics,
        out_dtype,
    )  # fmt: skip
    try:
        return _describe(*metas, *options)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise TypeError(f"options must be plain numbers, names and dtypes, got {options}") from None


def _span(t: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that a tensor touches."""
    start = t.data_ptr()
    reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return start, start + (reach + 1) * t.element_size()


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    """A gradient: dtype and unit stride of its own, shape and device of `x`."""
    meta, like = _meta(name, t), _meta("x", x)
    if meta is None:
        raise TypeError(f"{name} must be a torch.Tensor, got None")
    _check_tensor(name, meta, like)
    if meta[0] != like[0]:
        raise ValueError(
            f"{name} must have the shape of x, got {tuple(meta[0])} and {tuple(like[0])}"
        )


def _check_no_overlap_within(name: str, shape: torch.Size, strides: tuple[int, ...]) -> None:
    """Refuse an output in which two indices name one element.

    Raises:
        ValueError: naming the strides.
    """
    if _overlaps_itself(shape, strides):
        raise ValueError(
            f"{name} must not overlap itself, got strides {tuple(strides)} for shape "
            f"{tuple(shape)}; pass a tensor that was not expanded, or None for a new one"
        )


def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices of a tensor may name one element."""
    reach = 0
    for step, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _meets(distance: int, dims: list[tuple[int, int]]) -> bool:
    """Whether two tensors of equal sizes and strides, `distance` elements apart, share an element.

    `dims` are (stride, size), the largest stride first; for strides that nest, at most a few steps
    of each dimension can bring the two together.
    """
    if not dims:
        return distance == 0
    (step, size), rest = dims[0], dims[1:]
    reach = sum((n - 1) * s for s, n in rest)
    first = max(1 - size, -((reach - distance) // step))
    last = min(size - 1, (distance + reach) // step)
    if last - first > 64:
        return True
    return any(_meets(distance - k * step, rest) for k in range(first, last + 1))


def _overlap(a: Tensor, b: Tensor) -> Literal["none", "same", "partial"]:
    """Whether two tensors share elements: "same" for one view, "partial" also where it takes too
    long to tell. A dimension of size 1 may have any stride."""
    if a.numel() == 0 or a.device != b.device or a.device.type == "meta":
        return "none"
    (start, end), (b_start, b_end) = _span(a), _span(b)
    if end <= b_start or b_end <= start:
        return "none"
    size, distance = b.element_size(), b_start - start
    steps, theirs = (
        [(s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (b, a)
    )
    same = a.shape == b.shape and steps == theirs and a.element_size() == size
    if not same or distance % size:
        return "partial"
    # An expanded output is refused for that; here its stride of 0 brings nothing together.
    dims = [(s, n) for s, n in steps if s]
    if distance and not _meets(distance // size, sorted(dims, reverse=True)):
        return "none"
    return "partial" if distance else "same"


def _check_overlap(name: str, out: Tensor, other_name: str, other: Tensor, same: str = "") -> None:
    """Refuse an output that shares elements with an input; where `same` is empty, one that is the
    same view of it may."""
    if not isinstance(out, Tensor) or not isinstance(other, Tensor):
        return
    overlap = _overlap(other, out)
    if overlap == "partial":
        raise ValueError(
            f"{name} overlaps {other_name} without being the same view of it, and would corrupt "
            f"it; pass a slice that shares no element with {other_name}, or None for a new tensor"
        )
    if overlap == "same" and same:
        raise ValueError(f"{name} must not be {other_name}, {same}; pass None for a new tensor")


def check_backward(
    p: Problem, dy: Tensor, x: Tensor, weight, bias, z, mean, rstd: Tensor, dx, dz
) -> None:
    """What a backward is given besides the inputs of its forward.

    Raises:
        ValueError, TypeError: naming value, rule and remedy.
    """
    _check_like("dy", dy, x)
    stats = {"rstd": rstd} if p.is_rms_norm else {"rstd": rstd, "mean": mean}
    for name, stat in stats.items():
        fits = (
            isinstance(stat, Tensor)
            and tuple(stat.shape) == (p.n_rows, p.n_groups)
            and stat.dtype == p.compute_dtype
            and stat.device == x.device
            and stat.is_contiguous()
        )
        if not fits:
            raise ValueError(
                f"{name} must be a contiguous [rows, groups] = {[p.n_rows, p.n_groups]} tensor in "
                f"{p.compute_dtype} on {x.device}, got "
                f"{(list(stat.shape), stat.dtype) if isinstance(stat, Tensor) else stat}; "
                "pass what layernorm_forward returned for the same x and options"
            )
    read = {"dy": dy, "x": x, "weight": weight, "bias": bias, "z": z, "mean": mean, "rstd": rstd}
    for name, out, like in (("dx", dx, x), ("dz", dz, z)):
        if out is None:
            continue
        if like is None:
            raise ValueError(f"{name} is given, but there is no gate; pass {name}=None")
        _check_like(name, out, x)
        if out.dtype != like.dtype:
            raise TypeError(f"{name} must be {like.dtype} like its input, got {out.dtype}")
        _check_no_overlap_within(name, out.shape, out.stride())
        for other_name, other in read.items():
            _check_overlap(name, out, other_name, other, f"which is read after {name} is written")
    if dx is not None and dz is not None:
        _check_overlap("dz", dz, "dx", dx, "which is written as well")
    rows_of(p.shape, *(t.stride() for t in (dy, x, z, dx, dz) if t is not None))

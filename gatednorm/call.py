"""What a call asks for: checked and described once, remembered for the next call like it.

A tensor of shape `[..., D]` is a set of rows. `rows_of` merges the outer dimensions of all
tensors of a call into at most three that every one of them can address by strides.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .options import DTYPES, Options, channels_in_group
from .overlap import check_no_overlap_within, check_overlap, steps_of

DEVICES = ("cpu", "cuda", "xpu")
MAX_OUTER_DIMS = 3


class Rows(NamedTuple):
    """The outer sizes except the first, and the outer strides of each tensor in elements (None
    where there is no tensor)."""

    inner_sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...] | None, ...]


class Kind(NamedTuple):
    """What a kernel is compiled for; calls of the same kind run the same code."""

    group_size: int
    n_groups: int
    norm_before_gate: bool  # True without a gate
    is_rms_norm: bool
    activation: str
    zero_centered: bool
    numerics: str
    dims: int  # outer dimensions after merging
    align: int  # divides every stride, 16 at most
    long: bool  # rows need 64 bits
    dtypes: tuple[torch.dtype | None, ...]  # of x, weight, bias, z, and of out or dy
    device: torch.device


class Call(NamedTuple):
    """A checked call without its number of rows: `width` channels in `n_groups` groups of
    `group_size`.

    `rows` has the strides of `x, z, out` in a forward, of `dy, x, z, dx, dz` in a backward;
    `numbers` is the same in the form that kernels take: two sizes, and three strides for each
    tensor.
    """

    width: int
    group_size: int
    n_groups: int
    options: Options
    norm_before_gate: bool  # True without a gate
    out_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    rows: Rows
    numbers: tuple[int, ...]
    kind: Kind


class _Meta(NamedTuple):
    """What the checks look at in a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_Fields = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]  # of a _Meta


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises TypeError for anything but a tensor; all but `x` may be None."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor) and (t is not None or name == "x"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")


def _meta(name: str, t: Tensor | None) -> _Fields | None:
    """The fields of a :class:`_Meta`, in a plain tuple: this runs at every call."""
    if t is None:
        return None
    try:
        return t.shape, t.stride(), t.dtype, t.device
    except AttributeError:
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}") from None
    except RuntimeError:  # it has no strides
        raise TypeError(
            f"{name} must be dense, got layout {t.layout}; use {name}.to_dense()"
        ) from None


def describe(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor | None,
    options: Options,
) -> Call:
    """Check a forward and describe it; the checks of a call like an earlier one are remembered.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: an argument that is not a tensor, or a dtype that is not supported.
    """
    metas = (
        _meta("x", x), _meta("weight", weight), _meta("bias", bias), _meta("z", z),
        _meta("out", out),
    )  # fmt: skip
    call = _remembered(*metas, options)
    if out is not None:
        check_no_overlap_within("out", out.shape, out.stride())
        for name, other in (("x", x), ("z", z)):
            check_overlap("out", out, name, other)
        for name, other in (("weight", weight), ("bias", bias)):
            check_overlap("out", out, name, other, "which every row needs")
    return call


def describe_backward(
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
) -> Call:
    """Check a backward and describe it, as :func:`describe` does a forward. `dx` and `dz` are the
    tensors to be written, None for new ones.

    Raises:
        ValueError, TypeError: as :func:`describe`; also for statistics of another call, and for a
            gradient that overlaps what is read after it is written.
    """
    call = _describe_backward(
        _meta("dy", dy), _meta("x", x), _meta("weight", weight), _meta("bias", bias),
        _meta("z", z), _meta("mean", mean), _meta("rstd", rstd), _meta("dx", dx), _meta("dz", dz),
        options,
    )  # fmt: skip
    if dx is not None or dz is not None:
        read = {"dy": dy, "x": x, "weight": weight, "bias": bias, "z": z, "mean": mean}
        for name, out in (("dx", dx), ("dz", dz)):
            for other_name, other in {**read, "rstd": rstd}.items():
                why = f"which is read after {name} is written"
                check_overlap(name, out, other_name, other, why)
        check_overlap("dz", dz, "dx", dx, "which is written as well")
    return call


@functools.lru_cache(maxsize=4096)
def _remembered(
    x: _Fields | None,
    weight: _Fields | None,
    bias: _Fields | None,
    z: _Fields | None,
    out: _Fields | None,
    options: Options,
) -> Call:
    metas, shape = (x, weight, bias, z, out), () if x is None else x[0]
    long = _long(shape)
    try:
        if all(meta is None or meta[0] == shape for meta in (z, out)):
            return _describe(*map(_of_any_rows, metas), options, long)
    except (TypeError, ValueError):
        pass
    return _describe.__wrapped__(*metas, options, long)  # an error names the real shapes


def _of_any_rows(meta: _Fields | None) -> _Fields | None:
    """The same for any number of rows above one. Serving meets new ones all the time, and no rule
    but that of `_long` depends on how many there are, so one check is remembered for all."""
    if meta is None or len(meta[0]) < 2 or meta[0][0] <= 2:
        return meta
    return (2, *meta[0][1:]), *meta[1:]


def _long(shape: tuple[int, ...]) -> bool:
    """Whether numbers of rows or channels need 64 bits; kernels count up to a tile, or a step of
    all workers, beyond the last row."""
    return max((math.prod(shape[:-1]) + 2**20, *shape[-1:])) >= 2**31


def _metas(*metas: _Fields | None) -> list[_Meta | None]:
    return [None if m is None else _Meta(*m) for m in metas]


@functools.lru_cache(maxsize=4096)
def _describe(
    x: _Fields | None,
    weight: _Fields | None,
    bias: _Fields | None,
    z: _Fields | None,
    out: _Fields | None,
    options: Options,
    long: bool,
) -> Call:
    x, weight, bias, z, out = _metas(x, weight, bias, z, out)
    x = _check_inputs(x, weight, bias, z)
    out_dtype = options.out_dtype
    if out_dtype == torch.float64 and x.device.type != "cpu":
        raise TypeError(
            f"out_dtype float64 runs on the CPU only, and x is on {x.device}; use float32"
        )
    if out is not None:
        _check_like_x("out", out, x)
        if out_dtype not in (None, out.dtype):
            raise TypeError(f"out must have out_dtype, got {out.dtype} and {out_dtype}")
        out_dtype = out.dtype
    written = dense_strides(x.shape) if out is None else out.stride
    strides = (x.stride, None if z is None else z.stride, written)
    out_dtype = out_dtype or x.dtype
    rows = rows_of(x.shape, *strides)
    return _call(x, weight, bias, z, out_dtype, out_dtype, options, rows, long)


@functools.lru_cache(maxsize=4096)
def _describe_backward(
    dy: _Fields | None,
    x: _Fields | None,
    weight: _Fields | None,
    bias: _Fields | None,
    z: _Fields | None,
    mean: _Fields | None,
    rstd: _Fields | None,
    dx: _Fields | None,
    dz: _Fields | None,
    options: Options,
) -> Call:
    dy, x, weight, bias, z = _metas(dy, x, weight, bias, z)
    mean, rstd, dx, dz = _metas(mean, rstd, dx, dz)
    x = _check_inputs(x, weight, bias, z)
    dy = _check_like_x("dy", dy, x)
    for name, given, like in (("dx", dx, x), ("dz", dz, z)):
        if given is None:
            continue
        if like is None:
            raise ValueError(f"{name} is given, but there is no gate; pass {name}=None")
        _check_like_x(name, given, x)
        if given.dtype != like.dtype:
            raise TypeError(f"{name} must be {like.dtype} like its input, got {given.dtype}")
        check_no_overlap_within(name, given.shape, given.stride)
    dense = dense_strides(x.shape)
    of_z = (None, None) if z is None else (z.stride, dense if dz is None else dz.stride)
    strides = (dy.stride, x.stride, of_z[0], dense if dx is None else dx.stride, of_z[1])
    rows = rows_of(x.shape, *strides)
    call = _call(x, weight, bias, z, dy.dtype, x.dtype, options, rows, _long(x.shape))
    shape = torch.Size((math.prod(x.shape[:-1]), call.n_groups))
    wanted, steps = (shape, call.compute_dtype, x.device), steps_of(shape, dense_strides(shape))
    for name, stat in (("rstd", rstd), ("mean", mean))[: 1 if options.is_rms_norm else 2]:
        found = None if stat is None else (stat.shape, stat.dtype, stat.device)
        if stat is None or found != wanted or steps_of(*stat[:2]) != steps:
            got = "None"
            if stat is not None:
                got = f"{list(stat.shape)} in {stat.dtype} with strides {tuple(stat.stride)}"
            raise ValueError(
                f"{name} must be a contiguous [rows, groups] = {list(shape)} tensor in "
                f"{wanted[1]} on {x.device}, got {got}; "
                "pass what layernorm_forward returned for the same x and options"
            )
    return call


def _call(
    x: _Meta,
    weight: _Meta | None,
    bias: _Meta | None,
    z: _Meta | None,
    last: torch.dtype,
    out_dtype: torch.dtype,
    options: Options,
    rows: Rows,
    long: bool,
) -> Call:
    """`last` is the dtype of `out` or `dy`."""
    width = x.shape[-1]
    group_size = channels_in_group(options.group_size, width, "the last dimension of x", "D")
    strides = [(*(steps or ()), 0, 0, 0)[:3] for steps in rows.strides]
    kind = Kind(
        group_size=group_size,
        n_groups=width // group_size,
        norm_before_gate=options.norm_before_gate or z is None,
        is_rms_norm=options.is_rms_norm,
        activation=options.activation,
        zero_centered=options.zero_centered,
        numerics=options.numerics,
        dims=len(rows.inner_sizes) + 1,
        align=math.gcd(16, *(step for steps in strides for step in steps)),
        long=long,
        dtypes=(*(None if m is None else m.dtype for m in (x, weight, bias, z)), last),
        device=x.device,
    )
    return Call(
        width=width,
        group_size=group_size,
        n_groups=kind.n_groups,
        options=options,
        norm_before_gate=kind.norm_before_gate,
        out_dtype=out_dtype,
        compute_dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        device=x.device,
        rows=rows,
        numbers=(*(*rows.inner_sizes, 1, 1)[:2], *(step for steps in strides for step in steps)),
        kind=kind,
    )


def _check_inputs(
    x: _Meta | None, weight: _Meta | None, bias: _Meta | None, z: _Meta | None
) -> _Meta:
    """`x`; the rules for the tensors that a forward and a backward read."""
    if x is None:
        raise TypeError("x must be a torch.Tensor, got NoneType")
    _check_tensor("x", x)
    if len(x.shape) == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x must have at least one channel in its last dimension, got shape {tuple(x.shape)}"
        )
    if x.device.type not in DEVICES:
        raise ValueError(
            f"x must be on one of {', '.join(DEVICES)} (torch calls AMD GPUs cuda), got "
            f"{x.device}; move the tensors with .cpu(), or use gatednorm.gated_norm_ref"
        )
    if z is not None:
        _check_like_x("z", z, x)
    width = x.shape[-1]
    for name, meta in (("weight", weight), ("bias", bias)):
        if meta is None:
            continue
        _check_tensor(name, meta, x)
        if meta.shape != (width,):
            raise ValueError(
                f"{name} must have one entry per channel, got shape {tuple(meta.shape)} and "
                f"D={width}; pass one of shape ({width},), or {name}=None"
            )
    return x


def _check_tensor(name: str, meta: _Meta, x: _Meta | None = None) -> None:
    """One tensor's dtype and unit stride; and the device of `x`."""
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
    if x is not None and device != x.device:
        raise ValueError(
            f"{name} must be on the device of x, got {device} and {x.device}; "
            f"move it with {name}.to('{x.device}')"
        )


def _check_like_x(name: str, meta: _Meta | None, x: _Meta) -> _Meta:
    """`meta`: a tensor of the shape and device of `x`, with a dtype and strides of its own."""
    if meta is None:
        raise TypeError(f"{name} must be a torch.Tensor, got None")
    _check_tensor(name, meta, x)
    if meta.shape != x.shape:
        without = "" if name == "dy" else f", or {name}=None"
        raise ValueError(
            f"{name} must have the shape of x, got {tuple(meta.shape)} and {tuple(x.shape)}; "
            f"pass one of that shape{without}"
        )
    return meta


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides[: len(shape)])


def rows_of(shape: tuple[int, ...], *strides: tuple[int, ...] | None) -> Rows:
    """Merge the outer dimensions of tensors `[*outer, D]` that share `shape`.

    Two neighbouring dimensions merge when, in every tensor, a step of the outer one is as long as
    the inner one is in all. Dimensions of size 1 vanish.

    Raises:
        ValueError: when more than three outer dimensions remain.
    """
    present = [s for s in strides if s is not None]
    sizes: list[int] = []
    merged: list[list[int]] = []
    for dim, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        step = [s[dim] for s in present]
        if sizes and merged[-1] == [size * s for s in step]:
            sizes[-1] *= size
            merged[-1] = step
        else:
            sizes.append(size)
            merged.append(step)
    if not sizes:
        sizes, merged = [1], [[0] * len(present)]
    if len(sizes) > MAX_OUTER_DIMS:
        raise ValueError(
            f"the outer dimensions must merge into at most {MAX_OUTER_DIMS}, got sizes "
            f"{tuple(sizes)} for shape {tuple(shape)} with strides "
            f"{', '.join(str(tuple(s)) for s in present)}; call .contiguous() on the tensor whose "
            "strides do not merge, which copies it"
        )
    each = iter(zip(*merged, strict=True))
    return Rows(tuple(sizes[1:]), tuple(None if s is None else next(each) for s in strides))

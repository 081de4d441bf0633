"""The closed-form CPU path, forward and backward, over blocks of rows that stay in cache.

Same equation and same derivatives as the kernels (kernels.py); PyTorch's CPU operators do the
arithmetic. It promises: the inference path equals the training path bit for bit, and a row that
holds inf or NaN touches no other row. It does not promise that a row's bits are independent of
the rows around it: PyTorch's vectorised functions round differently in the tail of a buffer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Problem, rows_of

# About half of a core's private cache for each of the handful of temporaries in flight.
BLOCK_BYTES = 1 << 18


def _blocks(p: Problem, *tensors: Tensor | None) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """Cut tensors `[..., D]` into blocks of rows; yields the rows' slice and the views.

    The views of one block share a shape `[..., D]` of at most three outer dimensions.
    """
    present = [t for t in tensors if t is not None]
    sizes, strides = rows_of(p.shape, *(t.stride() for t in present))
    views = iter(
        t.as_strided((*sizes, p.width), (*s, 1)) for t, s in zip(present, strides, strict=True)
    )
    whole = [None if t is None else next(views) for t in tensors]
    rows_per_block = max(1, BLOCK_BYTES // (p.width * p.compute_dtype.itemsize))

    def cut(start: int, sizes: tuple[int, ...], parts: list[Tensor | None]):
        inner = 1
        for n in sizes[1:]:
            inner *= n
        if inner > rows_per_block:
            for i in range(sizes[0]):
                yield from cut(
                    start + i * inner, sizes[1:], [None if t is None else t[i] for t in parts]
                )
            return
        step = max(1, rows_per_block // max(1, inner))
        for i in range(0, sizes[0], step):
            stop = min(i + step, sizes[0])
            rows = slice(start + i * inner, start + stop * inner)
            yield rows, [None if t is None else t[i:stop] for t in parts]

    yield from cut(0, sizes, whole)


def _grouped(p: Problem, t: Tensor) -> Tensor:
    """`[..., D]` to `[rows, groups, group_size]`."""
    return t.reshape(-1, p.n_groups, p.group_size)


def _gate(p: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
    """`act(z)` and its derivative."""
    sig = torch.sigmoid(z)
    if p.activation == "sigmoid":
        return sig, sig - sig * sig
    act = z * sig
    return act, torch.addcmul(sig, act, 1 - sig)


def _act(p: Problem, z: Tensor) -> Tensor:
    return torch.sigmoid(z) if p.activation == "sigmoid" else torch.nn.functional.silu(z)


def _weight(p: Problem, weight: Tensor | None) -> Tensor | None:
    """`[D]` to `[groups, group_size]` in the compute dtype, with the 1 of a zero-centred weight."""
    if weight is None:
        return None
    w = weight.to(p.compute_dtype).view(p.n_groups, p.group_size)
    return 1 + w if p.zero_centered else w


def _affine(p: Problem, xhat: Tensor, w, b, x_dtype: torch.dtype, w_dtype) -> tuple[Tensor, Tensor]:
    """The normalised value with its rounding points, and `xhat * w + b`."""
    if p.round_norm:
        xhat = xhat.to(x_dtype).to(p.compute_dtype)
    h = xhat
    if w is not None:
        h = h * w
        if p.round_weight:
            h = h.to(torch.promote_types(x_dtype, w_dtype)).to(p.compute_dtype)
    if b is not None:
        h = h + b
    return xhat, h


@torch.autocast("cpu", enabled=False)  # it would turn inner products into bf16
def forward(
    p: Problem,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Write `out` `[..., D]`, and `mean`, `rstd` `[rows, groups]` unless None."""
    w = _weight(p, weight)
    b = None if bias is None else bias.to(p.compute_dtype).view(p.n_groups, p.group_size)
    w_dtype = None if weight is None else weight.dtype
    for rows, (xb, zb, ob) in _blocks(p, x, z, out):
        u = _grouped(p, xb.to(p.compute_dtype))
        gate = None if zb is None else _act(p, _grouped(p, zb.to(p.compute_dtype)))
        if gate is not None and not p.norm_before_gate:
            u = u * gate
        if not p.is_rms_norm:
            mu = u.mean(-1, keepdim=True)
            if mean is not None:
                mean[rows] = mu.squeeze(-1)
            u = u - mu
        r = torch.rsqrt(_dot(u, u) / p.group_size + p.eps)
        if rstd is not None:
            rstd[rows] = r.squeeze(-1)
        _, h = _affine(p, u * r, w, b, x.dtype, w_dtype)
        if gate is not None and p.norm_before_gate:
            h = h * gate
        ob.copy_(h.view(ob.shape))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last dimension, kept: `[..., 1]`."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


@torch.autocast("cpu", enabled=False)
def backward(
    p: Problem,
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dz: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx`, `dz` `[..., D]`; return `dw`, `db` `[D]` in the dtypes of weight and bias."""
    w = _weight(p, weight)
    b = None if bias is None else bias.to(p.compute_dtype).view(p.n_groups, p.group_size)
    w_dtype = None if weight is None else weight.dtype
    dw = None if w is None else torch.zeros_like(w)
    db = None if b is None else torch.zeros_like(b)
    for rows, (dyb, xb, zb, dxb, dzb) in _blocks(p, dy, x, z, dx, dz):
        g = _grouped(p, dyb.to(p.compute_dtype))
        xg = _grouped(p, xb.to(p.compute_dtype))
        if zb is not None:
            act, dact = _gate(p, _grouped(p, zb.to(p.compute_dtype)))
        u = xg if zb is None or p.norm_before_gate else xg * act
        if not p.is_rms_norm:
            u = u - mean[rows].unsqueeze(-1)
        r = rstd[rows].unsqueeze(-1)
        xhat = u * r
        rounded, h = _affine(p, xhat, w, b, x.dtype, w_dtype)
        if zb is not None and p.norm_before_gate:
            dzb.copy_((g * h * dact).view(dzb.shape))
            g = g * act
        if dw is not None:
            dw += (g * rounded).sum(0)
        if db is not None:
            db += g.sum(0)
        du = g if w is None else g * w
        dxg = torch.addcmul(du, xhat, _dot(du, xhat) / p.group_size, value=-1)
        if not p.is_rms_norm:
            dxg -= du.mean(-1, keepdim=True)
        dxg *= r
        if zb is not None and not p.norm_before_gate:
            dzb.copy_((dxg * xg * dact).view(dzb.shape))
            dxg *= act
        dxb.copy_(dxg.view(dxb.shape))
    return (
        None if dw is None else dw.view(p.width).to(weight.dtype),
        None if db is None else db.view(p.width).to(bias.dtype),
    )

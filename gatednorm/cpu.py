"""The closed-form CPU path, forward and backward, over blocks of rows that stay in cache.

Same equation and same derivatives as the kernels (kernels.py); PyTorch's CPU operators do the
arithmetic. It promises: the inference path equals the training path bit for bit, but for an `out`
whose strides cut the rows into other blocks, and a row that holds inf or NaN touches no other row.
It does not promise that a row's bits are independent of the rows around it: PyTorch's vectorised
functions round differently in the tail of a buffer.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Problem, rows_of

# Under two megabytes for each of the handful of buffers in flight: they stay in cache, and each
# operator still has enough to do that its own cost does not count.
BLOCK_BYTES = 7 * 2**18


def _rows_per_block(p: Problem) -> int:
    return max(1, BLOCK_BYTES // (p.width * p.compute_dtype.itemsize))


def _blocks(p: Problem, *tensors: Tensor | None) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """Cut tensors `[..., D]` into blocks of rows; yields the rows' slice and the views.

    The views of one block share a shape `[..., D]`.
    """
    rows_per_block = _rows_per_block(p)
    if p.n_rows <= rows_per_block:
        yield slice(0, p.n_rows), list(tensors)
        return
    present = [t for t in tensors if t is not None]
    sizes, strides = rows_of(p.shape, *(t.stride() for t in present))
    views = iter(
        t.as_strided((*sizes, p.width), (*s, 1)) for t, s in zip(present, strides, strict=True)
    )
    whole = [None if t is None else next(views) for t in tensors]

    def cut(start: int, sizes: tuple[int, ...], parts: list[Tensor | None]):
        inner = math.prod(sizes[1:])
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
    """`[..., D]` in the compute dtype, as `[rows, groups, group_size]`."""
    return t.to(p.compute_dtype).reshape(-1, p.n_groups, p.group_size)


class _Workspace:
    """Buffers of one block `[rows, groups, group_size]`, reused by every block: they stay in cache,
    and nothing is allocated per operator. A result's own memory is one more where it can be."""

    def __init__(self, p: Problem):
        self.p = p
        self.rows = min(p.n_rows, _rows_per_block(p))  # of the largest block
        self.buffers: list[Tensor] = []

    def of(
        self, like: Tensor, count: int, *results: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`count` buffers for a block `like`; and one for each of `results` `[..., D]`, the result
        itself where its memory may hold other values first, else (or for None) another."""
        p = self.p
        given = []
        for t in results:
            direct = t is not None and t.dtype == p.compute_dtype and t.is_contiguous()
            given.append(t.view(-1, p.n_groups, p.group_size) if direct else None)
        count += sum(t is None for t in given)
        while len(self.buffers) < count:
            self.buffers.append(like.new_empty(self.rows, p.n_groups, p.group_size))
        rows = like.shape[0]
        spare = iter([b if rows == self.rows else b[:rows] for b in self.buffers[:count]])
        found = [next(spare) if t is None else t for t in given]
        return list(spare), found


def _product_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """`target` `[..., D]` = `a * b`; `a` `[rows, groups, group_size]`, and `b` like it or one a row
    and group. Written once where dtypes and groups allow, else through `a`, which is spent."""
    one_a_row = b.shape != a.shape
    if a.data_ptr() == target.data_ptr():  # the target's own memory, seen as groups
        a.mul_(b)
    elif b.data_ptr() == target.data_ptr():
        b.mul_(a)
    elif target.dtype == a.dtype and (not one_a_row or a.shape[1] == 1):
        shape = target.shape
        torch.mul(a.view(shape), b.view(*shape[:-1], -1), out=target)
    else:
        target.copy_(a.mul_(b).view(target.shape))


def _act(p: Problem, z: Tensor, out: Tensor) -> Tensor:
    if p.activation == "sigmoid":
        return torch.sigmoid(z, out=out)
    return torch.ops.aten.silu.out(z, out=out)


def _act_and_slope(p: Problem, z: Tensor, act: Tensor, slope: Tensor) -> None:
    """`act(z)` and its derivative, `s + act * (1 - s)` for SiLU, from one sigmoid `s`."""
    if p.activation == "sigmoid":
        torch.sigmoid(z, out=act)
        torch.addcmul(act, act, act, value=-1, out=slope)
    else:
        torch.sigmoid(z, out=slope)
        torch.mul(z, slope, out=act)
        torch.lerp(act, act.new_ones(()), slope, out=slope)


def _parameters(p: Problem, weight, bias) -> tuple[Tensor | None, Tensor | None]:
    """`[groups, group_size]` in the compute dtype; the weight with the 1 of a zero-centred one."""
    shape = (p.n_groups, p.group_size)
    w = None if weight is None else weight.to(p.compute_dtype).view(shape)
    b = None if bias is None else bias.to(p.compute_dtype).view(shape)
    return (1 + w if p.zero_centered and w is not None else w), b


def _round(p: Problem, t: Tensor, when: bool, *dtypes: torch.dtype) -> Tensor:
    """`t` rounded to the widest of `dtypes`, where the numerics ask for it."""
    if not when:
        return t
    return t.to(functools.reduce(torch.promote_types, dtypes)).to(p.compute_dtype)


def _affine(p: Problem, xhat: Tensor, w, b, x: Tensor, weight, out: Tensor) -> Tensor:
    """`xhat * w + b` in `out`, rounded where the numerics ask for it, or `xhat` itself."""
    h = xhat
    if w is not None:
        h = _round(p, torch.mul(h, w, out=out), p.round_weight, x.dtype, weight.dtype)
    return h if b is None else torch.add(h, b, out=out)


def _mean_square(u: Tensor, spare: Tensor) -> Tensor:
    """`[rows, groups, 1]`; a product and PyTorch's pairwise sum, since its vector norm adds one
    element after the other and loses digits in wide rows."""
    return torch.mul(u, u, out=spare).mean(-1, keepdim=True)


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
    w, b = _parameters(p, weight, bias)
    workspace = _Workspace(p)
    for rows, (xb, zb, ob) in _blocks(p, x, z, out):
        u = _grouped(p, xb)
        (one, spare), (two,) = workspace.of(u, 2, ob)
        act = None if zb is None else _act(p, _grouped(p, zb), one)
        if act is not None and not p.norm_before_gate:
            u = torch.mul(u, act, out=one)
        if not p.is_rms_norm:
            mu = u.mean(-1, keepdim=True)
            u = torch.sub(u, mu, out=two)
            if mean is not None:
                mean[rows] = mu.squeeze(-1)
        r = torch.rsqrt(_mean_square(u, spare) + p.eps)
        if rstd is not None:
            rstd[rows] = r.squeeze(-1)
        xhat = _round(p, torch.mul(u, r, out=two), p.round_norm, x.dtype)
        h = _affine(p, xhat, w, b, x, weight, two)
        if act is not None and p.norm_before_gate:
            _product_into(ob, h, act)
        elif h.data_ptr() != ob.data_ptr():
            ob.copy_(h.view(ob.shape))


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
    w, b = _parameters(p, weight, bias)
    dw = None if w is None else torch.zeros_like(w)
    db = None if b is None else torch.zeros_like(b)
    gate_first = z is not None and not p.norm_before_gate
    gate_last = z is not None and p.norm_before_gate
    workspace = _Workspace(p)
    for rows, (dyb, xb, zb, dxb, dzb) in _blocks(p, dy, x, z, dx, dz):
        g, xg = _grouped(p, dyb), _grouped(p, xb)
        if zb is None:
            (xhat,), (one,) = workspace.of(g, 1, dxb)
        else:
            (act, xhat), (one, slope) = workspace.of(g, 2, dxb, dzb)
            _act_and_slope(p, _grouped(p, zb), act, slope)
        u = torch.mul(xg, act, out=xhat) if gate_first else xg
        if not p.is_rms_norm:
            u = torch.sub(u, mean[rows].unsqueeze(-1), out=xhat)
        r = rstd[rows].unsqueeze(-1)
        torch.mul(u, r, out=xhat)
        rounded = _round(p, xhat, p.round_norm, x.dtype)
        if gate_last:
            h = _affine(p, rounded, w, b, x, weight, one)
            _product_into(dzb, torch.mul(g, h, out=one), slope)
            g = torch.mul(g, act, out=act)
        # One product serves dw, a sum over the rows, and c1, a sum over the columns.
        product = torch.mul(g, xhat, out=one)
        if dw is not None:
            dw += (g * rounded if p.round_norm else product).sum(0)
        if db is not None:
            db += g.sum(0)
        product = product if w is None else product.mul_(w)
        c1 = product.sum(-1, keepdim=True).div_(-p.group_size)
        du = torch.mul(g, 1.0 if w is None else w, out=one)
        if not p.is_rms_norm:
            du -= du.mean(-1, keepdim=True)
        du.addcmul_(xhat, c1)
        if gate_first:
            du *= r
            _product_into(dzb, torch.mul(du, xg, out=xhat), slope)
            _product_into(dxb, du, act)
        else:
            _product_into(dxb, du, r)
    return (
        None if dw is None else dw.view(p.width).to(weight.dtype),
        None if db is None else db.view(p.width).to(bias.dtype),
    )

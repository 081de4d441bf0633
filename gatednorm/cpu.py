"""The closed-form CPU path, forward and backward, over blocks of rows that stay in cache.

Same equation and same derivatives as the kernels; PyTorch's CPU operators do the arithmetic. It
promises that the inference path equals the training path bit for bit, except for an `out` whose
strides cut the rows into other blocks, and that a row with inf or NaN touches no other row. It does
not promise that a row's bits are independent of the rows around it: PyTorch's vectorised functions
round differently in the tail of a buffer.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .call import Call, Rows
from .options import rounding

# Under two megabytes for each of the handful of buffers in flight: they stay in cache, and each
# operator still has enough to do that its own cost does not count.
BLOCK_BYTES = 7 * 2**18

Block = list[Any]  # a view of each tensor; None where there is none


def _rows_per_block(call: Call) -> int:
    return max(1, BLOCK_BYTES // (call.width * call.compute_dtype.itemsize))


def _blocks(call: Call, first: Tensor, *others: Tensor | None) -> Iterator[tuple[slice, Block]]:
    """Cut the tensors `[..., D]` of `call.rows` into blocks of rows: the rows' slice, and the
    views, which share a shape `[..., D]`."""
    tensors = (first, *others)
    most, n_rows = _rows_per_block(call), first.numel() // call.width
    if n_rows <= most:
        yield slice(0, n_rows), list(tensors)
        return
    inner_sizes, strides = call.rows
    sizes = (n_rows // math.prod(inner_sizes), *inner_sizes)

    def cut(start: int, sizes: tuple[int, ...], parts: Block) -> Iterator[tuple[slice, Block]]:
        inner = math.prod(sizes[1:])
        if inner > most:
            for i in range(sizes[0]):
                views = [None if t is None else t[i] for t in parts]
                yield from cut(start + i * inner, sizes[1:], views)
            return
        step = max(1, most // max(1, inner))
        for i in range(0, sizes[0], step):
            stop = min(i + step, sizes[0])
            views = [None if t is None else t[i:stop] for t in parts]
            yield slice(start + i * inner, start + stop * inner), views

    yield from cut(0, sizes, [
        None if t is None or steps is None else t.as_strided((*sizes, call.width), (*steps, 1))
        for t, steps in zip(tensors, strides, strict=True)
    ])  # fmt: skip


def _grouped(call: Call, t: Tensor) -> Tensor:
    """`[..., D]` in the compute dtype, as `[rows, groups, group_size]`."""
    return t.to(call.compute_dtype).reshape(-1, call.n_groups, call.group_size)


class _Buffers:
    """Memory for blocks `[rows, groups, group_size]`, used by every block in turn: it stays in
    cache, and no operator allocates."""

    def __init__(self, call: Call, x: Tensor):
        rows = min(x.numel() // call.width, _rows_per_block(call))
        self.shape, self.dtype = (rows, call.n_groups, call.group_size), call.compute_dtype
        self.all: list[Tensor] = []

    def of(self, block: Tensor, count: int, *results: Tensor | None) -> list[Tensor]:
        """`count` buffers for a block; the first are the memory of `results` `[..., D]` itself,
        where that may hold other values first."""
        rows, found, used = len(block), [], 0
        for t in (*results, *(None,) * (count - len(results))):
            if t is not None and t.dtype == self.dtype and t.is_contiguous():
                found.append(t.view(block.shape))
                continue
            if used == len(self.all):
                self.all.append(torch.empty(self.shape, dtype=self.dtype, device="cpu"))
            buffer = self.all[used]
            found.append(buffer if rows == len(buffer) else buffer[:rows])
            used += 1
        return found


def _product_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """`target` `[..., D]` = `a * b`; `a` `[rows, groups, group_size]`, and `b` like it or one a row
    and group. Written once where dtypes and groups allow, else through `a`, which is spent."""
    if a.data_ptr() == target.data_ptr():  # the target's own memory, seen as groups
        a.mul_(b)
    elif b.data_ptr() == target.data_ptr():
        b.mul_(a)
    elif target.dtype == a.dtype and (b.shape == a.shape or a.shape[1] == 1):
        shape = target.shape
        torch.mul(a.view(shape), b.view(*shape[:-1], -1), out=target)
    else:
        target.copy_(a.mul_(b).view(target.shape))


def _act(call: Call, z: Tensor, out: Tensor) -> Tensor:
    if call.options.activation == "sigmoid":
        return torch.sigmoid(z, out=out)
    torch.ops.aten.silu.out(z, out=out)
    return out


def _act_and_slope(call: Call, z: Tensor, act: Tensor, slope: Tensor) -> None:
    """`act(z)` and its derivative, `s + act * (1 - s)` for SiLU, from one sigmoid `s`."""
    if call.options.activation == "sigmoid":
        torch.sigmoid(z, out=act)
        torch.addcmul(act, act, act, value=-1, out=slope)
    else:
        torch.sigmoid(z, out=slope)
        torch.mul(z, slope, out=act)
        torch.lerp(act, act.new_ones(()), slope, out=slope)


def _parameters(
    call: Call, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`[groups, group_size]` in the compute dtype; the weight with the 1 of a zero-centred one."""
    w, b = (
        None if t is None else t.to(call.compute_dtype).view(call.n_groups, call.group_size)
        for t in (weight, bias)
    )
    return (1 + w if call.options.zero_centered and w is not None else w), b


def _round(call: Call, t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`t` rounded to `dtype`, or itself."""
    return t if dtype is None else t.to(dtype).to(call.compute_dtype)


def _affine(
    call: Call,
    xhat: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    """`xhat * w`, rounded to `dtype`, `+ b` in `out` (new if None), or `xhat` itself."""
    h = xhat
    if w is not None:
        h = _round(call, torch.mul(h, w, out=out), dtype)
    return h if b is None else torch.add(h, b, out=out)


def forward_means(
    call: Call, x: Tensor, z: Tensor | None, mean: Tensor | None, square: Tensor
) -> None:
    """Write the `mean` `[rows]` of what is normalised (None for RMS), and its mean `square` about
    that, of rows with one group."""
    for rows, (xb, zb, _) in _blocks(call, x, z, None):
        u = _grouped(call, xb)
        if not call.norm_before_gate:
            u = u * _act(call, _grouped(call, zb), torch.empty_like(u))
        if mean is not None:
            mu = u.mean(-1, keepdim=True)
            u = u - mu
            mean[rows] = mu.view(-1)
        square[rows] = (u * u).mean(-1).view(-1)


def combine(parts: Tensor, first: Tensor, second: Tensor | None, eps: float | None = None) -> None:
    """Write the means over ranks of `parts` `[ranks, numbers, rows]`, of which each rank has the
    same, to `first` and `second` (None where there is one number); with `eps` the `rstd` and the
    `mean` of what `forward_means` has written."""
    one, *other = _over_ranks(parts)
    if second is not None:
        second.view(-1).copy_(other[0])
        if eps is not None:  # a rank's squares are about its own mean
            one = one + _over_ranks((parts[:, 1] - other[0]).square_())
    first.view(-1).copy_(one if eps is None else torch.rsqrt(one + eps))


def _over_ranks(parts: Tensor) -> Tensor:
    """The mean over the first dimension: neighbours are added up pair by pair."""
    sums = parts
    while len(sums) > 1:
        paired = sums[0:-1:2] + sums[1::2]
        sums = torch.cat([paired, sums[-1:]]) if len(sums) % 2 else paired
    return sums[0] / len(parts)


def forward(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    stats_given: bool = False,
) -> None:
    """Write `out` `[..., D]`, and `mean`, `rstd` `[rows, groups]` unless None or given."""
    w, b = _parameters(call, weight, bias)
    buffers, options = _Buffers(call, x), call.options
    after_norm, after_weight = rounding(options.numerics, *call.kind.dtypes[:2])
    for rows, (xb, zb, ob) in _blocks(call, x, z, out):
        u = _grouped(call, xb)
        two, one, spare = buffers.of(u, 3, ob)
        act = None if zb is None else _act(call, _grouped(call, zb), one)
        if act is not None and not call.norm_before_gate:
            u = torch.mul(u, act, out=one)
        if not options.is_rms_norm:
            if stats_given and mean is not None:
                mu = mean[rows].unsqueeze(-1)
            else:
                mu = u.mean(-1, keepdim=True)
                if mean is not None:
                    mean[rows] = mu.squeeze(-1)
            u = torch.sub(u, mu, out=two)
        if stats_given and rstd is not None:
            r = rstd[rows].unsqueeze(-1)
        else:
            # A product and PyTorch's pairwise sum: its vector norm adds one element after the other
            # and loses digits in wide rows.
            square = torch.mul(u, u, out=spare).mean(-1, keepdim=True)
            r = torch.rsqrt(square + options.eps)
            if rstd is not None:
                rstd[rows] = r.squeeze(-1)
        xhat = _round(call, torch.mul(u, r, out=two), after_norm)
        h = _affine(call, xhat, w, b, after_weight, two)
        if act is not None and call.norm_before_gate:
            _product_into(ob, h, act)
        elif h.data_ptr() != ob.data_ptr():
            ob.copy_(h.view(ob.shape))


def backward_means(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor | None,
) -> None:
    """Write the means `[rows]` of `dxhat * xhat` and of `dxhat` (None for RMS), of rows with one
    group."""
    w, _ = _parameters(call, weight, None)
    for rows, (dyb, xb, zb, _, _) in _blocks(call, dy, x, z, None, None):
        dxhat, u = _grouped(call, dyb), _grouped(call, xb)
        if zb is not None:
            act = _act(call, _grouped(call, zb), torch.empty_like(u))
            dxhat, u = (dxhat * act, u) if call.norm_before_gate else (dxhat, u * act)
        if w is not None:
            dxhat = dxhat * w
        if c2 is not None and mean is not None:
            u = u - mean[rows].unsqueeze(-1)
            c2[rows] = dxhat.mean(-1).view(-1)
        xhat = u * rstd[rows].unsqueeze(-1)
        c1[rows] = (dxhat * xhat).mean(-1).view(-1)


def backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dz: Tensor | None,
    y: Tensor | None,
    parameters: bool,
    c1: Tensor | None = None,
    c2: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx`, `dz` `[..., D]`, and the forward's `y` with the strides of `dx`, unless None;
    return `dw`, `db` `[D]` in the dtypes of weight and bias, unless `parameters` is false. `c1`,
    `c2` `[rows]`: the means of :func:`backward_means`, where they are those of more than these
    columns."""
    w, b = _parameters(call, weight, bias)
    dw = torch.zeros_like(w) if w is not None and parameters else None
    db = torch.zeros_like(b) if b is not None and parameters else None
    buffers, options = _Buffers(call, x), call.options
    after_norm, after_weight = rounding(options.numerics, *call.kind.dtypes[:2])
    sizes, strides = call.rows
    call = call._replace(rows=Rows(sizes, (*strides, strides[3])))
    for rows, (dyb, xb, zb, dxb, dzb, yb) in _blocks(call, dy, x, z, dx, dz, y):
        g, xg = _grouped(call, dyb), _grouped(call, xb)
        u = xg
        if zb is None:
            one, xhat = buffers.of(g, 2, dxb)
        else:
            one, slope, xhat, act = buffers.of(g, 4, dxb, dzb)
            _act_and_slope(call, _grouped(call, zb), act, slope)
            if not call.norm_before_gate:
                if c1 is not None:  # no mean of these columns: the forward's, so of its values
                    _act(call, _grouped(call, zb), act)
                u = torch.mul(xg, act, out=xhat)
        if mean is not None:
            mu = mean[rows].unsqueeze(-1)
            if not call.norm_before_gate and c1 is None:
                # This gate rounds differently from the forward's. Where a group has no variance,
                # that difference would be all that is left of `u - mean`.
                mu = u.mean(-1, keepdim=True)
            u = torch.sub(u, mu, out=xhat)
        r = rstd[rows].unsqueeze(-1)
        torch.mul(u, r, out=xhat)
        rounded = _round(call, xhat, after_norm)
        if zb is not None and call.norm_before_gate:
            h = _affine(call, rounded, w, b, after_weight, one)
            if yb is not None:
                yb.copy_((h * act).view(yb.shape))
            _product_into(dzb, torch.mul(g, h, out=one), slope)
            g = torch.mul(g, act, out=act)
        elif yb is not None:
            yb.copy_(_affine(call, rounded, w, b, after_weight, None).view(yb.shape))
        # One product serves dw, a sum over the rows, and c1, a sum over the columns.
        product = torch.mul(g, xhat, out=one)
        if dw is not None:
            dw += (product if rounded is xhat else g * rounded).sum(0)
        if db is not None:
            db += g.sum(0)
        product = product if w is None else product.mul_(w)
        if c1 is None:
            along = product.sum(-1, keepdim=True).div_(-call.group_size)
        else:
            along = -c1[rows].view(-1, 1, 1)
        du = torch.mul(g, 1.0 if w is None else w, out=one)
        if c2 is not None:
            du -= c2[rows].view(-1, 1, 1)
        elif not options.is_rms_norm:
            du -= du.mean(-1, keepdim=True)
        du.addcmul_(xhat, along)
        if not call.norm_before_gate:
            du *= r
            _product_into(dzb, torch.mul(du, xg, out=xhat), slope)
            _product_into(dxb, du, act)
        else:
            _product_into(dxb, du, r)
    return (
        None if dw is None or weight is None else dw.view(call.width).to(weight.dtype),
        None if db is None or bias is None else db.view(call.width).to(bias.dtype),
    )

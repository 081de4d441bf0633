"""SSD on a GPU: two Triton kernels forward, three backward. Symbols are those of
models/ssd_chunks.py; step sizes and decays are computed where they are needed, from dt itself.

Programs work for one head, or one group of heads, and one chunk, which a table gives: [N, 3], its
first token, its tokens, its sequence. The two that pass states on go through a sequence's chunks.
Tiles follow from the sizes of a chunk alone, so that its bits do not depend on other chunks.

Shape letters: T tokens of all sequences, N chunks, C chunk size, H heads, P head dimension,
G groups, R = H / G, S state size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(x, start, count, stride, column, WIDTH: tl.constexpr, BC: tl.constexpr):
    """The columns of a chunk's rows, zeros behind its last row."""
    i = tl.arange(0, BC)
    place = (start + i)[:, None] * stride + column[None, :]
    return tl.load(x + place, mask=(i < count)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(x, value, start, count, stride, column, WIDTH: tl.constexpr, BC: tl.constexpr):
    i = tl.arange(0, BC)
    place = (start + i)[:, None] * stride + column[None, :]
    ok = (i < count)[:, None] & (column < WIDTH)[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=ok)


@triton.jit
def _state(states, row, s, P: tl.constexpr, S: tl.constexpr, BP: tl.constexpr):
    """Columns s of a state [P, S]."""
    p = tl.arange(0, BP)
    place = row * P * S + p[:, None] * S + s[None, :]
    return tl.load(states + place, mask=(p < P)[:, None] & (s < S)[None, :], other=0.0)


@triton.jit
def _store_state(states, value, row, s, P: tl.constexpr, S: tl.constexpr, BP: tl.constexpr):
    p = tl.arange(0, BP)
    place = row * P * S + p[:, None] * S + s[None, :]
    ok = (p < P)[:, None] & (s < S)[None, :]
    tl.store(states + place, value.to(states.dtype.element_ty), mask=ok)


@triton.jit
def _steps(dt, bias, h, start, count, sdt, sdh, low, high, SOFTPLUS: tl.constexpr,
           BC: tl.constexpr):  # fmt: skip
    """dt + bias, its softplus, and that within the limits, which is 0 behind the chunk's end."""
    i = tl.arange(0, BC)
    raw = tl.load(dt + (start + i) * sdt + h * sdh, mask=i < count, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + h).to(tl.float32)
    soft = raw
    if SOFTPLUS:
        power = tl.exp(tl.minimum(raw, 20.0))
        near = 1 + power  # log(1 + power) without the digits that this sum loses
        soft = tl.where(near == 1, power, tl.log(near) * (power / tl.where(near == 1, 1, near - 1)))
        soft = tl.where(raw > 20, raw, soft)
    step = tl.where(soft < low, low, tl.where(soft > high, high, soft))
    return raw, soft, tl.where(i < count, step, 0.0)


@triton.jit
def _sums(step, A, h, SUM: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """G, the running sum of dt * A, and its last value."""
    total = tl.cumsum((step * tl.load(A + h).to(tl.float32)).to(SUM), axis=0)
    return total, tl.sum(tl.where(tl.arange(0, BC) == C - 1, total, 0.0), axis=0)


@triton.jit
def _pass_states(x, b, dt, A, bias, initial, table, bounds, states, final, low, high,
                 sxt, sxh, sbt, sbg, sdt, sdh, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
                 SUM: tl.constexpr, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                 P: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
                 BS: tl.constexpr):  # fmt: skip
    """Writes h to states[n], then h = e^G_C h + (e^(G_C - G) dt x)^T B, chunk after chunk; or in
    reverse, of gradients dh, x being dy and B being C: dh = e^G_C dh + (e^G dy)^T C."""
    row, s = tl.program_id(0).to(tl.int64), tl.program_id(1) * BS + tl.arange(0, BS)
    sequence, h, p = row // H, row % H, tl.arange(0, BP)
    if initial is not None:
        state = _state(initial, row, s, P, S, BP)
    else:
        state = tl.zeros((BP, BS), tl.float32)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    for index in range(end - begin):
        n = (end - 1 - index if REVERSE else begin + index).to(tl.int64)
        start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
        left = _rows(x + h * sxh, start, count, sxt, p, P, BC)
        right = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        _, _, step = _steps(dt, bias, h, start, count, sdt, sdh, low, high, SOFTPLUS, BC)
        total, last = _sums(step, A, h, SUM, C, BC)
        _store_state(states, state, n * H + h, s, P, S, BP)
        weight = tl.exp(total.to(tl.float32))
        if not REVERSE:
            weight = step * tl.exp((last - total).to(tl.float32))
        left = (left.to(tl.float32) * weight[:, None]).to(left.dtype)
        state *= tl.exp(last.to(tl.float32))
        state = tl.dot(tl.trans(left), right, state, input_precision="ieee")
    if final is not None:
        _store_state(final, state, row, s, P, S, BP)


@triton.jit
def _outputs(x, b, c, dt, A, bias, skip, states, table, y, low, high,
             sxt, sxh, sbt, sbg, sct, scg, sdt, sdh, SOFTPLUS: tl.constexpr, SUM: tl.constexpr,
             H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
             BC: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """y = tril(C B^T * exp(G_i - G_j)) (dt x) + e^G C h^T + D x."""
    n, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    i, p = tl.arange(0, BC), tl.arange(0, BP)
    scores, out = tl.zeros((BC, BC), tl.float32), tl.zeros((BC, BP), tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        maps = _rows(c + h // R * scg, start, count, sct, s, S, BC)
        keys = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        state = _state(states, n * H + h, s, P, S, BP)
        scores = tl.dot(maps, tl.trans(keys), scores, input_precision="ieee")
        out = tl.dot(maps, tl.trans(state), out, input_precision="ieee")
    _, _, step = _steps(dt, bias, h, start, count, sdt, sdh, low, high, SOFTPLUS, BC)
    total, _ = _sums(step, A, h, SUM, C, BC)
    tile = _rows(x + h * sxh, start, count, sxt, p, P, BC)
    lower = (total[:, None] - total[None, :]).to(tl.float32)
    lower = tl.exp(tl.where(i[:, None] >= i[None, :], lower, float("-inf")))
    attn = (scores * lower * step[None, :]).to(tile.dtype)
    out *= tl.exp(total.to(tl.float32))[:, None]
    out = tl.dot(attn, tile, out, input_precision="ieee")
    if skip is not None:
        out += tile.to(tl.float32) * tl.load(skip + h).to(tl.float32)
    _store_rows(y + h * P, out, start, count, H * P, p, P, BC)


@triton.jit
def _maps_backward(dy, x, b, c, dt, A, bias, states, dends, table, db, dc, dtotal, N, sgt, low,
                   high, sdyt, sdyh, sxt, sxh, sbt, sbg, sct, scg, sdt, sdh, SOFTPLUS: tl.constexpr,
                   SUM: tl.constexpr, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                   P: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
                   BS: tl.constexpr):  # fmt: skip
    """Of a chunk and a group, and some columns s of B and C, summed over the heads::

        dM = sum_r tril(dy (dt x)^T * exp(G_i - G_j))
        dC = dM B + sum_r e^G dy h,      dB = dM^T C + sum_r (e^(G_C - G) dt x) dh'

    and what a head's part of these adds to dG: C . dC - B . dB, and for the state, at the chunk's
    end, e^G_C <h, dh'> + sum_j B_j . dB_j.
    """
    n, group = tl.program_id(0).to(tl.int64) // (H // R), tl.program_id(0) % (H // R)
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    i, p, s = tl.arange(0, BC), tl.arange(0, BP), tl.program_id(1) * BS + tl.arange(0, BS)
    keys = _rows(b + group * sbg, start, count, sbt, s, S, BC)
    maps = _rows(c + group * scg, start, count, sct, s, S, BC)
    # of the columns s: their sum over the slices is C B^T
    scores = tl.dot(maps, tl.trans(keys), input_precision="ieee")
    dscores = tl.zeros((BC, BC), tl.float32)
    dmaps, dkeys = tl.zeros((BC, BS), tl.float32), tl.zeros((BC, BS), tl.float32)
    for r in range(R):
        h = group * R + r
        out = _rows(dy + h * sdyh, start, count, sdyt, p, P, BC)
        tile = _rows(x + h * sxh, start, count, sxt, p, P, BC)
        before = _state(states, n * H + h, s, P, S, BP)
        after = _state(dends, n * H + h, s, P, S, BP)
        _, _, step = _steps(dt, bias, h, start, count, sdt, sdh, low, high, SOFTPLUS, BC)
        total, last = _sums(step, A, h, SUM, C, BC)
        lower = (total[:, None] - total[None, :]).to(tl.float32)
        lower = tl.exp(tl.where(i[:, None] >= i[None, :], lower, float("-inf")))
        grad = tl.dot(out, tl.trans(tile), input_precision="ieee") * lower * step[None, :]
        dscores += grad
        # summed in the dtype of G: the running sum that follows cancels what the two have in common
        weighted = (grad * scores).to(SUM)
        change = tl.sum(weighted, axis=1) - tl.sum(weighted, axis=0)
        part = tl.dot(out, before, input_precision="ieee")
        part *= tl.exp(total.to(tl.float32))[:, None]
        change += tl.sum(part * maps.to(tl.float32), axis=1).to(SUM)
        dmaps += part
        part = tl.dot(tile, after, input_precision="ieee")
        part *= (step * tl.exp((last - total).to(tl.float32)))[:, None]
        shrunk = tl.sum(part * keys.to(tl.float32), axis=1).to(SUM)
        dkeys += part
        kept = tl.sum(tl.sum(before.to(tl.float32) * after.to(tl.float32), axis=1), axis=0)
        kept = kept * tl.exp(last.to(tl.float32)) + tl.sum(shrunk, axis=0)
        change += tl.where(i == C - 1, kept, 0.0) - shrunk
        place = ((tl.program_id(1) * N + n) * H + h) * C + i
        tl.store(dtotal + place, change, mask=i < C)
    dscores = dscores.to(keys.dtype)
    dmaps = tl.dot(dscores, keys, dmaps, input_precision="ieee")
    dkeys = tl.dot(tl.trans(dscores), maps, dkeys, input_precision="ieee")
    _store_rows(dc + group * S, dmaps, start, count, sgt, s, S, BC)
    _store_rows(db + group * S, dkeys, start, count, sgt, s, S, BC)


@triton.jit
def _inputs_backward(dy, x, b, c, dt, A, bias, skip, dends, dtotal, table, dx, ddt, sums, N, sgt,
                     low, high, sdyt, sdyh, sxt, sxh, sbt, sbg, sct, scg, sdt, sdh,
                     SLICES: tl.constexpr, SOFTPLUS: tl.constexpr, SUM: tl.constexpr,
                     H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
                     S: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
                     BS: tl.constexpr):  # fmt: skip
    """dw = (C B^T * exp(G_i - G_j))^T dy + e^(G_C - G) B dh'^T, the gradient of dt x; dx = dt dw +
    D dy; that of dt, x . dw + A dg, back through limits and softplus. g enters through its running
    sum, so dg is the running sum of dG from the end. And the chunk's sums for A, bias and D."""
    n, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    i, p = tl.arange(0, BC), tl.arange(0, BP)
    scores, dwrite = tl.zeros((BC, BC), tl.float32), tl.zeros((BC, BP), tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        maps = _rows(c + h // R * scg, start, count, sct, s, S, BC)
        keys = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        after = _state(dends, n * H + h, s, P, S, BP)
        scores = tl.dot(keys, tl.trans(maps), scores, input_precision="ieee")
        dwrite = tl.dot(keys, tl.trans(after), dwrite, input_precision="ieee")
    raw, soft, step = _steps(dt, bias, h, start, count, sdt, sdh, low, high, SOFTPLUS, BC)
    total, last = _sums(step, A, h, SUM, C, BC)
    out = _rows(dy + h * sdyh, start, count, sdyt, p, P, BC)
    upper = (total[None, :] - total[:, None]).to(tl.float32)
    upper = tl.exp(tl.where(i[None, :] >= i[:, None], upper, float("-inf")))
    dwrite *= tl.exp((last - total).to(tl.float32))[:, None]
    dwrite = tl.dot((scores * upper).to(out.dtype), out, dwrite, input_precision="ieee")

    tile = _rows(x + h * sxh, start, count, sxt, p, P, BC).to(tl.float32)
    grad = tl.sum(dwrite * tile, axis=1)
    out, place = out.to(tl.float32), sums + n * 3 * H + h
    dwrite *= step[:, None]
    if skip is not None:
        dwrite += out * tl.load(skip + h).to(tl.float32)
        tl.store(place + 2 * H, tl.sum(tl.sum(out * tile, axis=1), axis=0))
    _store_rows(dx + h * P, dwrite, start, count, sgt, p, P, BC)

    change = tl.zeros((BC,), SUM)
    for part in range(SLICES):
        change += tl.load(dtotal + ((part * N + n) * H + h) * C + i, mask=i < C, other=0.0)
    change = tl.cumsum(change, axis=0, reverse=True).to(tl.float32)
    tl.store(place, tl.sum(change * step, axis=0))
    grad += change * tl.load(A + h).to(tl.float32)
    if SOFTPLUS:
        grad *= tl.sigmoid(raw)
    grad = tl.where((i < count) & (soft >= low) & (soft <= high), grad, 0.0)
    tl.store(place + H, tl.sum(grad, axis=0))
    tl.store(ddt + (start + i) * H + h, grad.to(ddt.dtype.element_ty), mask=i < count)


class Steps(NamedTuple):
    """How step sizes come from dt: whether by softplus, and their limits."""

    softplus: bool
    low: float
    high: float


# By the bytes of an element: how many columns of a state each kernel takes at a time, and how it is
# computed. No sum depends on how many chunks, sequences or heads there are.
TILES = {
    2: {
        _pass_states: (64, {"num_warps": 4}),
        _outputs: (128, {"num_warps": 4}),
        _maps_backward: (64, {"num_warps": 8}),
        _inputs_backward: (128, {"num_warps": 4}),
    },
    4: {
        _pass_states: (16, {"num_warps": 4, "num_stages": 1}),
        _outputs: (32, {"num_warps": 8}),
        _maps_backward: (16, {"num_warps": 8, "num_stages": 1}),
        _inputs_backward: (32, {"num_warps": 8}),
    },
}


def supports(x: Tensor, chunk_size: int) -> bool:
    """Whether a chunk of a head fits a program: x [B, T, H, P]."""
    return chunk_size <= 64 and chunk_size * x.shape[3] <= 8192


class _Call:
    """What the launches of a call share: sizes, and tensors with all tokens in one row."""

    def __init__(self, x, dt, A, b, c, skip, bias, steps: Steps, chunk_size, table, bounds):
        (self.heads, self.dim), (self.groups, self.state) = x.shape[2:], b.shape[2:]
        self.x, self.b, self.c = (_tokens(t.to(x.dtype)) for t in (x, b, c))
        self.dt = dt.flatten(0, 1)
        self.A, self.bias, self.skip = (
            None if t is None else t.contiguous() for t in (A, bias, skip)
        )
        self.table, self.bounds, self.chunks = table, bounds, len(table)
        self.sequences, self.limits = len(bounds) - 1, (steps.low, steps.high)
        self.bytes = x.element_size()
        self.sizes = {
            "SOFTPLUS": steps.softplus, "SUM": tl.float32 if self.bytes == 2 else tl.float64,
            "H": self.heads, "R": self.heads // self.groups, "C": chunk_size, "P": self.dim,
            "S": self.state, "BC": _tile(chunk_size), "BP": _tile(self.dim),
        }  # fmt: skip

    def columns(self, kernel) -> int:
        """How many columns of a state the kernel takes at a time."""
        return min(_tile(self.state), TILES[self.bytes][kernel][0])

    def launch(self, kernel, grid: tuple[int, ...], *arguments, strided, **constants) -> None:
        """``strided``: the tensors whose strides the kernel reads last."""
        strides = [stride for t in strided for stride in t.stride()[:2]]
        options = TILES[self.bytes][kernel][1]
        kernel[grid](
            *arguments, *self.limits, *strides, BS=self.columns(kernel), **constants, **self.sizes,
            **options,
        )  # fmt: skip

    def pass_states(self, x, b, initial, states, final, reverse: bool) -> None:
        slices = triton.cdiv(self.state, self.columns(_pass_states))
        self.launch(
            _pass_states, (self.sequences * self.heads, slices), x, b, self.dt, self.A, self.bias,
            initial, self.table, self.bounds, states, final, strided=(x, b, self.dt),
            REVERSE=reverse,
        )  # fmt: skip


def _tile(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _tokens(x: Tensor) -> Tensor:
    """[B, T, ...] as [B * T, ...] of unit last stride, a view if it has that."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)


def _empty_like(x: Tensor) -> Tensor:
    """Without the strides of x, which may be a slice."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def forward(x, dt, A, b, c, skip, bias, initial, room, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, the final states [sequences, H, P, S] fp32, and for ``backward`` the states before
    every chunk [room, H, P, S], in the dtype of x and with zeros where there is no chunk.

    x [B, T, H, P], dt [B, T, H], A, skip and bias [H], b and c [B, T, G, S], initial like the final
    states; skip, bias, initial may be None. The rest: ``Steps``, the chunk size, the table of
    chunks, and the offsets in it of the sequences' chunks.
    """
    z = _Call(x, dt, A, b, c, skip, bias, *rest)
    y, shape = _empty_like(x), (z.heads, z.dim, z.state)
    final = torch.empty(z.sequences, *shape, dtype=torch.float32, device=x.device)
    states = torch.empty(room, *shape, dtype=x.dtype, device=x.device)
    if room > z.chunks:
        states[z.chunks :] = 0
    z.pass_states(z.x, z.b, initial, states, final, reverse=False)
    tensors = (z.x, z.b, z.c, z.dt)
    z.launch(
        _outputs, (z.chunks * z.heads,), *tensors, z.A, z.bias, z.skip, states, z.table, y,
        strided=tensors,
    )  # fmt: skip
    return y, final, states


def backward(dy, dfinal, x, dt, A, b, c, skip, bias, initial, states, *rest):
    """The gradients of x, dt, A, b, c, skip, bias and initial, None for those that are None; dy
    like x, dfinal like the final states or None, and the rest as ``forward`` read and gave it."""
    z = _Call(x, dt, A, b, c, skip, bias, *rest)
    dy = _tokens(dy.to(x.dtype))
    dends = torch.empty_like(states)
    dinitial = None if initial is None else _empty_like(initial)
    z.pass_states(dy, z.c, dfinal, dends, dinitial, reverse=True)

    tensors = (dy, z.x, z.b, z.c, z.dt)
    widths = [z.heads * z.dim, *(z.groups * z.state,) * 2]
    grads = torch.empty(*x.shape[:2], sum(widths), dtype=x.dtype, device=x.device)
    dx, db, dc = (  # side by side, as the model's x, B and C are: their gradient is one tensor
        part.view(t.shape) for part, t in zip(grads.split(widths, -1), (x, b, c), strict=True)
    )
    ddt = _empty_like(dt)
    slices = triton.cdiv(z.state, z.columns(_maps_backward))
    kind = {"dtype": torch.float32 if z.bytes == 2 else torch.float64, "device": x.device}
    dtotal = torch.empty(slices, z.chunks, z.heads, z.sizes["C"], **kind)
    z.launch(
        _maps_backward, (z.chunks * z.groups, slices), *tensors, z.A, z.bias, states, dends,
        z.table, db, dc, dtotal, z.chunks, sum(widths), strided=tensors,
    )  # fmt: skip
    sums = torch.empty(z.chunks, 3, z.heads, dtype=torch.float32, device=x.device)
    z.launch(
        _inputs_backward, (z.chunks * z.heads,), *tensors, z.A, z.bias, z.skip, dends, dtotal,
        z.table, dx, ddt, sums, z.chunks, sum(widths), strided=tensors,
        SLICES=slices,
    )  # fmt: skip
    dA, dbias, dskip = sums.sum(0).unbind()
    dskip, dbias = None if skip is None else dskip, None if bias is None else dbias
    return dx, ddt, dA, db, dc, dskip, dbias, dinitial

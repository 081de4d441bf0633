"""SSD on a GPU: three Triton kernels forward, three backward. Symbols are those of
models/ssd_chunks.py.

Programs work for one head, or one group of heads, and one chunk, which a table gives: [N, 3], its
first token, its tokens, its sequence. The two that pass states on go through a sequence's chunks.
Tiles follow from the sizes of a chunk alone, so that its bits do not depend on other chunks.

Shape letters: T tokens of all sequences, N chunks, C chunk size, H heads, P head dimension,
G groups, R = H / G, S state size.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.chunks import decay_dtype

LOG2E = tl.constexpr(1.4426950408889634)  # G is kept times this, for exp2


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
def _steps(dt, bias, place, h, there, low, high, SOFTPLUS: tl.constexpr):
    """dt + bias, its softplus, and that within the limits."""
    raw = tl.load(dt + place, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + h, mask=h >= 0, other=0.0).to(tl.float32)
    soft = raw
    if SOFTPLUS:
        power = tl.exp(tl.minimum(raw, 20.0))
        near = 1 + power  # log(1 + power) without the digits that this sum loses
        soft = tl.where(near == 1, power, tl.log(near) * (power / tl.where(near == 1, 1, near - 1)))
        soft = tl.where(raw > 20, raw, soft)
    return raw, soft, tl.where(soft < low, low, tl.where(soft > high, high, soft))


@triton.jit
def _decays(dt, A, bias, table, decays, low, high, sdt, sdh, SOFTPLUS: tl.constexpr,
            H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """The step sizes, 0 behind a chunk's end, and G: the running sum of dt * A, times log2(e)."""
    blocks = (H + BH - 1) // BH
    n, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    i, h = tl.arange(0, BC)[:, None], block * BH + tl.arange(0, BH)[None, :]
    head = tl.minimum(h, H - 1)
    place = (start + i) * sdt + head * sdh
    _, _, step = _steps(dt, bias, place, head, i < count, low, high, SOFTPLUS)
    step = tl.where(i < count, step, 0.0).to(decays.dtype.element_ty)
    rate = tl.load(A + head).to(step.dtype) * LOG2E
    there = (i < C) & (h < H)
    tl.store(decays + (2 * n * H + h) * C + i, step, mask=there)
    tl.store(decays + ((2 * n + 1) * H + h) * C + i, tl.cumsum(step * rate, axis=0), mask=there)


@triton.jit
def _decays_of(decays, n, h, H: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """Step sizes, G, and its last value, which G keeps behind the chunk."""
    i, row = tl.arange(0, BC), ((2 * n + 1) * H + h) * C
    step = tl.load(decays + row - H * C + i, mask=i < C, other=0.0).to(tl.float32)
    return step, tl.load(decays + row + tl.minimum(i, C - 1)), tl.load(decays + row + C - 1)


@triton.jit
def _pass_states(x, b, decays, initial, table, bounds, states, final, sxt, sxh, sbt, sbg,
                 REVERSE: tl.constexpr, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
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
    begin = tl.load(bounds + sequence).to(tl.int64)
    chunks = (tl.load(bounds + sequence + 1) - begin).to(tl.int32)
    some, last_row = chunks > 0, table + 3 * (begin + chunks - 1)
    token = tl.load(table + 3 * begin, mask=some, other=0).to(tl.int64)
    stop = tl.load(last_row, mask=some, other=0) + tl.load(last_row + 1, mask=some, other=0)
    for index in range(chunks):
        n = chunks - 1 - index if REVERSE else index
        start = token + n * C
        count = tl.minimum(C, stop - start)
        left = _rows(x + h * sxh, start, count, sxt, p, P, BC)
        right = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        step, total, last = _decays_of(decays, begin + n, h, H, C, BC)
        _store_state(states, state, (begin + n) * H + h, s, P, S, BP)
        if REVERSE:
            weight = tl.exp2(total.to(tl.float32))
        else:
            weight = step * tl.exp2((last - total).to(tl.float32))
        left = (left.to(tl.float32) * weight[:, None]).to(left.dtype)
        state *= tl.exp2(last.to(tl.float32))
        state = tl.dot(tl.trans(left), right, state, input_precision="ieee")
    if final is not None:
        _store_state(final, state, row, s, P, S, BP)


@triton.jit
def _outputs(x, b, c, decays, skip, states, table, y, sxt, sxh, sbt, sbg, sct, scg,
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
    step, total, _ = _decays_of(decays, n, h, H, C, BC)
    tile = _rows(x + h * sxh, start, count, sxt, p, P, BC)
    lower = (total[:, None] - total[None, :]).to(tl.float32)
    lower = tl.exp2(tl.where(i[:, None] >= i[None, :], lower, float("-inf")))
    attn = (scores * lower * step[None, :]).to(tile.dtype)
    out *= tl.exp2(total.to(tl.float32))[:, None]
    out = tl.dot(attn, tile, out, input_precision="ieee")
    if skip is not None:
        out += tile.to(tl.float32) * tl.load(skip + h).to(tl.float32)
    _store_rows(y + h * P, out, start, count, H * P, p, P, BC)


@triton.jit
def _maps_backward(dy, x, b, c, decays, states, dends, table, db, dc, sgt,
                   sdyt, sdyh, sxt, sxh, sbt, sbg, sct, scg, H: tl.constexpr, R: tl.constexpr,
                   C: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
                   BP: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Of a chunk and a group, and some columns of B and C, summed over the heads::

    dM = sum_r tril(dy (dt x)^T * exp(G_i - G_j))
    dC = dM B + sum_r e^G dy h,      dB = dM^T C + sum_r (e^(G_C - G) dt x) dh'
    """
    n, group = tl.program_id(0).to(tl.int64) // (H // R), tl.program_id(0) % (H // R)
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    i, p, s = tl.arange(0, BC), tl.arange(0, BP), tl.program_id(1) * BS + tl.arange(0, BS)
    dscores = tl.zeros((BC, BC), tl.float32)
    dmaps, dkeys = tl.zeros((BC, BS), tl.float32), tl.zeros((BC, BS), tl.float32)
    for r in range(R):
        h = group * R + r
        out = _rows(dy + h * sdyh, start, count, sdyt, p, P, BC)
        tile = _rows(x + h * sxh, start, count, sxt, p, P, BC)
        before = _state(states, n * H + h, s, P, S, BP)
        after = _state(dends, n * H + h, s, P, S, BP)
        step, total, last = _decays_of(decays, n, h, H, C, BC)
        lower = (total[:, None] - total[None, :]).to(tl.float32)
        lower = tl.exp2(tl.where(i[:, None] >= i[None, :], lower, float("-inf")))
        dattn = tl.dot(out, tl.trans(tile), input_precision="ieee")
        dscores += dattn * lower * step[None, :]
        weight = tl.exp2(total.to(tl.float32))
        left = (out.to(tl.float32) * weight[:, None]).to(out.dtype)
        dmaps = tl.dot(left, before, dmaps, input_precision="ieee")
        weight = step * tl.exp2((last - total).to(tl.float32))
        left = (tile.to(tl.float32) * weight[:, None]).to(tile.dtype)
        dkeys = tl.dot(left, after, dkeys, input_precision="ieee")
    keys = _rows(b + group * sbg, start, count, sbt, s, S, BC)
    maps = _rows(c + group * scg, start, count, sct, s, S, BC)
    dscores = dscores.to(keys.dtype)
    dmaps = tl.dot(dscores, keys, dmaps, input_precision="ieee")
    dkeys = tl.dot(tl.trans(dscores), maps, dkeys, input_precision="ieee")
    _store_rows(dc + group * S, dmaps, start, count, sgt, s, S, BC)
    _store_rows(db + group * S, dkeys, start, count, sgt, s, S, BC)


@triton.jit
def _inputs_backward(dy, x, b, c, dt, A, bias, decays, skip, states, dends, table, dx, ddt, sums,
                     sgt, low, high, sdyt, sdyh, sxt, sxh, sbt, sbg, sct, scg, sdt, sdh,
                     SOFTPLUS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                     P: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
                     BS: tl.constexpr):  # fmt: skip
    """With M = tril(C B^T * exp(G_i - G_j)) and W = M * dy (dt x)^T::

        dw = M^T dy + e^(G_C - G) B dh'^T, the gradient of w = dt x;      dx = dt dw + D dy
        dG = W 1 - W^T 1 + e^G dy . C h^T - e^(G_C - G) w . B dh'^T, and at the end of the chunk
             e^G_C <h, dh'> + sum_j e^(G_C - G_j) w_j . B_j dh'^T

    g enters through its running sum, so dg is the running sum of dG from the end. The gradient of
    dt, x . dw + A dg, goes back through limits and softplus. And the chunk's sums for A, bias, D.
    """
    n, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    i, p = tl.arange(0, BC), tl.arange(0, BP)
    scores, kept = tl.zeros((BC, BC), tl.float32), 0.0  # M, transposed, and <h, dh'>
    read, dwrite = tl.zeros((BC, BP), tl.float32), tl.zeros((BC, BP), tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        maps = _rows(c + h // R * scg, start, count, sct, s, S, BC)
        keys = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        before, after = (
            _state(states, n * H + h, s, P, S, BP),
            _state(dends, n * H + h, s, P, S, BP),
        )
        scores = tl.dot(keys, tl.trans(maps), scores, input_precision="ieee")
        read = tl.dot(maps, tl.trans(before), read, input_precision="ieee")
        dwrite = tl.dot(keys, tl.trans(after), dwrite, input_precision="ieee")
        kept += tl.sum(before.to(tl.float32) * after.to(tl.float32))
    step, total, last = _decays_of(decays, n, h, H, C, BC)
    out = _rows(dy + h * sdyh, start, count, sdyt, p, P, BC)
    tile = _rows(x + h * sxh, start, count, sxt, p, P, BC)
    upper = (total[None, :] - total[:, None]).to(tl.float32)
    scores *= tl.exp2(tl.where(i[None, :] >= i[:, None], upper, float("-inf")))
    # summed in the dtype of G: the running sum that follows cancels what the sums have in common
    weighted = tl.dot(tile, tl.trans(out), input_precision="ieee") * scores * step[:, None]
    weighted = weighted.to(total.dtype)
    change = tl.sum(weighted, axis=0) - tl.sum(weighted, axis=1)
    read *= tl.exp2(total.to(tl.float32))[:, None] * out.to(tl.float32)
    dwrite *= tl.exp2((last - total).to(tl.float32))[:, None]
    shrunk = (dwrite * tile.to(tl.float32) * step[:, None]).to(total.dtype)
    kept = kept * tl.exp2(last.to(tl.float32)) + tl.sum(shrunk)
    change += tl.sum(read.to(total.dtype) - shrunk, axis=1) + tl.where(i == C - 1, kept, 0.0)
    change = tl.cumsum(change, axis=0, reverse=True).to(tl.float32)
    dwrite = tl.dot(scores.to(out.dtype), out, dwrite, input_precision="ieee")

    out, tile, place = out.to(tl.float32), tile.to(tl.float32), sums + n * 3 * H + h
    tl.store(place, tl.sum(change * step))
    grad = tl.sum(dwrite * tile, axis=1) + change * tl.load(A + h).to(tl.float32)
    raw, soft, _ = _steps(dt, bias, (start + i) * sdt + h * sdh, h, i < count, low, high, SOFTPLUS)
    if SOFTPLUS:
        grad *= tl.sigmoid(raw)
    grad = tl.where((i < count) & (soft >= low) & (soft <= high), grad, 0.0)
    tl.store(place + H, tl.sum(grad))
    tl.store(ddt + (start + i) * H + h, grad.to(ddt.dtype.element_ty), mask=i < count)
    dwrite *= step[:, None]
    if skip is not None:
        dwrite += out * tl.load(skip + h).to(tl.float32)
        tl.store(place + 2 * H, tl.sum(out * tile))
    _store_rows(dx + h * P, dwrite, start, count, sgt, p, P, BC)


class Steps(NamedTuple):
    """How step sizes come from dt: whether by softplus, and their limits."""

    softplus: bool
    low: float
    high: float


# By the bytes of an element: how many columns of a state a kernel takes at a time, for heads of up
# to 64 channels, and how it is computed. Neither follows from the number of chunks or sequences.
TILES = {
    2: {
        _pass_states: (64, {"num_warps": 4}),
        _outputs: (128, {"num_warps": 4}),
        _maps_backward: (128, {"num_warps": 8, "num_stages": 2}),
        _inputs_backward: (128, {"num_warps": 4}),
    },
    4: {
        _pass_states: (16, {"num_warps": 4, "num_stages": 1}),
        _outputs: (32, {"num_warps": 8}),
        _maps_backward: (16, {"num_warps": 8, "num_stages": 1}),
        _inputs_backward: (16, {"num_warps": 8, "num_stages": 1}),
    },
}


def supports(x: Tensor, chunk_size: int) -> bool:
    """Whether a chunk of a head fits a program: x [B, T, H, P]."""
    return chunk_size <= 64 and chunk_size * x.shape[3] <= 8192


class _Call:
    """What the launches of a call share: sizes, and tensors with all tokens in one row."""

    def __init__(self, x, b, c, chunk_size, table, bounds):
        (self.heads, self.dim), (self.groups, self.state) = x.shape[2:], b.shape[2:]
        self.x, self.b, self.c = (_tokens(t.to(x.dtype)) for t in (x, b, c))
        self.table, self.bounds = table, bounds
        self.chunks, self.sequences, self.bytes = len(table), len(bounds) - 1, x.element_size()
        self.sizes = {
            "H": self.heads, "R": self.heads // self.groups, "C": chunk_size, "P": self.dim,
            "S": self.state, "BC": _tile(chunk_size), "BP": _tile(self.dim),
        }  # fmt: skip

    def tile(self, kernel) -> tuple[int, dict[str, int]]:
        """The columns that the kernel takes at a time, and how it is computed."""
        columns, options = TILES[self.bytes][kernel]
        if self.sizes["BP"] > 64:
            columns, options = columns * 64 // self.sizes["BP"], options | {"num_warps": 8}
        if _little_shared_memory(self.x.device):
            options = options | {"num_stages": 1}
        return min(_tile(self.state), max(16, columns)), options

    def slices(self, kernel) -> int:
        """How many programs share the columns of a state."""
        return triton.cdiv(self.state, self.tile(kernel)[0])

    def launch(self, kernel, grid: tuple[int, ...], *arguments, strided, **constants) -> None:
        """``strided``: the tensors whose strides the kernel reads last."""
        columns, options = self.tile(kernel)
        kernel[grid](
            *arguments, *_strides(*strided), BS=columns, **constants, **self.sizes, **options
        )

    def pass_states(self, x, b, decays, initial, states, final, reverse: bool) -> None:
        grid = (self.sequences * self.heads, self.slices(_pass_states))
        self.launch(
            _pass_states, grid, x, b, decays, initial, self.table, self.bounds, states, final,
            strided=(x, b), REVERSE=reverse,
        )  # fmt: skip


@functools.cache
def _little_shared_memory(device: torch.device) -> bool:
    """Whether it holds what a program reads, and not what the next step of its loop will read."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 160 * 1024


def _tile(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _tokens(x: Tensor) -> Tensor:
    """[B, T, ...] as [B * T, ...] of unit last stride, a view if it has that."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def decay_shape(x: Tensor, chunk_size: int) -> tuple[torch.dtype, int]:
    """Of what ``forward`` keeps of a chunk besides its state: the dtype, and how many elements."""
    return decay_dtype(x.dtype), 2 * x.shape[2] * chunk_size


def forward(x, dt, A, b, c, skip, bias, initial, room, steps, chunk_size, table, bounds):
    """y like x, the final states [sequences, H, P, S] fp32, and what ``backward`` reads of every
    chunk: the states before it [room, H, P, S] in the dtype of x, and step sizes and decays
    [room, 2, H, C]; with zeros where there is no chunk.

    x [B, T, H, P], dt [B, T, H], A, skip and bias [H], b and c [B, T, G, S], initial like the final
    states; skip, bias, initial may be None; the table of chunks, and the offsets in it of the
    sequences' chunks.
    """
    z = _Call(x, b, c, chunk_size, table, bounds)
    A, skip, bias, initial = _contiguous(A, skip, bias, initial)
    kind, shape = {"device": x.device}, (z.heads, z.dim, z.state)
    y = torch.empty(x.shape, dtype=x.dtype, **kind)
    final = torch.empty(z.sequences, *shape, dtype=torch.float32, **kind)
    states = torch.empty(room, *shape, dtype=x.dtype, **kind)
    decays = torch.empty(room, 2, z.heads, chunk_size, dtype=decay_dtype(x.dtype), **kind)
    if room > z.chunks:
        states[z.chunks :], decays[z.chunks :] = 0, 0
    dt, block = dt.flatten(0, 1), min(32, triton.next_power_of_2(z.heads))
    _decays[(z.chunks * triton.cdiv(z.heads, block),)](
        dt, A, bias, table, decays, steps.low, steps.high, *_strides(dt), steps.softplus,
        z.heads, chunk_size, z.sizes["BC"], block,
    )  # fmt: skip
    z.pass_states(z.x, z.b, decays, initial, states, final, reverse=False)
    tensors = (z.x, z.b, z.c)
    z.launch(
        _outputs, (z.chunks * z.heads,), *tensors, decays, skip, states, table, y, strided=tensors
    )
    return y, final, states, decays


def backward(
    dy,
    dfinal,
    x,
    dt,
    A,
    b,
    c,
    skip,
    bias,
    initial,
    states,
    decays,
    steps,
    chunk_size,
    table,
    bounds,
):
    """The gradients of x, dt, A, b, c, skip, bias and initial, None for those that are None; dy
    like x, dfinal like the final states or None, and the rest as ``forward`` read and gave it."""
    z = _Call(x, b, c, chunk_size, table, bounds)
    A, skip, bias, dfinal = _contiguous(A, skip, bias, dfinal)
    dy, dt_rows, kind = _tokens(dy.to(x.dtype)), dt.flatten(0, 1), {"device": x.device}
    dends = torch.empty_like(states)
    dinitial = None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, **kind)
    z.pass_states(dy, z.c, decays, dfinal, dends, dinitial, reverse=True)

    # side by side, as x, B and C of a model are: their gradient is one tensor
    widths = [z.heads * z.dim, *(z.groups * z.state,) * 2]
    columns, tensors = sum(widths), (dy, z.x, z.b, z.c)
    grads = torch.empty(*x.shape[:2], columns, dtype=x.dtype, **kind).split(widths, -1)
    dx, db, dc = (part.view(t.shape) for part, t in zip(grads, (x, b, c), strict=True))
    z.launch(
        _maps_backward, (z.chunks * z.groups, z.slices(_maps_backward)), *tensors, decays, states,
        dends, table, db, dc, columns, strided=tensors,
    )  # fmt: skip
    ddt = torch.empty(dt.shape, dtype=dt.dtype, **kind)
    sums = torch.empty(z.chunks, 3, z.heads, dtype=torch.float32, **kind)
    z.launch(
        _inputs_backward, (z.chunks * z.heads,), *tensors, dt_rows, A, bias, decays, skip, states,
        dends, table, dx, ddt, sums, columns, steps.low, steps.high, strided=(*tensors, dt_rows),
        SOFTPLUS=steps.softplus,
    )  # fmt: skip
    dA, dbias, dskip = sums.sum(0).unbind()
    dskip, dbias = None if skip is None else dskip, None if bias is None else dbias
    return dx, ddt, dA, db, dc, dskip, dbias, dinitial

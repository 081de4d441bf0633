"""The kernels of SSD; models/kernels/ssd.py starts them. Symbols are those of models/ssd_chunks.py.

Programs work for one head, or one group of heads, and one chunk, which a table gives: [N, 3], its
first token, its tokens, its sequence. The one that passes states on goes through a sequence's
chunks. Tiles follow from the sizes of a chunk alone, so that its bits do not depend on others.

Shape letters: T tokens of all sequences, N chunks, C chunk size, H heads, P head dimension,
G groups, R = H / G, S state size.
"""

import triton
import triton.language as tl

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
        soft = tl.where(raw <= 20, soft, raw)  # raw where it is NaN too: a minimum hides that
    return raw, soft, tl.where(soft < low, low, tl.where(soft > high, high, soft))


@triton.jit
def sum_decays(dt, A, bias, table, decays, low, high, sdt, sdh, SOFTPLUS: tl.constexpr,
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
def pass_states(x, b, decays, initial, table, bounds, states, final, sxt, sxh, sbt, sbg,
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
def outputs(x, b, c, decays, skip, states, table, y, sxt, sxh, sbt, sbg, sct, scg,
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
def maps_backward(dy, x, b, c, decays, states, dends, table, db, dc, kept, N, sgt,
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
        both = tl.sum(before.to(tl.float32) * after.to(tl.float32))
        tl.store(kept + (tl.program_id(1) * N + n) * H + h, both)
    keys = _rows(b + group * sbg, start, count, sbt, s, S, BC)
    maps = _rows(c + group * scg, start, count, sct, s, S, BC)
    dscores = dscores.to(keys.dtype)
    dmaps = tl.dot(dscores, keys, dmaps, input_precision="ieee")
    dkeys = tl.dot(tl.trans(dscores), maps, dkeys, input_precision="ieee")
    _store_rows(dc + group * S, dmaps, start, count, sgt, s, S, BC)
    _store_rows(db + group * S, dkeys, start, count, sgt, s, S, BC)


@triton.jit
def inputs_backward(dy, x, b, c, dt, A, bias, decays, skip, states, dends, kept, table, dx, ddt,
                     sums, N, sgt, low, high, sdyt, sdyh, sxt, sxh, sbt, sbg, sct, scg, sdt, sdh,
                     SLICES: tl.constexpr, SOFTPLUS: tl.constexpr, H: tl.constexpr,
                     R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
                     BC: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr):  # fmt: skip
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
    scores, read = tl.zeros((BC, BC), tl.float32), tl.zeros((BC, BP), tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        maps = _rows(c + h // R * scg, start, count, sct, s, S, BC)
        keys = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        before = _state(states, n * H + h, s, P, S, BP)
        scores = tl.dot(keys, tl.trans(maps), scores, input_precision="ieee")
        read = tl.dot(maps, tl.trans(before), read, input_precision="ieee")
    step, total, last = _decays_of(decays, n, h, H, C, BC)
    out = _rows(dy + h * sdyh, start, count, sdyt, p, P, BC)
    tile = _rows(x + h * sxh, start, count, sxt, p, P, BC)
    upper = (total[None, :] - total[:, None]).to(tl.float32)
    scores *= tl.exp2(tl.where(i[None, :] >= i[:, None], upper, float("-inf")))  # M, transposed
    # summed in the dtype of G: the running sum that follows cancels what the sums have in common
    weighted = tl.dot(tile, tl.trans(out), input_precision="ieee") * scores * step[:, None]
    weighted = weighted.to(total.dtype)
    change = tl.sum(weighted, axis=0) - tl.sum(weighted, axis=1)
    read *= tl.exp2(total.to(tl.float32))[:, None] * out.to(tl.float32)
    change += tl.sum(read.to(total.dtype), axis=1)
    scores = scores.to(out.dtype)

    dwrite = tl.zeros((BC, BP), tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        keys = _rows(b + h // R * sbg, start, count, sbt, s, S, BC)
        after = _state(dends, n * H + h, s, P, S, BP)
        dwrite = tl.dot(keys, tl.trans(after), dwrite, input_precision="ieee")
    dwrite *= tl.exp2((last - total).to(tl.float32))[:, None]
    shrunk = dwrite * tile.to(tl.float32) * step[:, None]
    shrunk = tl.sum(shrunk.to(total.dtype), axis=1)
    end = tl.sum(shrunk)
    for part in range(SLICES):
        end += tl.load(kept + (part * N + n) * H + h) * tl.exp2(last.to(tl.float32))
    change += tl.where(i == C - 1, end, 0.0) - shrunk
    change = tl.cumsum(change, axis=0, reverse=True).to(tl.float32)
    dwrite = tl.dot(scores, out, dwrite, input_precision="ieee")

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

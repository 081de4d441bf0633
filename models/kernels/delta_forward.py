"""The gated delta rule's two forward kernels, which read tokens in place.

Symbols are those of models/delta_chunks.py. Shape letters: B batch, T tokens, HV value heads, K and
V the head's dimensions, C chunk size, N chunks of a row of the batch, X = N * B * HV.
"""

import triton
import triton.language as tl

from models.kernels.precision import PRECISION


@triton.jit
def place_of(rows):
    """The program's row, and its chunk or sequence. One dimension for both: the second of a CUDA
    grid ends at 65,535."""
    return tl.program_id(0) % rows, tl.program_id(0) // rows


@triton.jit
def token_rows(x, stride_b, stride_t, stride_h, start, b, h, i, ok, j, D: tl.constexpr):
    """A tile [i, j] of x [B, T, H, D]: tokens start + i that are ok, else zeros."""
    x += b * stride_b + start * stride_t + h * stride_h  # one pointer of 64 bits
    place = i[:, None] * stride_t + j[None, :]
    return tl.load(x + place, mask=ok[:, None] & (j < D)[None, :], other=0.0)


@triton.jit
def inverse_of(a, C: tl.constexpr, LEVELS: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular a [C, C], by merging diagonal blocks:
    [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    out = tl.where(i == j, 1.0, tl.where((i == j + 1) & (i % 2 == 1), -a, 0.0))
    for level in tl.static_range(1, LEVELS):
        row, column = i >> level, j >> level
        corner = tl.where((row == column + 1) & (row % 2 == 1), a, 0.0)
        left = tl.dot(out, corner, input_precision=PRECISION)
        out -= tl.dot(left, out, input_precision=PRECISION)
    return out


@triton.jit
def lower_decays(row, column, OFFSET: tl.constexpr, C: tl.constexpr):
    """exp(row_i - column_j) for OFFSET + i >= j, else 0: mask first, exp could overflow."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    difference = (row[:, None] - column[None, :]).to(tl.float32)
    return tl.exp(tl.where(OFFSET + i >= j, difference, float("-inf")))


@triton.jit
def prepare_kernel(q, k, v, g, beta, table, total, solve, attn, w, u, scale, H, HV, RATIO, sqb, sqt,
                   sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh, sbb, sbt, sbh,
                   C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                   BV: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """G = running sum of g, solve = (I + tril(beta k k^T e^(G_i - G_j), -1))^-1,
    attn = tril(scale q k^T e^(G_i - G_j)), w = solve beta e^G k, u = solve beta v; a chunk in two
    halves, since half of what lies off the diagonal is zero."""
    head, n = place_of(H)
    head, n = head.to(tl.int64), n.to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    sums: tl.constexpr = total.dtype.element_ty
    half: tl.constexpr = C // 2
    b, h = head // HV, head % HV
    x = n * H + head
    i, j = tl.arange(0, half), tl.arange(0, BK)
    first = tl.load(table + 3 * n).to(tl.int64)
    length = tl.load(table + 3 * n + 1)
    second, ok1, ok2 = first + half, i < length, half + i < length
    g += b * sgb + first * sgt + h * sgh
    beta += b * sbb + first * sbt + h * sbh
    total, solve, attn, w, u = (
        total + x * C,
        solve + x * C * C,
        attn + x * C * C,
        w + x * C * K,
        u + x * C * V,
    )
    g1 = tl.load(g + i * sgt, mask=ok1, other=0.0).to(sums)
    g2 = tl.load(g + (half + i) * sgt, mask=ok2, other=0.0).to(sums)
    t1 = tl.cumsum(g1, axis=0)
    t2 = tl.cumsum(g2, axis=0) + tl.sum(g1, axis=0)
    tl.store(total + i, t1)
    tl.store(total + half + i, t2)
    b1 = tl.load(beta + i * sbt, mask=ok1, other=0.0).to(tl.float32)
    b2 = tl.load(beta + (half + i) * sbt, mask=ok2, other=0.0).to(tl.float32)
    k1 = token_rows(k, skb, skt, skh, first, b, h // RATIO, i, ok1, j, K).to(dtype)
    k2 = token_rows(k, skb, skt, skh, second, b, h // RATIO, i, ok2, j, K).to(dtype)
    d11, d22 = lower_decays(t1, t1, 0, half), lower_decays(t2, t2, 0, half)
    d21 = lower_decays(t2, t1, half, half)

    below = i[:, None] > i[None, :]
    a11 = tl.dot(k1, tl.trans(k1), input_precision=PRECISION) * d11 * b1[:, None]
    a22 = tl.dot(k2, tl.trans(k2), input_precision=PRECISION) * d22 * b2[:, None]
    a21 = tl.dot(k2, tl.trans(k1), input_precision=PRECISION) * d21 * b2[:, None]
    s11 = inverse_of(tl.where(below, a11, 0.0), half, LEVELS)
    s22 = inverse_of(tl.where(below, a22, 0.0), half, LEVELS)
    s21 = -tl.dot(a21, s11, input_precision=PRECISION)
    s21 = tl.dot(s22, s21, input_precision=PRECISION)
    s11, s22, s21 = s11.to(dtype), s22.to(dtype), s21.to(dtype)
    square = i[:, None] * C + i[None, :]
    zero = tl.zeros((half, half), dtype)
    tl.store(solve + square, s11)
    tl.store(solve + square + half, zero)
    tl.store(solve + square + half * C, s21)
    tl.store(solve + square + half * C + half, s22)

    q1 = token_rows(q, sqb, sqt, sqh, first, b, h // RATIO, i, ok1, j, K)
    q2 = token_rows(q, sqb, sqt, sqh, second, b, h // RATIO, i, ok2, j, K)
    a11 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION) * d11 * scale
    a22 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION) * d22 * scale
    a21 = tl.dot(q2, tl.trans(k1), input_precision=PRECISION) * d21 * scale
    tl.store(attn + square, a11.to(dtype))
    tl.store(attn + square + half, zero)
    tl.store(attn + square + half * C, a21.to(dtype))
    tl.store(attn + square + half * C + half, a22.to(dtype))

    k1 = (k1 * (b1 * tl.exp(t1.to(tl.float32)))[:, None]).to(dtype)
    k2 = (k2 * (b2 * tl.exp(t2.to(tl.float32)))[:, None]).to(dtype)
    w1 = tl.dot(s11, k1, input_precision=PRECISION)
    w2 = tl.dot(s22, k2, input_precision=PRECISION)
    w2 = tl.dot(s21, k1, w2, input_precision=PRECISION)
    place = i[:, None] * K + j[None, :]
    tl.store(w + place, w1.to(dtype), mask=(j < K)[None, :])
    tl.store(w + place + half * K, w2.to(dtype), mask=(j < K)[None, :])
    for start in range(0, V, BV):
        c = start + tl.arange(0, BV)
        v1 = token_rows(v, svb, svt, svh, first, b, h, i, ok1, c, V)
        v2 = token_rows(v, svb, svt, svh, second, b, h, i, ok2, c, V)
        v1, v2 = (v1 * b1[:, None]).to(dtype), (v2 * b2[:, None]).to(dtype)
        u1 = tl.dot(s11, v1, input_precision=PRECISION)
        u2 = tl.dot(s22, v2, input_precision=PRECISION)
        u2 = tl.dot(s21, v1, u2, input_precision=PRECISION)
        narrow = i[:, None] * V + c[None, :]
        tl.store(u + narrow, u1.to(dtype), mask=(c < V)[None, :])
        tl.store(u + narrow + half * V, u2.to(dtype), mask=(c < V)[None, :])


@triton.jit
def span_of(sequence, table, bounds):
    """The chunks of a sequence, and its tokens."""
    begin, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    first = tl.load(table + 3 * begin, mask=begin < stop, other=0)
    end = tl.load(table + 3 * stop - 3, mask=begin < stop, other=0)
    end += tl.load(table + 3 * stop - 2, mask=begin < stop, other=0)
    return begin, stop, first.to(tl.int64), end


@triton.jit
def scan_kernel(q, k, w, u, attn, total, initial, table, bounds, states, final, o, scale, H, HV,
                RATIO, sqb, sqt, sqh, skb, skt, skh, sob, sot, soh, KEEP: tl.constexpr,
                C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                BV: tl.constexpr):  # fmt: skip
    """Vn = u - w S, which takes the place of u; o = scale e^G q S + attn Vn;
    S = e^G_C S + k^T e^(G_C - G) Vn: over the chunks of one sequence, for one head and BV columns
    of the state."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program, sequence = place_of(H * blocks)
    head = (program // blocks).to(tl.int64)
    b, h = head // HV, head % HV
    i, j = tl.arange(0, C), tl.arange(0, BK)
    c = program % blocks * BV + tl.arange(0, BV)
    dtype: tl.constexpr = q.dtype.element_ty
    columns = (c < V)[None, :]
    some = (j < K)[:, None] & columns
    block, wide = j[:, None] * V + c[None, :], i[:, None] * K + j[None, :]
    row, square = i[:, None] * V + c[None, :], i[:, None] * C + i[None, :]
    here = (sequence * H + head) * K * V
    s = tl.load(initial + here + block, mask=some, other=0.0)
    begin, stop, first, end = span_of(sequence, table, bounds)
    for n in range(begin, stop):
        x = n * H + head  # 64 bits, as head
        start = first + (n - begin) * C
        ok = start + i < end
        old = s.to(dtype)
        if KEEP:
            tl.store(states + x * K * V + block, old, mask=some)
        t, last = tl.load(total + x * C + i), tl.load(total + x * C + C - 1)
        wt = tl.load(w + x * C * K + wide, mask=(j < K)[None, :], other=0.0)
        new = tl.load(u + x * C * V + row, mask=columns, other=0.0).to(tl.float32)
        new -= tl.dot(wt, old, input_precision=PRECISION)
        if KEEP:
            tl.store(u + x * C * V + row, new.to(dtype), mask=columns)
        qt = token_rows(q, sqb, sqt, sqh, start, b, h // RATIO, i, ok, j, K)
        out = tl.dot(qt, old, input_precision=PRECISION)
        out *= (scale * tl.exp(t.to(tl.float32)))[:, None]
        at = tl.load(attn + x * C * C + square)
        out = tl.dot(at, new.to(dtype), out, input_precision=PRECISION)
        place = o + (b * sob + start * sot + h * soh) + i[:, None] * sot + c[None, :]
        tl.store(place, out.to(o.dtype.element_ty), mask=ok[:, None] & columns)
        new *= tl.exp((last - t).to(tl.float32))[:, None]
        kt = token_rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
        s *= tl.exp(last.to(tl.float32))
        s = tl.dot(tl.trans(kt), new.to(dtype), s, input_precision=PRECISION)
    tl.store(final + here + block, s, mask=some)

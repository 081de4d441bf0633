"""The gated delta rule on a GPU: two kernels forward and two backward, which read tokens in place.

Symbols are those of models/delta_chunks.py. What needs no state has one program for each chunk and
head, whose tile does not depend on how many chunks there are: so the bits of a chunk do not either.

Shape letters: B batch, T tokens, HV value heads, K and V the head's dimensions, C chunk size, N
chunks of a row of the batch, S sequences of a row, X = N * B * HV.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.chunks import chunk_bounds, chunk_table, decay_dtype

# Of the triangular systems, which are fp32, where what is made of them has 16 bits: three products
# of what NVIDIA's tensor cores take. fp32 operands are multiplied as they are.
PRECISION = {2: "ieee" if torch.version.hip else "tf32x3", 4: "ieee"}


@triton.jit
def _rows(x, stride_b, stride_t, stride_h, start, b, h, i, ok, j, D: tl.constexpr):
    """A tile [i, j] of x [B, T, H, D]: tokens start + i that are ok, else zeros."""
    x += b * stride_b + start * stride_t + h * stride_h  # one pointer of 64 bits
    place = i[:, None] * stride_t + j[None, :]
    return tl.load(x + place, mask=ok[:, None] & (j < D)[None, :], other=0.0)


@triton.jit
def _inverse(a, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
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
def _lower(row, column, OFFSET: tl.constexpr, C: tl.constexpr):
    """exp(row_i - column_j) for OFFSET + i >= j, else 0: mask first, exp could overflow."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    difference = (row[:, None] - column[None, :]).to(tl.float32)
    return tl.exp(tl.where(OFFSET + i >= j, difference, float("-inf")))


@triton.jit
def _prepare(q, k, v, g, beta, table, total, solve, attn, w, u, scale, H, HV, RATIO,
             sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh, sbb, sbt, sbh,
             C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
             BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """G = running sum of g, solve = (I + tril(beta k k^T e^(G_i - G_j), -1))^-1,
    attn = tril(scale q k^T e^(G_i - G_j)), w = solve beta e^G k, u = solve beta v; a chunk in two
    halves, since half of what lies off the diagonal is zero."""
    head, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
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
    k1 = _rows(k, skb, skt, skh, first, b, h // RATIO, i, ok1, j, K).to(dtype)
    k2 = _rows(k, skb, skt, skh, second, b, h // RATIO, i, ok2, j, K).to(dtype)
    d11, d22, d21 = _lower(t1, t1, 0, half), _lower(t2, t2, 0, half), _lower(t2, t1, half, half)

    below = i[:, None] > i[None, :]
    a11 = tl.dot(k1, tl.trans(k1), input_precision=PRECISION) * d11 * b1[:, None]
    a22 = tl.dot(k2, tl.trans(k2), input_precision=PRECISION) * d22 * b2[:, None]
    a21 = tl.dot(k2, tl.trans(k1), input_precision=PRECISION) * d21 * b2[:, None]
    s11 = _inverse(tl.where(below, a11, 0.0), half, LEVELS, PRECISION)
    s22 = _inverse(tl.where(below, a22, 0.0), half, LEVELS, PRECISION)
    s21 = -tl.dot(a21, s11, input_precision=PRECISION)
    s21 = tl.dot(s22, s21, input_precision=PRECISION)
    s11, s22, s21 = s11.to(dtype), s22.to(dtype), s21.to(dtype)
    square = i[:, None] * C + i[None, :]
    zero = tl.zeros((half, half), dtype)
    tl.store(solve + square, s11)
    tl.store(solve + square + half, zero)
    tl.store(solve + square + half * C, s21)
    tl.store(solve + square + half * C + half, s22)

    q1 = _rows(q, sqb, sqt, sqh, first, b, h // RATIO, i, ok1, j, K)
    q2 = _rows(q, sqb, sqt, sqh, second, b, h // RATIO, i, ok2, j, K)
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
        v1 = _rows(v, svb, svt, svh, first, b, h, i, ok1, c, V)
        v2 = _rows(v, svb, svt, svh, second, b, h, i, ok2, c, V)
        v1, v2 = (v1 * b1[:, None]).to(dtype), (v2 * b2[:, None]).to(dtype)
        u1 = tl.dot(s11, v1, input_precision=PRECISION)
        u2 = tl.dot(s22, v2, input_precision=PRECISION)
        u2 = tl.dot(s21, v1, u2, input_precision=PRECISION)
        narrow = i[:, None] * V + c[None, :]
        tl.store(u + narrow, u1.to(dtype), mask=(c < V)[None, :])
        tl.store(u + narrow + half * V, u2.to(dtype), mask=(c < V)[None, :])


@triton.jit
def _span(table, bounds):
    """The chunks of the program's sequence, and its tokens."""
    sequence = tl.program_id(1)
    begin, stop = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    first = tl.load(table + 3 * begin, mask=begin < stop, other=0)
    end = tl.load(table + 3 * stop - 3, mask=begin < stop, other=0)
    end += tl.load(table + 3 * stop - 2, mask=begin < stop, other=0)
    return begin, stop, first.to(tl.int64), end


@triton.jit
def _scan(q, k, w, u, attn, total, initial, table, bounds, states, final, o, scale, H, HV, RATIO,
          sqb, sqt, sqh, skb, skt, skh, sob, sot, soh, KEEP: tl.constexpr, C: tl.constexpr,
          K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Vn = u - w S, which takes the place of u; o = scale e^G q S + attn Vn;
    S = e^G_C S + k^T e^(G_C - G) Vn: over the chunks of one sequence, for one head and BV columns
    of the state."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // HV, head % HV
    i, j = tl.arange(0, C), tl.arange(0, BK)
    c = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    dtype: tl.constexpr = q.dtype.element_ty
    columns = (c < V)[None, :]
    some = (j < K)[:, None] & columns
    block, wide = j[:, None] * V + c[None, :], i[:, None] * K + j[None, :]
    row, square = i[:, None] * V + c[None, :], i[:, None] * C + i[None, :]
    here = (tl.program_id(1) * H + head) * K * V
    s = tl.load(initial + here + block, mask=some, other=0.0)
    begin, stop, first, end = _span(table, bounds)
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
        qt = _rows(q, sqb, sqt, sqh, start, b, h // RATIO, i, ok, j, K)
        out = tl.dot(qt, old, input_precision=PRECISION)
        out *= (scale * tl.exp(t.to(tl.float32)))[:, None]
        at = tl.load(attn + x * C * C + square)
        out = tl.dot(at, new.to(dtype), out, input_precision=PRECISION)
        place = o + (b * sob + start * sot + h * soh) + i[:, None] * sot + c[None, :]
        tl.store(place, out.to(o.dtype.element_ty), mask=ok[:, None] & columns)
        new *= tl.exp((last - t).to(tl.float32))[:, None]
        kt = _rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
        s *= tl.exp(last.to(tl.float32))
        s = tl.dot(tl.trans(kt), new.to(dtype), s, input_precision=PRECISION)
    tl.store(final + here + block, s, mask=some)


@triton.jit
def _scan_backward(q, k, w, attn, total, do, dfinal, table, bounds, dends, dv_new, dinitial, scale,
                   H, HV, RATIO, sqb, sqt, sqh, skb, skt, skh, sob, sot, soh, C: tl.constexpr,
                   K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """dVn = e^(G_C - G) k dS + attn^T do; dS = e^G_C dS + q^T scale e^G do - w^T dVn, from the last
    chunk to the first."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // HV, head % HV
    i, j = tl.arange(0, C), tl.arange(0, BK)
    c = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    dtype: tl.constexpr = q.dtype.element_ty
    columns = (c < V)[None, :]
    some = (j < K)[:, None] & columns
    block, wide = j[:, None] * V + c[None, :], i[:, None] * K + j[None, :]
    row, square = i[:, None] * V + c[None, :], i[:, None] * C + i[None, :]
    here = (tl.program_id(1) * H + head) * K * V
    ds = tl.load(dfinal + here + block, mask=some, other=0.0)
    begin, stop, first, end = _span(table, bounds)
    for back in range(stop - begin):
        x = (stop - 1 - back) * H + head  # 64 bits, as head
        start = first + (stop - 1 - back - begin) * C
        ok = start + i < end
        old = ds.to(dtype)
        tl.store(dends + x * K * V + block, old, mask=some)
        t, last = tl.load(total + x * C + i), tl.load(total + x * C + C - 1)
        kt = _rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
        out = _rows(do, sob, sot, soh, start, b, h, i, ok, c, V)
        at = tl.load(attn + x * C * C + square)
        dnew = tl.dot(kt, old, input_precision=PRECISION)
        dnew *= tl.exp((last - t).to(tl.float32))[:, None]
        dnew = tl.dot(tl.trans(at), out.to(dtype), dnew, input_precision=PRECISION)
        tl.store(dv_new + x * C * V + row, dnew.to(dtype), mask=columns)
        qt = _rows(q, sqb, sqt, sqh, start, b, h // RATIO, i, ok, j, K)
        out = (out * (scale * tl.exp(t.to(tl.float32)))[:, None]).to(dtype)
        ds *= tl.exp(last.to(tl.float32))
        ds = tl.dot(tl.trans(qt), out, ds, input_precision=PRECISION)
        wt = tl.load(w + x * C * K + wide, mask=(j < K)[None, :], other=0.0)
        ds = tl.dot(tl.trans(wt), (-dnew).to(dtype), ds, input_precision=PRECISION)
    tl.store(dinitial + here + block, ds, mask=some)


@triton.jit
def _chunk_backward(q, k, v, beta, total, solve, attn, w, v_new, states, do, dv_new, dends, table,
                    dq, dk, dv, dg, dbeta, scale, H, HV, RATIO, sqb, sqt, sqh, skb, skt, skh,
                    svb, svt, svh, sbb, sbt, sbh, sob, sot, soh, tokens, C: tl.constexpr,
                    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of one chunk and value head, given those of its outputs, Vn and end state. The
    triangular system, with dw = -dVn S^T and du = dVn::

        dv' = solve^T dVn,  dk' = solve^T dw,   dA = -tril((dv' (beta v)^T) solve^T + dk' w^T, -1)
        dv = beta dv',      dbeta = dv' . v + dk' . e^G k + rows(dA * k k^T * e^(G_i - G_j))

    The states, with P = e^(G_i - G_j) for i >= j::

        dattn = do Vn^T * P * scale,            dq = scale e^G do S^T + dattn k
        dk = e^(G_C - G) Vn dS^T + dattn^T q + (D + D^T) k + beta e^G dk',      D = beta dA * P

    G is a running sum, so the gradient of g is the running sum of dG from the end.
    """
    head, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    sums: tl.constexpr = total.dtype.element_ty
    b, h = head // HV, head % HV
    x = n * H + head
    i, j = tl.arange(0, C), tl.arange(0, BK)
    start = tl.load(table + 3 * n).to(tl.int64)
    ok = i < tl.load(table + 3 * n + 1)
    square = i[:, None] * C + i[None, :]
    solve, attn, w, total = solve + x * C * C, attn + x * C * C, w + x * C * K, total + x * C
    states, dends, v_new, dv_new = (
        states + x * K * V,
        dends + x * K * V,
        v_new + x * C * V,
        dv_new + x * C * V,
    )
    beta += b * sbb + start * sbt + h * sbh
    token = (b * tokens + start) * HV + h
    bt = tl.load(beta + i * sbt, mask=ok, other=0.0).to(tl.float32)
    t, last = tl.load(total + i), tl.load(total + C - 1)
    grow = tl.exp(t.to(tl.float32))
    solved = tl.trans(tl.load(solve + square))

    dw, dsolve = tl.zeros((C, BK), tl.float32), tl.zeros((C, C), tl.float32)
    db = tl.zeros((C,), tl.float32)
    for first in range(0, V, BV):
        c = first + tl.arange(0, BV)
        block = j[:, None] * V + c[None, :]
        row = i[:, None] * V + c[None, :]
        s = tl.load(states + block, mask=(j < K)[:, None] & (c < V)[None, :], other=0.0)
        dnew = tl.load(dv_new + row, mask=(c < V)[None, :], other=0.0)
        vt = _rows(v, svb, svt, svh, start, b, h, i, ok, c, V).to(tl.float32)
        dw = tl.dot(dnew, tl.trans(s), dw, input_precision=PRECISION)
        dvt = tl.dot(solved, dnew, input_precision=PRECISION)
        db += tl.sum(dvt * vt, axis=1)
        written = (vt * bt[:, None]).to(dtype)
        dsolve = tl.dot(dvt.to(dtype), tl.trans(written), dsolve, input_precision=PRECISION)
        place = i[:, None] * HV * V + c[None, :]
        dvt = (dvt * bt[:, None]).to(dv.dtype.element_ty)
        tl.store(dv + token * V + place, dvt, mask=ok[:, None] & (c < V)[None, :])

    kt = _rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
    wt = tl.load(w + i[:, None] * K + j[None, :], mask=(j < K)[None, :], other=0.0)
    dkt = tl.dot(solved, (-dw).to(dtype), input_precision=PRECISION)
    da = tl.dot(dsolve.to(dtype), solved, input_precision=PRECISION)
    da = tl.dot(dkt.to(dtype), tl.trans(wt), da, input_precision=PRECISION)
    da = tl.where(i[:, None] > i[None, :], -da, 0.0)
    pair = _lower(t, t, 0, C)
    inner = tl.sum(dkt * kt, axis=1) * grow
    weighted = tl.dot(kt, tl.trans(kt), input_precision=PRECISION) * pair * da
    db += inner + tl.sum(weighted, axis=1)
    tl.store(dbeta + token + i * HV, db.to(dbeta.dtype.element_ty), mask=ok)
    # summed in the dtype of G: the running sum at the end cancels what the sums have in common
    weighted = (weighted * bt[:, None]).to(sums)
    dt = (inner * bt).to(sums) + tl.sum(weighted, axis=1) - tl.sum(weighted, axis=0)
    da = (da * pair * bt[:, None]).to(dtype)
    dkt = dkt * (bt * grow)[:, None]
    dkt = tl.dot(da, kt, dkt, input_precision=PRECISION)
    dkt = tl.dot(tl.trans(da), kt, dkt, input_precision=PRECISION)

    dqt, dout = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    dattn, dlast = tl.zeros((C, C), tl.float32), tl.zeros((BV,), tl.float32)
    for first in range(0, V, BV):
        c = first + tl.arange(0, BV)
        block = j[:, None] * V + c[None, :]
        some = (j < K)[:, None] & (c < V)[None, :]
        s = tl.load(states + block, mask=some, other=0.0)
        ds = tl.load(dends + block, mask=some, other=0.0)
        out = _rows(do, sob, sot, soh, start, b, h, i, ok, c, V).to(dtype)
        row = i[:, None] * V + c[None, :]
        new = tl.load(v_new + row, mask=(c < V)[None, :], other=0.0)
        dqt = tl.dot(out, tl.trans(s), dqt, input_precision=PRECISION)
        dout = tl.dot(new, tl.trans(ds), dout, input_precision=PRECISION)
        dattn = tl.dot(out, tl.trans(new), dattn, input_precision=PRECISION)
        dlast += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=0)

    weighted = (dattn * tl.load(attn + square)).to(sums)
    dt += tl.sum(weighted, axis=1) - tl.sum(weighted, axis=0)
    qt = _rows(q, sqb, sqt, sqh, start, b, h // RATIO, i, ok, j, K)
    dattn = (dattn * pair * scale).to(dtype)
    dqt *= (scale * grow)[:, None]
    dt += tl.sum(dqt * qt, axis=1)
    dqt = tl.dot(dattn, kt, dqt, input_precision=PRECISION)
    dout *= tl.exp((last - t).to(tl.float32))[:, None]
    shrunk = tl.sum(dout * kt, axis=1).to(sums)
    dt -= shrunk
    ends = tl.sum(shrunk, axis=0) + tl.sum(dlast, axis=0) * tl.exp(last.to(tl.float32))
    dt += tl.where(i == C - 1, ends, 0.0)
    dkt = tl.dot(tl.trans(dattn), qt, dkt + dout, input_precision=PRECISION)
    dgt = tl.cumsum(dt, axis=0, reverse=True)
    tl.store(dg + token + i * HV, dgt.to(dg.dtype.element_ty), mask=ok)
    wide = token * K + i[:, None] * HV * K + j[None, :]
    there = ok[:, None] & (j < K)[None, :]
    tl.store(dq + wide, dqt.to(dq.dtype.element_ty), mask=there)
    tl.store(dk + wide, dkt.to(dk.dtype.element_ty), mask=there)


# For operands of 2 and 4 bytes: columns of a state that a program has, and how it is compiled.
PREPARE = {2: (64, {"num_warps": 4, "num_stages": 2}), 4: (32, {"num_warps": 4, "num_stages": 1})}
SCAN = {2: (64, {"num_warps": 4, "num_stages": 2}), 4: (16, {"num_warps": 4, "num_stages": 1})}
SCAN_BACKWARD = SCAN
CHUNK = {2: (64, {"num_warps": 8, "num_stages": 2}), 4: (16, {"num_warps": 8, "num_stages": 1})}


def supports(q: Tensor, v: Tensor, size: int) -> bool:
    """Whether the kernels take chunks of a size, of q [B, T, H, K] and v [B, T, HV, V]: whether the
    keys of a chunk fit into registers, where fp32 is multiplied without tensor cores."""
    wide = q.shape[3] * q.element_size()
    fit = wide <= 512 if size == 32 else size == 64 and wide <= 256 and q.element_size() == 2
    return fit and q.numel() > 0 and v.numel() > 0


class _Call:
    """Sizes and tables of a call, and its launches."""

    def __init__(self, q: Tensor, v: Tensor, offsets: list[int] | None, size: int):
        (self.batch, self.tokens, key_heads, self.dim_k), self.size = q.shape, size
        self.heads, self.dim_v = v.shape[2:]
        offsets = (0, self.tokens) if offsets is None else tuple(offsets)
        segments = tuple(-(-(end - start) // size) for start, end in itertools.pairwise(offsets))
        self.table = chunk_table(offsets, size, q.device)
        self.bounds = chunk_bounds(segments, q.device)
        self.chunks, self.sequences = sum(segments), len(segments)
        self.rows = self.batch * self.heads
        self.counts = (self.rows, self.heads, self.heads // key_heads)
        self.bytes = q.element_size()

    def start(self, kernel, tiles, by_sequence: bool, *arguments, **constants) -> None:
        columns, options = tiles[self.bytes]
        columns = columns if self.dim_k <= 128 else columns // 4
        columns = max(16, min(columns, triton.next_power_of_2(self.dim_v)))
        grid = (self.rows, self.chunks)
        if by_sequence:
            grid = (self.rows * triton.cdiv(self.dim_v, columns), self.sequences)
        kernel[grid](
            *arguments, **constants, C=self.size, K=self.dim_k, V=self.dim_v,
            BK=max(16, triton.next_power_of_2(self.dim_k)), BV=columns,
            PRECISION=PRECISION[self.bytes], **options,
        )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _readable(x: Tensor) -> Tensor:
    """x, a row of whose last dimension lies in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kept(q: Tensor, v: Tensor, size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What ``forward`` keeps of a chunk and head: G, inverses, attn, W, Vn, state before it."""
    dim_k, dim_v, dtype = q.shape[3], v.shape[3], q.dtype
    shapes = [(size, size), (size, size), (size, dim_k), (size, dim_v), (dim_k, dim_v)]
    return [((size,), decay_dtype(dtype)), *((shape, dtype) for shape in shapes)]


def forward(q, k, v, g, beta, initial, offsets, scale, size, kept, keep):
    """o [B, T, HV, V] in the dtype of v, and the final states like initial, one of [HV, K, V] fp32
    for each row of the batch or sequence. Writes ``kept``, tensors [X, ...]; the last two for a
    backward only, if there is to be one."""
    call, (q, k, v) = _Call(q, v, offsets, size), map(_readable, (q, k, v))
    total, solve, attn, w, u, states = kept
    o, final = v.new_empty(v.shape), torch.empty_like(initial)
    call.start(
        _prepare, PREPARE, False, q, k, v, g, beta, call.table, total, solve, attn, w, u,
        scale, *call.counts, *_strides(q, k, v, g, beta), LEVELS=(size // 2).bit_length() - 1,
    )  # fmt: skip
    call.start(
        _scan, SCAN, True, q, k, w, u, attn, total, initial, call.table, call.bounds, states,
        final, o, scale, *call.counts, *_strides(q, k, o), KEEP=keep,
    )  # fmt: skip
    return o, final


def backward(do, dfinal, q, k, v, g, beta, offsets, scale, size, *kept):
    """Gradients of q, k, v, g, beta and the initial states, which are like dfinal."""
    call, (q, k, v, do) = _Call(q, v, offsets, size), map(_readable, (q, k, v, do))
    total, solve, attn, w, v_new, states = kept
    dfinal = dfinal.contiguous()
    dinitial, dends, dv_new = (torch.empty_like(t) for t in (dfinal, states, v_new))
    call.start(
        _scan_backward, SCAN_BACKWARD, True, q, k, w, attn, total, do, dfinal, call.table,
        call.bounds, dends, dv_new, dinitial, scale, *call.counts, *_strides(q, k, do),
    )  # fmt: skip
    key_heads, shape = q.shape[2], (*v.shape[:3], q.shape[3])
    dq, dk, dv = q.new_empty(shape), k.new_empty(shape), v.new_empty(v.shape)
    dg, dbeta = g.new_empty(g.shape), beta.new_empty(g.shape)
    call.start(
        _chunk_backward, CHUNK, False, q, k, v, beta, total, solve, attn, w, v_new, states, do,
        dv_new, dends, call.table, dq, dk, dv, dg, dbeta, scale, *call.counts,
        *_strides(q, k, v, beta, do), call.tokens,
    )  # fmt: skip
    if key_heads != shape[2]:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial

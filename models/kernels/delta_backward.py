"""The gated delta rule's three backward kernels: through the states, from the last chunk to the
first; and for each chunk through the triangular system, and through the outputs.

Symbols are those of models/delta_chunks.py. Shape letters: B batch, T tokens, HV value heads, K and
V the head's dimensions, C chunk size, N chunks of a row of the batch, X = N * B * HV.
"""

import triton
import triton.language as tl

from models.kernels.delta_forward import lower_decays, place_of, span_of, token_rows
from models.kernels.precision import PRECISION


@triton.jit
def scan_backward_kernel(q, k, w, attn, total, do, dfinal, table, bounds, dends, dv_new, dinitial,
                         scale, H, HV, RATIO, sqb, sqt, sqh, skb, skt, skh, sob, sot, soh,
                         C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                         BV: tl.constexpr):  # fmt: skip
    """dVn = e^(G_C - G) k dS + attn^T do; dS = e^G_C dS + q^T scale e^G do - w^T dVn, from the last
    chunk to the first."""
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
    ds = tl.load(dfinal + here + block, mask=some, other=0.0)
    begin, stop, first, end = span_of(sequence, table, bounds)
    for back in range(stop - begin):
        x = (stop - 1 - back) * H + head  # 64 bits, as head
        start = first + (stop - 1 - back - begin) * C
        ok = start + i < end
        old = ds.to(dtype)
        tl.store(dends + x * K * V + block, old, mask=some)
        t, last = tl.load(total + x * C + i), tl.load(total + x * C + C - 1)
        kt = token_rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
        out = token_rows(do, sob, sot, soh, start, b, h, i, ok, c, V)
        at = tl.load(attn + x * C * C + square)
        dnew = tl.dot(kt, old, input_precision=PRECISION)
        dnew *= tl.exp((last - t).to(tl.float32))[:, None]
        dnew = tl.dot(tl.trans(at), out.to(dtype), dnew, input_precision=PRECISION)
        tl.store(dv_new + x * C * V + row, dnew.to(dtype), mask=columns)
        qt = token_rows(q, sqb, sqt, sqh, start, b, h // RATIO, i, ok, j, K)
        out = (out * (scale * tl.exp(t.to(tl.float32)))[:, None]).to(dtype)
        ds *= tl.exp(last.to(tl.float32))
        ds = tl.dot(tl.trans(qt), out, ds, input_precision=PRECISION)
        wt = tl.load(w + x * C * K + wide, mask=(j < K)[None, :], other=0.0)
        ds = tl.dot(tl.trans(wt), (-dnew).to(dtype), ds, input_precision=PRECISION)
    tl.store(dinitial + here + block, ds, mask=some)


@triton.jit
def system_backward_kernel(k, v, beta, total, solve, w, states, dv_new, table, dk_part, dt_part, dv,
                           dbeta, H, HV, RATIO, skb, skt, skh, svb, svt, svh, sbb, sbt, sbh, tokens,
                           sgv, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                           BV: tl.constexpr):  # fmt: skip
    """Of one chunk and value head, through the triangular system, with du = dVn, dw = -dVn S^T and
    P = e^(G_i - G_j) for i >= j::

        dv' = solve^T dVn,  dk' = solve^T dw,   dA = -tril((dv' (beta v)^T) solve^T + dk' w^T, -1)
        dv = beta dv',      dbeta = dv' . v + dk' . e^G k + rows(dA * k k^T * P)
        dk_part = beta e^G dk' + (D + D^T) k,   D = beta dA * P

    and dt_part, of the running sums G, from dk' and dA."""
    head, n = place_of(H)
    head, n = head.to(tl.int64), n.to(tl.int64)
    dtype: tl.constexpr = w.dtype.element_ty
    sums: tl.constexpr = total.dtype.element_ty
    b, h = head // HV, head % HV
    x = n * H + head
    i, j = tl.arange(0, C), tl.arange(0, BK)
    start = tl.load(table + 3 * n).to(tl.int64)
    ok = i < tl.load(table + 3 * n + 1)
    square = i[:, None] * C + i[None, :]
    solve, w, total = solve + x * C * C, w + x * C * K, total + x * C
    states, dv_new = states + x * K * V, dv_new + x * C * V
    beta += b * sbb + start * sbt + h * sbh
    token = (b * tokens + start) * HV + h
    bt = tl.load(beta + i * sbt, mask=ok, other=0.0).to(tl.float32)
    t = tl.load(total + i)
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
        vt = token_rows(v, svb, svt, svh, start, b, h, i, ok, c, V).to(tl.float32)
        dw = tl.dot(dnew, tl.trans(s), dw, input_precision=PRECISION)
        dvt = tl.dot(solved, dnew, input_precision=PRECISION)
        db += tl.sum(dvt * vt, axis=1)
        written = (vt * bt[:, None]).to(dtype)
        dsolve = tl.dot(dvt.to(dtype), tl.trans(written), dsolve, input_precision=PRECISION)
        place = (b * tokens + start) * sgv + h * V + i[:, None] * sgv + c[None, :]
        dvt = (dvt * bt[:, None]).to(dv.dtype.element_ty)
        tl.store(dv + place, dvt, mask=ok[:, None] & (c < V)[None, :])

    kt = token_rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
    wt = tl.load(w + i[:, None] * K + j[None, :], mask=(j < K)[None, :], other=0.0)
    dkt = tl.dot(solved, (-dw).to(dtype), input_precision=PRECISION)
    da = tl.dot(dsolve.to(dtype), solved, input_precision=PRECISION)
    da = tl.dot(dkt.to(dtype), tl.trans(wt), da, input_precision=PRECISION)
    da = tl.where(i[:, None] > i[None, :], -da, 0.0)
    pair = lower_decays(t, t, 0, C)
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

    tl.store(dk_part + x * C * K + i[:, None] * K + j[None, :], dkt, mask=(j < K)[None, :])
    tl.store(dt_part + x * C + i, dt)


@triton.jit
def read_backward_kernel(q, k, total, attn, v_new, states, do, dends, table, dk_part, dt_part, dq,
                         dk, dg, scale, H, HV, RATIO, sqb, sqt, sqh, skb, skt, skh, sob, sot, soh,
                         tokens, sgk, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                         BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Of one chunk and value head, with P = e^(G_i - G_j) for i >= j::

        dattn = do Vn^T * P * scale,            dq = scale e^G do S^T + dattn k
        dk = e^(G_C - G) Vn dS^T + dattn^T q + dk_part

    G is a running sum, so the gradient of g is the running sum of dG from the end."""
    head, n = place_of(H)
    head, n = head.to(tl.int64), n.to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    sums: tl.constexpr = total.dtype.element_ty
    b, h = head // HV, head % HV
    x = n * H + head
    i, j = tl.arange(0, C), tl.arange(0, BK)
    start = tl.load(table + 3 * n).to(tl.int64)
    ok = i < tl.load(table + 3 * n + 1)
    square = i[:, None] * C + i[None, :]
    attn, total = attn + x * C * C, total + x * C
    states, dends, v_new = states + x * K * V, dends + x * K * V, v_new + x * C * V
    token = (b * tokens + start) * HV + h
    t, last = tl.load(total + i), tl.load(total + C - 1)
    grow = tl.exp(t.to(tl.float32))

    dqt, dout = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    dattn, dlast = tl.zeros((C, C), tl.float32), tl.zeros((BV,), tl.float32)
    for first in range(0, V, BV):
        c = first + tl.arange(0, BV)
        block = j[:, None] * V + c[None, :]
        some = (j < K)[:, None] & (c < V)[None, :]
        s = tl.load(states + block, mask=some, other=0.0)
        ds = tl.load(dends + block, mask=some, other=0.0)
        out = token_rows(do, sob, sot, soh, start, b, h, i, ok, c, V).to(dtype)
        row = i[:, None] * V + c[None, :]
        new = tl.load(v_new + row, mask=(c < V)[None, :], other=0.0)
        dqt = tl.dot(out, tl.trans(s), dqt, input_precision=PRECISION)
        dout = tl.dot(new, tl.trans(ds), dout, input_precision=PRECISION)
        dattn = tl.dot(out, tl.trans(new), dattn, input_precision=PRECISION)
        dlast += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=0)

    dt = tl.load(dt_part + x * C + i)
    wide = i[:, None] * K + j[None, :]
    dkt = tl.load(dk_part + x * C * K + wide, mask=(j < K)[None, :], other=0.0)
    kt = token_rows(k, skb, skt, skh, start, b, h // RATIO, i, ok, j, K).to(dtype)
    pair = lower_decays(t, t, 0, C)
    weighted = (dattn * tl.load(attn + square)).to(sums)
    dt += tl.sum(weighted, axis=1) - tl.sum(weighted, axis=0)
    qt = token_rows(q, sqb, sqt, sqh, start, b, h // RATIO, i, ok, j, K)
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
    wide = (b * tokens + start) * sgk + h * K + i[:, None] * sgk + j[None, :]
    there = ok[:, None] & (j < K)[None, :]
    tl.store(dq + wide, dqt.to(dq.dtype.element_ty), mask=there)
    tl.store(dk + wide, dkt.to(dk.dtype.element_ty), mask=there)

"""The sequential part of the gated delta rule on a GPU: one kernel over all chunks, each way.

Symbols are those of models/delta_chunks.py. Shape letters: N chunks, H value heads (batch
included), C chunk size, K and V the head's dimensions, X = N * H, S sequences.
"""

import triton
import triton.language as tl

from models.chunks import chunk_bounds


@triton.jit
def _delta_forward(last, k_out, w, u, initial, bounds, states, v_new, final, H, swr, sur,
                   C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   BV: tl.constexpr):  # fmt: skip
    """Vn = u - w S; S = last S + k_out^T Vn, over the chunks of one sequence, one head and BV
    columns of the state."""
    sequence, h = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    col = tl.program_id(0) * BV + tl.arange(0, BV)
    i, j = tl.arange(0, C), tl.arange(0, K)
    ok = (col < V)[None, :]
    here = (sequence * H + h) * K * V + j[:, None] * V + col[None, :]
    s = tl.load(initial + here, mask=ok, other=0.0)
    for n in range(tl.load(bounds + sequence), tl.load(bounds + sequence + 1)):
        x = n * H + h  # 64 bits, as h
        tl.store(states + x * K * V + j[:, None] * V + col[None, :], s, mask=ok)
        wt = tl.load(w + (x * C + i[:, None]) * swr + j[None, :])
        ut = tl.load(u + (x * C + i[:, None]) * sur + col[None, :], mask=ok, other=0.0)
        new = ut.to(tl.float32) - tl.dot(wt, s.to(wt.dtype), input_precision="ieee")
        new = new.to(wt.dtype)
        tl.store(v_new + (x * C + i[:, None]) * V + col[None, :], new, mask=ok)
        kt = tl.load(k_out + (x * C + i[None, :]) * K + j[:, None])
        s = s * tl.load(last + x) + tl.dot(kt, new, input_precision="ieee")
    tl.store(final + here, s, mask=ok)


@triton.jit
def _delta_backward(last, k_out, w, add, dfinal, bounds, dends, dv_new, dinitial, H, swr,
                    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   BV: tl.constexpr):  # fmt: skip
    """dVn += k_out dS; dS = last dS + add - w^T dVn, from the last chunk to the first."""
    sequence, h = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    col = tl.program_id(0) * BV + tl.arange(0, BV)
    i, j = tl.arange(0, C), tl.arange(0, K)
    ok = (col < V)[None, :]
    here = (sequence * H + h) * K * V + j[:, None] * V + col[None, :]
    ds = tl.load(dfinal + here, mask=ok, other=0.0)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    for back in range(end - begin):
        x = (end - 1 - back) * H + h  # 64 bits, as h
        block = x * K * V + j[:, None] * V + col[None, :]
        tl.store(dends + block, ds, mask=ok)
        kt = tl.load(k_out + (x * C + i[:, None]) * K + j[None, :])
        row = dv_new + (x * C + i[:, None]) * V + col[None, :]
        dnew = tl.load(row, mask=ok, other=0.0).to(tl.float32)
        dnew = (dnew + tl.dot(kt, ds.to(kt.dtype), input_precision="ieee")).to(kt.dtype)
        tl.store(row, dnew, mask=ok)
        wt = tl.load(w + (x * C + i[None, :]) * swr + j[:, None])
        ds = ds * tl.load(last + x) + tl.load(add + block, mask=ok, other=0.0)
        ds -= tl.dot(wt, dnew, input_precision="ieee")
    tl.store(dinitial + here, ds, mask=ok)


def supports(chunk_size: int, dim_k: int) -> bool:
    """Whether a chunk and a key fill whole tiles, and a state's columns fit in registers."""
    return chunk_size in (16, 32, 64) and dim_k in (16, 32, 64, 128, 256)


def _columns(dim_k: int, dim_v: int) -> int:
    return max(16, min(triton.next_power_of_2(dim_v), 8192 // dim_k))


def forward(last, k_out, w, u, initial, segments, states, v_new, final) -> None:
    """All chunks of all sequences: writes states [N, H, K, V], v_new [X, C, V] and final.

    last [X, 1, 1] fp32, k_out [X, C, K] contiguous, w [X, C, K] and u [X, C, V] with a row stride,
    initial and final [S, H, K, V] fp32; X = N * H.
    """
    (_, size, dim_k), (count, heads), dim_v = k_out.shape, initial.shape[:2], u.shape[-1]
    columns = _columns(dim_k, dim_v)
    _delta_forward[(triton.cdiv(dim_v, columns), count, heads)](
        last.contiguous(), k_out, w, u, initial, chunk_bounds(segments, k_out.device),
        states, v_new, final, heads, w.stride(1), u.stride(1),
        C=size, K=dim_k, V=dim_v, BV=columns,
    )  # fmt: skip


def backward(last, k_out, w, dread, dfinal, segments, dends, dv_new, dinitial) -> None:
    """Writes dends like dread [X, K, V] and dinitial like dfinal [S, H, K, V], and completes
    dv_new [X, C, V]; the rest as in ``forward``."""
    (_, size, dim_k), (count, heads), dim_v = k_out.shape, dfinal.shape[:2], dv_new.shape[-1]
    columns = _columns(dim_k, dim_v)
    _delta_backward[(triton.cdiv(dim_v, columns), count, heads)](
        last.contiguous(), k_out, w, dread, dfinal,
        chunk_bounds(segments, k_out.device), dends, dv_new, dinitial, heads, w.stride(1),
        C=size, K=dim_k, V=dim_v, BV=columns,
    )  # fmt: skip

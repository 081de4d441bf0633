"""Triton kernels for what the blocks do on a GPU between the matrix products, and their launchers.

Shape letters: B batch, T tokens, D channels, W taps; N chunks, H heads (batch included), C chunk
size, K and V the head's dimensions.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---- short convolution ----


@triton.jit
def _input(x, state, b, pos, d, T, D, sxb, sxt, ssb, sst, HAS_STATE: tl.constexpr, W: tl.constexpr):
    """Rows ``pos`` of the tokens of sequence b, those below 0 from the state, fp32 [BT, BD]."""
    inside = (d < D)[None, :]
    value = tl.load(
        x + b * sxb + pos[:, None] * sxt + d[None, :],
        mask=((pos >= 0) & (pos < T))[:, None] & inside,
        other=0.0,
    ).to(tl.float32)
    if HAS_STATE:
        row = pos + W - 1
        value += tl.load(
            state + b * ssb + row[:, None] * sst + d[None, :],
            mask=((pos < 0) & (row >= 0))[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
    return value


@triton.jit
def _tap_sum(x, state, weight, bias, b, pos, d, T, D, sxb, sxt, ssb, sst,
             HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, W: tl.constexpr,
             BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The convolution before its SiLU at rows ``pos``, fp32 [BT, BD]."""
    total = tl.zeros((BT, BD), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(W):
        value = _input(x, state, b, pos - (W - 1) + tap, d, T, D, sxb, sxt, ssb, sst, HAS_STATE, W)
        tap_weight = tl.load(weight + d * W + tap, mask=d < D, other=0.0).to(tl.float32)
        total += value * tap_weight[None, :]
    return total


@triton.jit
def _conv_forward(x, state, weight, bias, y, T, D, sxb, sxt, ssb, sst,
                  HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, W: tl.constexpr,
                  BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """y[t] = silu(sum_j weight[j] * input[t - W + 1 + j] + bias)."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = _tap_sum(x, state, weight, bias, b, t, d, T, D, sxb, sxt, ssb, sst,
                     HAS_STATE, HAS_BIAS, W, BT, BD)  # fmt: skip
    out = total * tl.sigmoid(total)
    tl.store(
        y + (b * T + t[:, None]) * D + d[None, :],
        out.to(y.dtype.element_ty),
        mask=(t < T)[:, None] & (d < D)[None, :],
    )


@triton.jit
def _conv_backward_total(x, state, weight, bias, dy, dtotal, dparams, T, D, sxb, sxt, ssb, sst,
                         sdb, sdt, HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr,
                         W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """dtotal[t] = dy[t] silu'(total[t]), and the tile's share of the gradients of weight and bias:
    dparams [tiles, W + 1, D]."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (t < T)[:, None] & (d < D)[None, :]
    tile = (b * tl.num_programs(0) + tl.program_id(0)) * (W + 1)
    total = _tap_sum(x, state, weight, bias, b, t, d, T, D, sxb, sxt, ssb, sst,
                     HAS_STATE, HAS_BIAS, W, BT, BD)  # fmt: skip
    gate = tl.sigmoid(total)
    grad = tl.load(dy + b * sdb + t[:, None] * sdt + d[None, :], mask=inside, other=0.0)
    grad = grad.to(tl.float32) * gate * (1 + total * (1 - gate))
    grad = tl.where(inside, grad, 0.0)
    tl.store(dtotal + (b * T + t[:, None]) * D + d[None, :], grad, mask=inside)
    tl.store(dparams + (tile + W) * D + d, tl.sum(grad, axis=0), mask=d < D)
    for tap in tl.static_range(W):
        value = _input(x, state, b, t - (W - 1) + tap, d, T, D, sxb, sxt, ssb, sst, HAS_STATE, W)
        tl.store(dparams + (tile + tap) * D + d, tl.sum(grad * value, axis=0), mask=d < D)


@triton.jit
def _conv_backward_input(dtotal, weight, dx, T, D, BEFORE: tl.constexpr, W: tl.constexpr,
                         BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """dx[t] = sum_j weight[j] * dtotal[t + W - 1 - j], for BEFORE rows of the state too."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT) - BEFORE
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (d < D)[None, :]
    dvalue = tl.zeros((BT, BD), tl.float32)
    for shift in tl.static_range(W):
        pos = t + shift
        grad = tl.load(
            dtotal + (b * T + pos[:, None]) * D + d[None, :],
            mask=((pos >= 0) & (pos < T))[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        tap_weight = tl.load(weight + d * W + (W - 1 - shift), mask=d < D, other=0.0)
        dvalue += grad * tap_weight.to(tl.float32)[None, :]
    tl.store(
        dx + (b * (T + BEFORE) + t[:, None] + BEFORE) * D + d[None, :],
        dvalue.to(dx.dtype.element_ty),
        mask=(t < T)[:, None] & inside,
    )


def _conv_setup(x, state, weight, rows):
    tile = 1 if rows == 1 else 32
    grid = (triton.cdiv(rows, tile), triton.cdiv(x.shape[2], 128), x.shape[0])
    strides = (x.stride(0), x.stride(1)) + ((0, 0) if state is None else state.stride()[:2])
    sizes = {"HAS_STATE": state is not None, "W": weight.shape[1], "BT": tile, "BD": 128}
    return grid, strides, sizes


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> Tensor:
    """silu of the causal convolution. x [B, T, D] and state [B, W - 1, D] of unit last stride,
    weight [D, W] and bias [D] contiguous; returns [B, T, D] in the dtype of x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, strides, sizes = _conv_setup(x, state, weight, x.shape[1])
    _conv_forward[grid](
        x, state, weight, bias, y, x.shape[1], x.shape[2], *strides,
        HAS_BIAS=bias is not None, **sizes,
    )  # fmt: skip
    return y


def conv_backward(dy, x, weight, bias, state) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x and state in the dtype of x, of weight [D, W] and bias [D] in fp32."""
    batch, tokens, channels = x.shape
    before = 0 if state is None else weight.shape[1] - 1
    grid, strides, sizes = _conv_setup(x, state, weight, tokens)
    shape = (grid[0] * grid[2], weight.shape[1] + 1, channels)
    dparams = torch.empty(shape, dtype=torch.float32, device=x.device)
    dtotal = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _conv_backward_total[grid](
        x, state, weight, bias, dy, dtotal, dparams, tokens, channels, *strides,
        dy.stride(0), dy.stride(1), HAS_BIAS=bias is not None, **sizes,
    )  # fmt: skip
    dx = torch.empty(batch, tokens + before, channels, dtype=x.dtype, device=x.device)
    grid, _, sizes = _conv_setup(x, state, weight, tokens + before)
    sizes["BEFORE"] = before if sizes.pop("HAS_STATE") else 0
    _conv_backward_input[grid](dtotal, weight, dx, tokens, channels, **sizes)
    dparams = dparams.sum(0)
    dstate = None if state is None else dx[:, :before]
    return dx[:, before:], dstate, dparams[:-1].T, dparams[-1]


# ---- the sequential part of the gated delta rule ----


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


def delta_supports(chunk_size: int, dim_k: int) -> bool:
    """Whether a chunk and a key fill whole tiles, and a state's columns fit in registers."""
    return chunk_size in (16, 32, 64) and dim_k in (16, 32, 64, 128, 256)


@functools.lru_cache(maxsize=64)  # every layer asks for the same ones
def _bounds(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets in chunks: sequence i has the chunks from bounds[i] up to bounds[i + 1]."""
    bounds = torch.tensor((0, *segments), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return bounds.to(device)


def _columns(dim_k: int, dim_v: int) -> int:
    return max(16, min(triton.next_power_of_2(dim_v), 8192 // dim_k))


def delta_forward(last, k_out, w, u, initial, segments, states, v_new, final) -> None:
    """All chunks of all sequences: writes states [N, H, K, V], v_new [X, C, V] and final.

    last [X, 1, 1] fp32, k_out [X, C, K] contiguous, w [X, C, K] and u [X, C, V] with a row stride,
    initial and final [S, H, K, V] fp32; X = N * H.
    """
    (_, size, dim_k), (count, heads), dim_v = k_out.shape, initial.shape[:2], u.shape[-1]
    columns = _columns(dim_k, dim_v)
    _delta_forward[(triton.cdiv(dim_v, columns), count, heads)](
        last.contiguous(), k_out, w, u, initial, _bounds(segments, k_out.device),
        states, v_new, final, heads, w.stride(1), u.stride(1),
        C=size, K=dim_k, V=dim_v, BV=columns,
    )  # fmt: skip


def delta_backward(last, k_out, w, dread, dfinal, segments, dends, dv_new, dinitial) -> None:
    """Writes dends like dread [X, K, V] and dinitial like dfinal [S, H, K, V], and completes
    dv_new [X, C, V]; the rest as in ``delta_forward``."""
    (_, size, dim_k), (count, heads), dim_v = k_out.shape, dfinal.shape[:2], dv_new.shape[-1]
    columns = _columns(dim_k, dim_v)
    _delta_backward[(triton.cdiv(dim_v, columns), count, heads)](
        last.contiguous(), k_out, w, dread, dfinal,
        _bounds(segments, k_out.device), dends, dv_new, dinitial, heads, w.stride(1),
        C=size, K=dim_k, V=dim_v, BV=columns,
    )  # fmt: skip


# ---- the sequential part of SSD ----


@triton.jit
def _decay_scan(add, decay, initial, bounds, states, final, N, F, H, per_group, R, P,
                REVERSE: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Writes s to states[n], then s = s * decay[n] + add[n], over the chunks of one sequence."""
    sequence, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    ok = f < F
    head = f // per_group * R + f // P % R
    here = (sequence * tl.num_programs(2) + b) * F + f
    s = tl.load(initial + here, mask=ok, other=0.0)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    for step in range(end - begin):
        row = b * N + (end - 1 - step if REVERSE else begin + step)
        tl.store(states + row * F + f, s, mask=ok)
        s *= tl.load(decay + row * H + head, mask=ok, other=0.0)
        s += tl.load(add + row * F + f, mask=ok, other=0.0)
    tl.store(final + here, s, mask=ok)


def decay_scan(add, decay, initial, segments, states, final, reverse: bool) -> None:
    """Writes states [B, N, G, S, R, P] and final: the states before each chunk and after the last,
    or with ``reverse``, from the last chunk to the first, the gradients of those after each chunk
    and before the first. add like states, decay [B, N, H] and initial [sequences, B, ...] fp32."""
    batch, chunks, _, size, ratio, dim = add.shape
    features = add[0, 0].numel()
    _decay_scan[(triton.cdiv(features, 512), len(segments), batch)](
        add.contiguous(), decay.contiguous(), initial,
        _bounds(segments, add.device), states, final, chunks, features, decay.shape[2],
        size * ratio * dim, ratio, dim, REVERSE=reverse, BF=512,
    )  # fmt: skip

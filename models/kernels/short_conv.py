"""The short causal convolution with its SiLU on a GPU, one kernel forward and two backward.

Shape letters: B batch, T tokens, D channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def _setup(x, state, weight, rows):
    tile = 1 if rows == 1 else 32
    grid = (triton.cdiv(rows, tile), triton.cdiv(x.shape[2], 128), x.shape[0])
    strides = (x.stride(0), x.stride(1)) + ((0, 0) if state is None else state.stride()[:2])
    sizes = {"HAS_STATE": state is not None, "W": weight.shape[1], "BT": tile, "BD": 128}
    return grid, strides, sizes


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> Tensor:
    """silu of the causal convolution. x [B, T, D] and state [B, W - 1, D] of unit last stride,
    weight [D, W] and bias [D] contiguous; returns [B, T, D] in the dtype of x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, strides, sizes = _setup(x, state, weight, x.shape[1])
    _conv_forward[grid](
        x, state, weight, bias, y, x.shape[1], x.shape[2], *strides,
        HAS_BIAS=bias is not None, **sizes,
    )  # fmt: skip
    return y


def backward(dy, x, weight, bias, state) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x and state in the dtype of x, of weight [D, W] and bias [D] in fp32."""
    batch, tokens, channels = x.shape
    before = 0 if state is None else weight.shape[1] - 1
    grid, strides, sizes = _setup(x, state, weight, tokens)
    shape = (grid[0] * grid[2], weight.shape[1] + 1, channels)
    dparams = torch.empty(shape, dtype=torch.float32, device=x.device)
    dtotal = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _conv_backward_total[grid](
        x, state, weight, bias, dy, dtotal, dparams, tokens, channels, *strides,
        dy.stride(0), dy.stride(1), HAS_BIAS=bias is not None, **sizes,
    )  # fmt: skip
    dx = torch.empty(batch, tokens + before, channels, dtype=x.dtype, device=x.device)
    grid, _, sizes = _setup(x, state, weight, tokens + before)
    sizes["BEFORE"] = before if sizes.pop("HAS_STATE") else 0
    _conv_backward_input[grid](dtotal, weight, dx, tokens, channels, **sizes)
    dparams = dparams.sum(0)
    dstate = None if state is None else dx[:, :before]
    return dx[:, before:], dstate, dparams[:-1].T, dparams[-1]

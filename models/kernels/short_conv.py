"""The short causal convolution with its SiLU on a GPU, forward and backward.

A program goes down some rows of some channels, and holds the last W rows in registers. A table
gives its rows, [N, 3]: the first, their number, and their sequence; what came before a sequence is
in its state.

Shape letters: T tokens of all sequences, D channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels import on_its_device

ROWS = 64  # of a program
CHANNELS = 128


@triton.jit
def _place(table, offsets):
    """The program's first row and the row after its last, its sequence, and where that begins."""
    n = tl.program_id(0)
    start, count = tl.load(table + 3 * n).to(tl.int64), tl.load(table + 3 * n + 1)
    sequence = tl.load(table + 3 * n + 2).to(tl.int64)
    return start, start + count, sequence, tl.load(offsets + sequence).to(tl.int64)


@triton.jit
def _before(x, state, row, begin, sequence, d, D, sxt, ssb, sst, W: tl.constexpr):
    """A row that may lie in the state, or before that."""
    value = tl.load(x + row * sxt + d, mask=(d < D) & (row >= begin), other=0.0).to(tl.float32)
    if state is not None:
        at = row - begin + W - 1
        there = (d < D) & (row < begin) & (at >= 0)
        old = tl.load(state + sequence * ssb + at * sst + d, mask=there, other=0.0)
        value += old.to(tl.float32)
    return value


@triton.jit
def _parameters(weight, bias, d, D, W: tl.constexpr, BD: tl.constexpr):
    taps = ()
    for tap in tl.static_range(W):
        taps += (tl.load(weight + d * W + tap, mask=d < D, other=0.0).to(tl.float32),)
    shift = tl.zeros((BD,), tl.float32)
    if bias is not None:
        shift += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def _conv_forward(x, state, weight, bias, table, offsets, y, D, sxt, ssb, sst, W: tl.constexpr,
                  BD: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """y[t] = silu(sum_j weight[j] * input[t - W + 1 + j] + bias), U rows at a time."""
    start, end, sequence, begin = _place(table, offsets)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    taps, shift = _parameters(weight, bias, d, D, W, BD)
    window = ()
    for j in tl.static_range(W - 1):
        old = start - (W - 1) + j
        window += (_before(x, state, old, begin, sequence, d, D, sxt, ssb, sst, W),)
    for first in range(start, end, U):
        rows = window
        for u in tl.static_range(U):
            there = (d < D) & (first + u < end)
            rows += (tl.load(x + (first + u) * sxt + d, mask=there, other=0.0).to(tl.float32),)
        for u in tl.static_range(U):
            total = shift
            for tap in tl.static_range(W):
                total += rows[u + tap] * taps[tap]
            out = (total * tl.sigmoid(total)).to(y.dtype.element_ty)
            tl.store(y + (first + u) * D + d, out, mask=(d < D) & (first + u < end))
        window = ()
        for j in tl.static_range(W - 1):
            window += (rows[U + j],)


@triton.jit
def _conv_backward(x, state, weight, bias, dy, dfinal, table, offsets, dx, dstate, dparams, D,
                   sxt, ssb, sst, sdt, sgt, W: tl.constexpr, BD: tl.constexpr,
                   U: tl.constexpr):  # fmt: skip
    """With total[t] the argument of silu, dtotal[t] = dy[t] silu'(total[t]),
    dx[t] = sum_j weight[j] * dtotal[t + W - 1 - j], and dfinal for the last rows; of the program's
    rows, dweight[j] = sum_t dtotal[t] * input[t - W + 1 + j] and dbias = sum_t dtotal[t]."""
    start, end, sequence, begin = _place(table, offsets)
    stop = tl.load(offsets + sequence + 1).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    taps, shift = _parameters(weight, bias, d, D, W, BD)
    window, grads, sums = (), (), ()
    for j in tl.static_range(W - 1):
        old = start - (W - 1) + j
        window += (_before(x, state, old, begin, sequence, d, D, sxt, ssb, sst, W),)
        grads += (tl.zeros((BD,), tl.float32),)
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros((BD,), tl.float32),)
    # row t completes dx of row t - W + 1, which is in the state if t is less than W - 1 rows in
    for first in range(start, end + W - 1, U):
        rows, douts = window, ()
        for u in tl.static_range(U):
            there = (d < D) & (first + u < tl.minimum(stop, end + W - 1))
            rows += (tl.load(x + (first + u) * sxt + d, mask=there, other=0.0).to(tl.float32),)
            douts += (tl.load(dy + (first + u) * sdt + d, mask=there, other=0.0).to(tl.float32),)
        dtotals = grads
        for u in tl.static_range(U):
            total = shift
            for tap in tl.static_range(W):
                total += rows[u + tap] * taps[tap]
            gate = tl.sigmoid(total)
            grad = douts[u] * gate * (1 + total * (1 - gate))
            dtotals += (grad,)
            mine = tl.where(first + u < end, grad, 0.0)
            parts, sums = sums, ()
            for tap in tl.static_range(W):
                sums += (parts[tap] + mine * rows[u + tap],)
            sums += (parts[W] + mine,)
        for u in tl.static_range(U):
            value = tl.zeros((BD,), tl.float32)
            for tap in tl.static_range(W):
                value += dtotals[u + W - 1 - tap] * taps[tap]
            row = first + u - (W - 1)
            if dfinal is not None:
                at = row - (stop - (W - 1))
                there = (d < D) & (at >= 0) & (at < W - 1)
                place = (sequence * (W - 1) + at) * D + d
                value += tl.load(dfinal + place, mask=there, other=0.0).to(tl.float32)
            there = (d < D) & (row >= start) & (row < end)
            tl.store(dx + row * sgt + d, value.to(dx.dtype.element_ty), mask=there)
            if dstate is not None:
                at = sequence * (W - 1) + row - begin + W - 1
                there = (d < D) & (start == begin) & (row < begin)
                tl.store(dstate + at * D + d, value.to(dstate.dtype.element_ty), mask=there)
        window, grads = (), ()
        for j in tl.static_range(W - 1):
            window += (rows[U + j],)
            grads += (dtotals[U + j],)
    for tap in tl.static_range(W + 1):
        place = (tl.program_id(0).to(tl.int64) * (W + 1) + tap) * D + d
        tl.store(dparams + place, sums[tap], mask=d < D)


@triton.jit
def _sum_parameters(dparams, dweight, dbias, N, D, W: tl.constexpr, BN: tl.constexpr,
                    BD: tl.constexpr):  # fmt: skip
    """The programs' shares of the gradients of weight and bias, one after the other."""
    tap, d = tl.program_id(1), tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        place = (n.to(tl.int64) * (W + 1) + tap)[:, None] * D + d[None, :]
        there = (n < N)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(dparams + place, mask=there, other=0.0), axis=0)
    if tap < W:
        tl.store(dweight + d * W + tap, total.to(dweight.dtype.element_ty), mask=d < D)
    elif dbias is not None:
        tl.store(dbias + d, total.to(dbias.dtype.element_ty), mask=d < D)


@triton.jit
def _final_state(x, state, offsets, final, D, sxt, ssb, sst, W: tl.constexpr,
                 BD: tl.constexpr):  # fmt: skip
    """The last W - 1 rows of a sequence, after those of its state."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + sequence).to(tl.int64), tl.load(offsets + sequence + 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    for j in tl.static_range(W - 1):
        row = end - (W - 1) + j
        value = _before(x, state, row, begin, sequence, d, D, sxt, ssb, sst, W)
        place = (sequence * (W - 1) + j) * D + d
        tl.store(final + place, value.to(final.dtype.element_ty), mask=d < D)


def _setup(x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor | None):
    """x with all tokens in one row, state, weight and bias as they are read, the strides of x
    and state, and the sizes that all kernels need."""
    x = (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)
    if state is not None and state.stride(-1) != 1:
        state = state.contiguous()
    strides = (x.stride(0), *((0, 0) if state is None else state.stride()[:2]))
    sizes = {"W": weight.shape[1], "BD": CHANNELS, "num_warps": 1}
    bias = None if bias is None else bias.contiguous()
    return x, state, weight.contiguous(), bias, strides, sizes


@on_its_device
def forward(x, weight, bias, state, table, offsets, with_final):
    """silu of the causal convolution, and the states after the last token of each sequence.

    x [B, T, D], weight [D, W], bias [D], state [sequences, W - 1, D]; bias and state may
    be None; the table of the rows, the offsets of the sequences.
    Returns y and the state, in the dtype of x.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (_, _, channels), taps, sequences = x.shape, weight.shape[1], len(offsets) - 1
    x, state, weight, bias, strides, sizes = _setup(x, state, weight, bias)
    blocks = triton.cdiv(channels, CHANNELS)
    _conv_forward[(len(table), blocks)](
        x, state, weight, bias, table, offsets, y, channels,
        *strides, U=16, **sizes,
    )  # fmt: skip
    final = None
    if with_final:
        final = torch.empty(sequences, taps - 1, channels, dtype=x.dtype, device=x.device)
        _final_state[(sequences, blocks)](x, state, offsets, final, channels, *strides, **sizes)
    return y, final


@on_its_device
def backward(dy, dfinal, x, weight, bias, state, table, offsets, dx):
    """Gradients of x, weight, bias and state, None for those that are None; dx is given, empty."""
    (_, _, channels), taps = x.shape, weight.shape[1]
    dstate = None
    if state is not None:  # an empty sequence has no program
        dstate = torch.zeros(state.shape, dtype=state.dtype, device=state.device)
        if dfinal is not None:
            dstate.copy_(dfinal)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    shape = (len(table), taps + 1, channels)
    dparams = torch.empty(shape, dtype=torch.float32, device=x.device)
    x, state, weight, bias, strides, sizes = _setup(x, state, weight, bias)
    dy = (dy if dy.stride(-1) == 1 else dy.contiguous()).flatten(0, 1)
    _conv_backward[(len(table), triton.cdiv(channels, CHANNELS))](
        x, state, weight, bias, dy,
        dfinal, table, offsets, dx, dstate, dparams, channels, *strides, dy.stride(0), dx.stride(1),
        U=8, **sizes,
    )  # fmt: skip
    _sum_parameters[(triton.cdiv(channels, 32), taps + 1)](
        dparams, dweight, dbias, len(table), channels, W=taps, BN=64, BD=32
    )
    return dx, dweight, dbias, dstate

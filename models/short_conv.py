"""The short causal convolution in front of both scans, with its state.

Shape letters: B batch, T tokens, D channels, W taps.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels, operators
from models.chunks import (
    check_state,
    chunk_bounds,
    chunk_table,
    kept_for_graphs,
    sequence_offsets,
)
from models.exact import CHUNK, by_chunks
from models.rows import gradient_like


class _TapSum(torch.autograd.Function):
    """The sum over taps of shifted inputs: x [B, T + W - 1, D], weight [D, W], bias [D] or None to
    [B, T, D]; or `known`, the same from an earlier call, of which the gradients are asked for.

    Reads the tokens in the layout that they have. A grouped convolution wants [B, D, T], and two
    transposes cost more than the taps.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, known):
        taps = weight.T.contiguous()  # a tap's weights lie side by side, as the channels do
        ctx.save_for_backward(x, taps)
        ctx.has_bias = bias is not None
        if known is not None:
            return known.view(x.shape[0], -1, x.shape[2])
        size = x.shape[1] - len(taps) + 1
        total = x[:, :size] * taps[0]
        for tap in range(1, len(taps)):
            total.addcmul_(x[:, tap : tap + size], taps[tap])
        if bias is not None:
            total += bias
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        x, taps = ctx.saved_tensors
        size = dtotal.shape[1]
        dx, dtaps, product = torch.zeros_like(x), torch.empty_like(taps), torch.empty_like(dtotal)
        for tap in range(len(taps)):
            dx[:, tap : tap + size].addcmul_(dtotal, taps[tap])
            torch.mul(dtotal, x[:, tap : tap + size], out=product)
            dtaps[tap] = product.sum((0, 1))
        return dx, dtaps.T, dtotal.sum((0, 1)) if ctx.has_bias else None, None


class _KernelConv(torch.autograd.Function):
    """The convolution by Triton: x [B, T, D] and state [sequences, W - 1, D] or None, and offsets
    or None, to [B, T, D], and to the final state or None."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, cu_seqlens, with_final):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, state)
        ctx.places = _places(x, cu_seqlens)
        forward = kernels.find("short_conv", x).forward
        return forward(x, weight, bias, state, *ctx.places, with_final)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, *others = ctx.saved_tensors
        grads = _kernel_backward(dy, dfinal, x, *others, ctx.places, gradient_like(x))
        return *grads, None, None


def _kernel_backward(dy, dfinal, x, weight, bias, state, places, dx):
    dy = torch.zeros_like(x) if dy is None else dy
    if dfinal is not None:
        sequences = len(places[1]) - 1
        dfinal = dfinal.reshape(sequences, weight.shape[1] - 1, x.shape[2]).contiguous()
    backward = kernels.find("short_conv", x).backward
    return backward(dy, dfinal, x, weight, bias, state, *places, dx)


def _places(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the rows of each program of the kernels lie, and each sequence, for x [B, T, D] whose
    batch counts as sequences."""
    offsets = sequence_offsets(cu_seqlens, *x.shape[:2])
    if offsets is None:
        offsets = [x.shape[1] * row for row in range(len(x) + 1)]
    rows = kernels.find("short_conv", x).ROWS
    lengths = tuple(end - start for start, end in itertools.pairwise(offsets))
    table = chunk_table(tuple(offsets), rows, x.device)
    return kept_for_graphs(table, chunk_bounds(lengths, x.device))


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    output_final_state: bool = True,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution over time, then SiLU.

    Args:
        x: [B, T, D].
        weight: [D, W]; the last tap meets the current token.
        bias: [D] or None.
        state: [B, W - 1, D], the inputs before the first token, zeros if None; with
            ``cu_seqlens`` [sequences, W - 1, D].
        cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row (B = 1).
        output_final_state: whether to return the state after the last token of each sequence.
        exact: one chunk at a time, see `models.exact`; no sequence is empty then, and the offsets
            are multiples of its CHUNK.
    Returns:
        y [B, T, D] in the dtype of x, and the state like ``state``, or None.
    Raises:
        ValueError: for a weight, bias, state or offsets that do not fit.
    """
    channels, before = x.shape[2], weight.shape[-1] - 1
    for name, t, shape in (("weight", weight, (channels, before + 1)), ("bias", bias, (channels,))):
        if t is not None and t.shape != shape:
            raise ValueError(
                f"the convolution's {name} must be {list(shape)} for x {list(x.shape)}, got "
                f"{list(t.shape)}; pass one with a row for each channel"
            )
    if state is not None:
        shape = (_sequences(x, cu_seqlens), before, x.shape[2])
        check_state(state, shape, x.dtype, x, "the convolution's state")
    if not torch.compiler.is_compiling():
        if kernels.usable(x):
            return _KernelConv.apply(x, weight, bias, state, cu_seqlens, output_final_state)
        y, final, _ = _run(x, weight, bias, state, cu_seqlens, exact)
    else:
        y, final, _ = _operator(x, weight, bias, state, cu_seqlens, exact)
        if output_final_state:
            final = final.view(_sequences(x, cu_seqlens), before, x.shape[2])
    return y, final if output_final_state else None


def _sequences(x, cu_seqlens):
    return len(x) if cu_seqlens is None else cu_seqlens.numel() - 1


def _run(x, weight, bias, state, cu_seqlens, exact, total=None):
    """y, the final state, and the convolution before its SiLU, for the backward: `total` itself if
    that is the backward, and y then may have no values."""
    if kernels.usable(x):
        forward = kernels.find("short_conv", x).forward
        y, final = forward(x, weight, bias, state, *_places(x, cu_seqlens), True)
        return y, final, x.new_empty(0)
    if exact:
        return _chunked_conv(x, weight, bias, state, cu_seqlens, total)
    if cu_seqlens is not None:
        return _packed_conv(x, weight, bias, state, cu_seqlens, total)
    y, total = _convolve(x, weight, bias, state, total)
    return y, _last(x, state, weight.shape[1] - 1), total


def _chunked_conv(x, weight, bias, state, cu_seqlens, total):
    """Chunks as a batch, each after the last inputs of the one before it, or the state."""
    before = weight.shape[1] - 1
    if before > CHUNK:
        raise ValueError(
            f"conv_size must be at most {CHUNK + 1} in exact mode, got {before + 1}; leave the mode"
        )
    offsets = sequence_offsets(cu_seqlens, *x.shape[:2])
    segments = tuple((end - start) // CHUNK for start, end in itertools.pairwise(offsets))
    bounds = chunk_bounds(segments, x.device).long()
    chunks = x[0].unflatten(0, (-1, CHUNK))
    ends = chunks[:, CHUNK - before :]
    if state is None:
        state = x.new_zeros(len(offsets) - 1, before, x.shape[2])
    history = torch.cat((state[:1], ends[:-1])).index_copy(0, bounds[:-1], state)
    y, total = _convolve(chunks, weight, bias, history, total, exact=True)
    return y.flatten(0, 1)[None], ends.index_select(0, bounds[1:] - 1), total


def _packed_conv(x, weight, bias, state, cu_seqlens, total):
    """Each sequence follows its own state: [state 0, sequence 0, state 1, sequence 1, ...]."""
    offsets = sequence_offsets(cu_seqlens, *x.shape[:2])
    count, before = len(offsets) - 1, weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(count, before, x.shape[2])
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    parts, keep, ends, row = [], [], [], 0
    # cut once: the gradient of a slice is as large as x
    for pair, length in zip(zip(state, x[0].split(lengths), strict=True), lengths, strict=True):
        parts += pair
        keep.append(torch.arange(row, row + length))
        row += before + length
        ends.append(torch.arange(row - before, row))
    padded = torch.cat(parts)[None]
    x, state = padded[:, before:], padded[:, :before]
    y, total = _convolve(x, weight, bias, state, total, padded=padded)
    y = y.index_select(1, torch.cat(keep).to(x.device))
    final = padded.index_select(1, torch.cat(ends).to(x.device))
    return y, final.view(count, before, x.shape[2]), total


def _last(x: Tensor, state: Tensor | None, before: int) -> Tensor:
    """The last ``before`` inputs, a copy: the state does not keep all the tokens' memory."""
    tokens = x.shape[1]
    if tokens >= before:
        return x[:, tokens - before :].clone()
    if state is None:
        state = x.new_zeros(x.shape[0], before, x.shape[2])
    return torch.cat((state[:, tokens:], x), dim=1)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    exact: bool = False,
    padded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B, T, D] after state [B, W - 1, D], or after zeros, to [B, T, D]; in exact mode a row of
    the batch is a chunk. `total`, also returned, as in `_run`. `padded`: the two where they lie one
    after the other."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    padded = torch.cat((state, x), dim=1) if padded is None else padded
    if x.shape[1] == 1:
        total = (padded * weight.T).sum(1, keepdim=True)
        total = total if bias is None else total + bias
        return F.silu(total), total
    total = _TapSum.apply(padded, weight, bias, total)
    return by_chunks(exact, F.silu, total.flatten(0, 1)[None]).view_as(total), total


def _fake(x, weight, bias, state, cu_seqlens, exact):
    (batch, tokens, width), before = x.shape, weight.shape[1] - 1
    sequences, rows = _sequences(x, cu_seqlens), batch * tokens
    if cu_seqlens is not None and not exact:
        rows += (sequences - 1) * before
    total = x.new_empty(0 if kernels.usable(x) else rows * width)
    return x.new_empty(x.shape), x.new_empty(sequences * before * width), total


def _run_backward(dy, dfinal, x, weight, bias, state, cu_seqlens, total, exact):
    """Runs the forward again without the sum over the taps, and leaves the rest to autograd."""
    if kernels.usable(x):
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return _kernel_backward(dy, dfinal, x, weight, bias, state, _places(x, cu_seqlens), dx)
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, state)]
    leaves = [t for t in inputs if t is not None]
    with torch.enable_grad():
        y, final, _ = _run(*inputs, cu_seqlens, exact, total)
    outputs, grads = [y], [dy]
    if dfinal is not None:
        outputs, grads = [y, final], [dy, dfinal.view(final.shape)]
    found = iter(torch.autograd.grad(outputs, leaves, grads, materialize_grads=True))
    dx, dweight, dbias, dstate = (None if t is None else next(found) for t in inputs)
    # those of x and the state are parts of one tensor
    return dx, dweight, dbias, None if dstate is None else dstate.clone()


_operator = operators.register(
    "short_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? state",
    "bool exact",
    1,
    0,
    _run,
    _fake,
    _run_backward,
)

"""The short causal convolution in front of both scans, with its state.

Shape letters: B batch, T tokens, D channels, W taps.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


class _TapSum(torch.autograd.Function):
    """silu of the sum over taps of shifted inputs, for the CPU: x [B, T + W - 1, D], weight
    [D, W], bias [D] or None to [B, T, D].

    Reads the tokens in the layout that they have. A grouped convolution wants [B, D, T], and two
    transposes cost more than the taps.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        taps = weight.T.contiguous()  # a tap's weights lie side by side, as the channels do
        size = x.shape[1] - len(taps) + 1
        total = x[:, :size] * taps[0]
        for tap in range(1, len(taps)):
            total.addcmul_(x[:, tap : tap + size], taps[tap])
        if bias is not None:
            total += bias
        ctx.save_for_backward(x, taps, total)
        ctx.has_bias = bias is not None
        return F.silu(total)

    @staticmethod
    def backward(ctx, dy):
        x, taps, total = ctx.saved_tensors
        size = total.shape[1]
        dtotal = torch.ops.aten.silu_backward(dy, total)
        dx, dtaps, product = torch.zeros_like(x), torch.empty_like(taps), torch.empty_like(total)
        for tap in range(len(taps)):
            dx[:, tap : tap + size].addcmul_(dtotal, taps[tap])
            torch.mul(dtotal, x[:, tap : tap + size], out=product)
            dtaps[tap] = product.sum((0, 1))
        return dx, dtaps.T, dtotal.sum((0, 1)) if ctx.has_bias else None


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    offsets: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, then SiLU.

    Args:
        x: [B, T, D].
        weight: [D, W]; the last tap meets the current token.
        bias: [D] or None.
        state: [B, W - 1, D], the inputs before the first token, zeros if None; with ``offsets``
            [sequences, W - 1, D].
        offsets: token offsets of sequences packed into one row (B = 1).
    Returns:
        y [B, T, D] in the dtype of x, and the state after the last token of each sequence.
    """
    before = weight.shape[1] - 1
    count = x.shape[0] if offsets is None else len(offsets) - 1
    if state is None:
        state = x.new_zeros(count, before, x.shape[2])
    if offsets is None:
        padded = torch.cat((state.to(x.dtype), x), dim=1)
        # a copy, so that the state does not keep all the tokens' memory
        return _apply(padded, weight, bias), padded[:, x.shape[1] :].clone()
    # Each sequence follows its own state: [state 0, sequence 0, state 1, sequence 1, ...].
    parts, keep, ends, row = [], [], [], 0
    for sequence, (start, end) in enumerate(itertools.pairwise(offsets)):
        parts += [state[sequence], x[0, start:end].to(state.dtype)]
        keep.append(torch.arange(row, row + end - start))
        row += before + end - start
        ends.append(torch.arange(row - before, row))
    padded = torch.cat(parts)[None].to(x.dtype)
    y = _apply(padded, weight, bias).index_select(1, torch.cat(keep).to(x.device))
    final = padded.index_select(1, torch.cat(ends).to(x.device)).view(count, before, -1)
    return y, final


def _apply(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, T + W - 1, D] to [B, T, D]."""
    if padded.shape[1] == weight.shape[1]:
        total = (padded * weight.to(padded.dtype).T).sum(1, keepdim=True)
        return F.silu(total if bias is None else total + bias.to(total.dtype))
    weight = weight.to(padded.dtype)
    bias = None if bias is None else bias.to(padded.dtype)
    if padded.device.type == "cpu":
        return _TapSum.apply(padded, weight, bias)
    y = F.conv1d(padded.mT, weight[:, None], bias, groups=weight.shape[0])
    return F.silu(y).mT

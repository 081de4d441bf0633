"""The log-probabilities of tokens on a GPU. The order of a row's sums follows from V alone.

Shape letters: V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels import on_its_device


@triton.jit
def _forward(logits, tokens, log_probs, norms, V, stride, BV: tl.constexpr):
    """norm = log sum_v exp(logits[v]), from a running maximum; logits[token] - norm."""
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    # the least finite number, so that words of no probability make no NaN
    peak, sums = -3.4028234663852886e38, tl.zeros((BV,), tl.float32)
    for first in range(0, V, BV):
        place = logits + row * stride + first + v
        x = tl.load(place, mask=first + v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        sums = sums * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
    norm = peak + tl.log(tl.sum(sums, axis=0))
    token = tl.load(tokens + row)
    there = (token >= 0) & (token < V)  # else NaN, and not what lies in another row
    chosen = tl.load(logits + row * stride + token, mask=there, other=float("nan")).to(tl.float32)
    tl.store(norms + row, norm)
    tl.store(log_probs + row, chosen - norm)


@triton.jit
def _backward(logits, tokens, norms, dout, dlogits, V, stride, BV: tl.constexpr):
    """dlogits[v] = dout ((v == token) - exp(logits[v] - norm))."""
    row, v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV + tl.arange(0, BV)
    x = tl.load(logits + row * stride + v, mask=v < V, other=0.0).to(tl.float32)
    share = (v == tl.load(tokens + row)).to(tl.float32) - tl.exp(x - tl.load(norms + row))
    grad = share * tl.load(dout + row)
    tl.store(dlogits + row * V + v, grad.to(dlogits.dtype.element_ty), mask=v < V)


BLOCK = 4096


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.shape[-1]))


@on_its_device
def forward(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of tokens [R] under logits [R, V], and the rows' norms, fp32."""
    log_probs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    norms, (rows, words) = torch.empty_like(log_probs), logits.shape
    _forward[(rows,)](
        logits, tokens, log_probs, norms, words, logits.stride(0), BV=_block(logits), num_warps=8
    )
    return log_probs, norms


@on_its_device
def backward(dout: Tensor, logits: Tensor, tokens: Tensor, norms: Tensor) -> Tensor:
    """The gradient of the logits."""
    rows, words = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward[(rows, triton.cdiv(words, _block(logits)))](
        logits, tokens, norms, dout, dlogits, words, logits.stride(0), BV=_block(logits),
        num_warps=8,
    )  # fmt: skip
    return dlogits

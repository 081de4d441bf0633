"""Log-probabilities of tokens, the same bits wherever their logits lie and however many there are.

Shape letters: V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels


class _KernelLogProbs(torch.autograd.Function):
    """``token_log_probs`` of logits [R, V] by Triton."""

    @staticmethod
    def forward(ctx, logits, tokens):
        log_probs, norms = kernels.find("log_probs", logits).forward(logits, tokens)
        ctx.save_for_backward(logits, tokens, norms)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        logits, *others = ctx.saved_tensors
        backward = kernels.find("log_probs", logits).backward
        return backward(dout.contiguous(), logits, *others), None


class _TokenLogProbs(torch.autograd.Function):
    """The arguments and the result of ``token_log_probs``; keeps one number a row for the backward
    besides what it was given."""

    @staticmethod
    def forward(ctx, logits, tokens):
        logits32 = logits.float()
        peak = logits32.amax(-1, keepdim=True)
        terms = (logits32 - peak).exp_()
        size = terms.shape[-1]
        while size > 1:  # pairs, in an order that follows from V alone
            half = (size + 1) // 2
            terms[..., : size - half] += terms[..., half:size]
            size = half
        norm = peak + terms[..., :1].log()
        ctx.save_for_backward(logits, tokens, norm)
        return (logits32.gather(-1, tokens[..., None]) - norm)[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        logits, tokens, norm = ctx.saved_tensors
        dout = dout[..., None]
        grad = (logits.float() - norm).exp_().mul_(-dout)
        grad.scatter_add_(-1, tokens[..., None], dout)
        return grad.to(logits.dtype), None


def log_probs_of(logits: Tensor, tokens: Tensor, exact: bool) -> Tensor:
    """What a model in this mode reports: ``token_log_probs``, or where no kernel is the faster
    ``log_softmax``, which makes no promise of bits; arguments, result and errors as there."""
    _check(logits, tokens)
    if exact or (kernels.usable(logits) and not torch.compiler.is_compiling()):
        return token_log_probs(logits, tokens)
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural log-probability of each token under its logits.

    A row's bits depend on that row alone, on the device and on V: PyTorch's ``log_softmax`` sums a
    row in an order that also follows from its address where V is above 1,024 and no multiple of 16
    bytes, and from the number of rows on a CPU.

    Args:
        logits: [..., V], any floating dtype; the sum is one of fp32.
        tokens: [...] int64, below V; there is no index that is ignored.
    Returns:
        [...] fp32.
    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(logits, tokens)
    if kernels.usable(logits) and tokens.numel():
        rows = logits.reshape(-1, logits.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        return _KernelLogProbs.apply(rows, tokens.reshape(-1).contiguous()).view(tokens.shape)
    return _TokenLogProbs.apply(logits, tokens)


def _check(logits: Tensor, tokens: Tensor) -> None:
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens must have the shape of logits without the last dimension, got "
            f"{list(tokens.shape)} and {list(logits.shape)}; give one token for each row"
        )

"""SwiGLU, ``silu(gate) * value``, of both halves of a projection; arXiv 2002.05202."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels
from models.exact import by_chunks


class _KernelSwiGLU(torch.autograd.Function):
    """x [R, 2 N] to [R, N] by Triton."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return kernels.find("swiglu", x).forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return kernels.find("swiglu", x).backward(dy.contiguous(), x)


def swiglu(x: Tensor, exact: bool = False) -> Tensor:
    """x [..., 2 N], gate and value side by side, to [..., N]; ``exact``: see `models.exact`. What
    torch.compile makes of plain PyTorch is one kernel too.

    Raises:
        ValueError: for an odd number of channels.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu takes gate and value of one width, got {x.shape[-1]} channels")
    if kernels.usable(x) and x.numel() and not torch.compiler.is_compiling():
        y = _KernelSwiGLU.apply(x.reshape(-1, x.shape[-1]).contiguous())
        return y.view(*x.shape[:-1], -1)
    gate, value = x.chunk(2, dim=-1)
    return by_chunks(exact, F.silu, gate) * value

"""Linear layers whose product gives a row the same bits whatever rows are beside it.

Shape letters: R rows, K input channels, N output channels.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatednorm import NotesHooks
from models import kernels
from models.exact import CHUNK
from models.rows import PRODUCT, with_zeros

PLAIN = (Tensor, nn.Parameter)  # not a quantised weight, for example, which computes otherwise


class Product(torch.autograd.Function):
    """x [R, K] times weight [N, K], plus bias [N] or None, to [R, N] by `product(x, weight, bias)`.
    The backward is PyTorch's products, of what needs a gradient."""

    @staticmethod
    def forward(ctx, product, x, weight, bias):
        _, dx, dweight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if dweight else None, weight if dx else None)
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, bias).detach()  # no view, which could not change in place

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wide = with_zeros(dy)
        with torch.autocast(dy.device.type, enabled=False):
            if weight is not None:
                weight = wide @ (weight if wide is dy else rows_to(PRODUCT, weight))
            return (
                None,
                weight,
                None if x is None else (wide.mT @ x)[: dy.shape[1]],
                dy.sum(0) if ctx.needs_input_grad[3] else None,
            )


def multiply(product: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`Product` of the rows of x [..., K], in autocast's dtype where that is on: [..., N]."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    y = Product.apply(product, x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def rows_to(multiple: int, x: Tensor | None) -> Tensor | None:
    """x [N, ...] with rows of zeros up to the next multiple."""
    rest = 0 if x is None else -len(x) % multiple
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rest)) if rest else x


def _exact(multiple: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Summed in fp32 (fp64 for fp64) and rounded once."""
    x, product = x.contiguous(), kernels.find("product", x)
    if product is None:
        return _blocks(x, weight, bias)
    return product.linear(x, weight, bias, multiple)


def _blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Blocks of `CHUNK` rows, one call each: PyTorch's libraries choose how they add by a product's
    shape."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, weight = x.to(acc), weight.to(acc).T
    if len(x) % CHUNK:
        wide = F.pad(wide, (0, 0, 0, -len(x) % CHUNK))
    y = wide.new_empty(len(wide), weight.shape[1])
    for start in range(0, len(wide), CHUNK):
        torch.mm(wide[start : start + CHUNK], weight, out=y[start : start + CHUNK])
    y = y[: len(x)]
    return (y if bias is None else y.add_(bias)).to(x.dtype)


class Linear(NotesHooks, nn.Linear):
    """`nn.Linear` with an exact mode, in which a row's bits do not depend on the other rows.

    Attributes:
        exact: whether it is on.
        MULTIPLE: of how many columns a row of an exact product takes the place on a GPU.
    """

    exact = False
    MULTIPLE = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.exact:
            return super().forward(x)
        if type(self.weight) not in PLAIN:
            raise ValueError(
                "exact mode needs weights of a linear layer that are plain tensors, got "
                f"{type(self.weight).__name__}; convert them, or leave the mode"
            )
        return multiply(partial(_exact, self.MULTIPLE), x, self.weight, self.bias)

    PLAIN_FORWARD = forward  # outside exact mode

"""Linear layers whose product gives a row the same bits whatever rows are beside it.

Shape letters: R rows, K input channels, N output channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatednorm import NotesHooks
from models import kernels
from models.exact import CHUNK
from models.rows import with_zeros

PLAIN = (Tensor, nn.Parameter)  # not a quantised weight, for example, which computes otherwise


class Product(torch.autograd.Function):
    """x [R, K] times weight [N, K], plus bias [N] or None, to [R, N] by `product(x, weight, bias)`.
    The backward is PyTorch's products, of what needs a gradient."""

    @staticmethod
    def forward(ctx, product, x, weight, bias):
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        _, dx, dweight, dbias = ctx.needs_input_grad
        wide = with_zeros(dy)
        with torch.autocast(x.device.type, enabled=False):
            return (
                None,
                wide @ rows_to(wide.shape[1], weight) if dx else None,
                (wide.mT @ x)[: len(weight)] if dweight else None,
                dy.sum(0) if dbias else None,
            )


def rows_to(count: int, x: Tensor) -> Tensor:
    """x [N, ...] with rows of zeros after it, so that there are so many."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, count - len(x))) if count > len(x) else x


def _exact(multiple: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Summed in fp32 (fp64 for fp64) and rounded once."""
    product = kernels.find("product", x)
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
        weight, bias = self.weight, self.bias
        if type(weight) not in PLAIN:
            raise ValueError(
                "exact mode needs weights of a linear layer that are plain tensors, got "
                f"{type(weight).__name__}; convert them, or leave the mode"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        rows = x.reshape(-1, self.in_features).contiguous()
        y = Product.apply(partial(_exact, self.MULTIPLE), rows, weight, bias)
        return y.view(*x.shape[:-1], self.out_features)

    PLAIN_FORWARD = forward  # outside exact mode

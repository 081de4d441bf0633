"""The gated norm and the projection after it with products of FP8, forward and backward.

One recipe for all three products: both operands in `float8_e4m3fn`, one scale for each 128 values
along the sum, sums and scales in fp32 (`ScalingType.BlockWise1x128` of `scaled_mm`).

    out = y @ W^T          y along its rows, by the norm's forward; W along its rows
    dy  = dout @ W         dout along its rows, W along its columns
    dW  = dout^T @ y       dout along its columns; y along its columns, from x, z and the statistics

Gradients pass straight through the rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import OnceDifferentiable, gradients, save_statistics
from .fp8 import forward_fp8, norm_columns, quantize_columns, quantize_rows
from .options import Options, one_of

PRECISIONS = ("fp8", "fp8_emulated")


class GatedNormLinearFP8Fn(torch.autograd.Function):
    """`GatedNormLinearFP8Fn.apply(x, weight, bias, z, linear_weight, linear_bias, options, heads,
    emulated)`. Kept for the backward: as in :class:`GatedNormLinearFn`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        z: Tensor | None,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        options: Options,
        heads: bool,
        emulated: bool,
    ) -> Tensor:
        y, scales, mean, rstd = forward_fp8(
            x, weight, bias, z, options, "1x128", None, heads, save_stats=True
        )
        assert rstd is not None  # it was asked for
        save_statistics(ctx, (x, weight, bias, z, mean, rstd), options, linear_weight)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        ctx.heads, ctx.emulated = heads, emulated
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        rows = y.flatten(0, -2) if y.dim() > 1 else y[None]
        out = _product((rows, scales), quantize_rows(linear_weight), dtype, emulated)
        if linear_bias is not None:
            out = out + linear_bias.to(dtype)
        return out.view(*y.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = (ctx, dout, *ctx.saved_tensors)
        if torch.is_grad_enabled():
            return *OnceDifferentiable.apply(_gradients, *given), None, None, None
        return *_gradients(*given), None, None, None


def _gradients(ctx: Any, dout: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Of `x, weight, bias, z, linear_weight, linear_bias`."""
    x, weight, bias, z, mean, rstd, linear_weight = saved
    dout = (dout.flatten(0, -2) if dout.dim() > 1 else dout[None]).contiguous()
    dy = _product(quantize_rows(dout), quantize_columns(linear_weight), dout.dtype, ctx.emulated)
    grads = gradients(ctx, dy.view(x.shape), saved[:-1])[:4]
    y = norm_columns(x, weight, bias, z, mean, rstd, ctx.options, ctx.heads)
    dlinear = _product(quantize_columns(dout), y, linear_weight.dtype, ctx.emulated)
    dbias = None if ctx.bias_dtype is None else dout.sum(0).to(ctx.bias_dtype)
    return *grads, dlinear, dbias


def _product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, emulated: bool
) -> Tensor:
    """`a @ b^T` of values `[M, K]` and `[N, K]` with their scales, to `[M, N]`."""
    if emulated:
        wide = (values.float() * scale.repeat_interleave(128, 1) for values, scale in (a, b))
        return torch.mm(next(wide), next(wide).t()).to(dtype)
    (a8, scale_a), (b8, scale_b) = a, b
    recipe = F.ScalingType.BlockWise1x128
    narrow = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    out: Tensor = F.scaled_mm(a8, b8.t(), scale_a, recipe, scale_b, recipe, output_dtype=narrow)
    return out.to(dtype)


def check_precision(precision: str, x: Tensor, linear_weight: Tensor) -> bool:
    """Whether the products are emulated.

    Raises:
        ValueError: a precision that is not there, or sizes that do not fit blocks of 128; a device
            without products of FP8.
        RuntimeError: a torch without `scaled_mm`.
    """
    one_of("precision", precision, PRECISIONS)
    for name, size in zip(("rows", "columns"), linear_weight.shape, strict=True):
        if size % 128:
            raise ValueError(
                f"linear_weight must have a multiple of 128 {name} with precision={precision!r}, "
                f"got {list(linear_weight.shape)}; pad it, or use precision=None"
            )
    if precision == "fp8_emulated":
        return True
    remedy = "use precision='fp8_emulated', which multiplies the same values in fp32"
    if not hasattr(F, "scaled_mm"):
        raise RuntimeError(
            "precision='fp8' needs torch.nn.functional.scaled_mm, which PyTorch has from 2.10 on, "
            f"got PyTorch {torch.__version__}; update it, or {remedy}"
        )
    found = x.device.type
    if found == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(x.device)
        if major == 9:
            return False
        found = f"compute capability {major}.{minor}"
    raise ValueError(
        "precision='fp8' needs an NVIDIA GPU of compute capability 9.0, whose cuBLAS multiplies "
        f"blocks of 128 with a scale each, got {found}; {remedy}"
    )

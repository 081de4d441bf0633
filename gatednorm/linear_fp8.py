"""The gated norm and the projection after it with products of FP8, forward and backward.

The first operand of each product has one scale for each 128 values along the sum (`BlockWise1x128`
of `scaled_mm`), the second one for a square of 128 times 128 (`BlockWise128x128`):

    out = y @ W^T          y along its rows, by the norm's forward; W along its rows
    dy  = dout @ W         dout along its rows; W along its columns
    dW  = dout^T @ y       dout along its columns; y along its columns, from x, z and the statistics

Values are `float8_e4m3fn`, scales fp32. Gradients pass straight through the rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import OnceDifferentiable, gradients, save_statistics
from .fp8 import Pair, forward_fp8, norm_columns, quantize
from .options import Options, no_autocast, one_of, product_dtype, rows_of

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
        dtype = product_dtype(x)
        ctx.heads, ctx.emulated = heads, emulated
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        rows = y.flatten(0, -2) if y.dim() > 1 else y[None]
        (columns,) = quantize(linear_weight.contiguous(), rows=True, square=True)
        out = _product((rows, scales), columns, dtype, emulated)
        if linear_bias is not None:
            out = out + linear_bias.to(dtype)
        return out.view(*y.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = (ctx, dout, *ctx.saved_tensors)
        if torch.is_grad_enabled():
            return *OnceDifferentiable.apply(_gradients, *given), None, None, None
        return *_gradients(*given), None, None, None


def _gradients(ctx: Any, dout: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Of `x, weight, bias, z, linear_weight, linear_bias`."""
    x, weight, bias, z, mean, rstd, linear_weight = saved
    dout = rows_of(dout).contiguous()
    *_, needs_dlinear, needs_dbias, _, _, _ = ctx.needs_input_grad
    rows, *others = quantize(dout, rows=True, columns=needs_dlinear)
    (of_weight,) = quantize(linear_weight.contiguous(), columns=True, square=True)
    dy = _product(rows, of_weight, dout.dtype, ctx.emulated)
    grads = gradients(ctx, dy.view(x.shape), saved[:-1])[:4]
    dlinear = None
    if needs_dlinear:
        y = norm_columns(x, weight, bias, z, mean, rstd, ctx.options, ctx.heads)
        dlinear = _product(others[0], y, linear_weight.dtype, ctx.emulated)
    dbias = dout.sum(0).to(ctx.bias_dtype) if needs_dbias else None
    return *grads, dlinear, dbias


def _product(a: Pair, b: Pair, dtype: torch.dtype, emulated: bool) -> Tensor:
    """`a @ b^T` to `[M, N]`: `a` `[M, K]` with scales `[M, K / 128]`, `b` `[N, K]` with scales
    `[N / 128, K / 128]`."""
    (a8, scale_a), (b8, scale_b) = a, b
    if not a8.numel():  # no tokens
        return a8.new_zeros(len(a8), len(b8), dtype=dtype)
    if emulated:
        wide_a = a8.float() * scale_a.repeat_interleave(128, 1)
        wide_b = b8.float() * scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
        with no_autocast(a8.device.type):  # which would round both
            return torch.mm(wide_a, wide_b.t()).to(dtype)
    rows = len(a8)
    if rows % 4:  # cuBLAS reads four scales at a time
        a8 = F.pad(a8.view(torch.uint8), (0, 0, 0, -rows % 4)).view(a8.dtype)
        scale_a = F.pad(scale_a.t(), (0, -rows % 4)).t()
    if scale_b.shape[1] % 4:
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4))
    one, square = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    narrow = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    out = F.scaled_mm(a8, b8.t(), scale_a, one, scale_b.t(), square, output_dtype=narrow)
    return out[:rows].to(dtype)


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
                f"got {list(linear_weight.shape)}; use precision=None"
            )
    if precision == "fp8_emulated":
        return True
    remedy = "use precision='fp8_emulated', which multiplies the same values in fp32"
    if not hasattr(F, "scaled_mm"):
        raise RuntimeError(
            "precision='fp8' needs torch.nn.functional.scaled_mm, which PyTorch has from 2.10 on, "
            f"got PyTorch {torch.__version__}; update it, or {remedy}"
        )
    found = lacks_products(x.device)
    if found is None:
        return False
    raise ValueError(
        "precision='fp8' needs an NVIDIA GPU of compute capability 9.0 and CUDA 12.9, whose cuBLAS "
        f"multiplies blocks of 128 with a scale each, got {found}; {remedy}"
    )


def lacks_products(device: torch.device) -> str | None:
    """What keeps a device from multiplying blocks of FP8 with a scale each, None for one that can;
    :func:`check_precision` looks at PyTorch's version."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"compute capability {major}.{minor}"
    cuda = torch.version.cuda or "0"
    return None if tuple(map(int, cuda.split(".")[:2])) >= (12, 9) else f"CUDA {cuda}"

"""The equation in plain PyTorch: the truth that tests and benchmarks compare with.

    gate after:   y = (norm(x) * w + b) * act(z)      norm_before_gate=True
    gate before:  y =  norm(x * act(z)) * w + b       norm_before_gate=False

Nothing here is fast, and nothing on the product's own path imports it, but for FP8 on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .options import BLOCKS, channels_in_group, check_options, check_scale, one_of

# What a family of models rounds to besides the store, after the norm and after the weight. See
# `numerics` in functional.py.
ROUNDING = {
    "fp32": (None, None),
    "mamba2": ("x", None),
    "qwen3_next": ("x", "wider"),
    "torchtitan": (None, "x"),
}


def gated_norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
    *,
    is_rms_norm: bool = True,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gated norm, differentiable by PyTorch's own autograd.

    Args:
        x, z: `[..., D]`; `z` may be None (no gate).
        weight, bias: `[D]` or None.
        upcast: compute in fp32 (fp64 for fp64 input); False computes in the dtype of `x`, the
            plain expression whose error the tests grant to the kernels twice over (mamba's
            reference keeps the parameters in fp32 even then).
        numerics: rounding points, as in :func:`gatednorm.rmsnorm_fn`.

    Returns:
        `[..., D]` in `out_dtype`, by default the dtype of `x`.

    Raises:
        ValueError, TypeError: an option that breaks a rule; names value, rule and remedy.
    """
    check_options(
        eps, group_size, norm_before_gate, is_rms_norm, activation, zero_centered, numerics,
        out_dtype,
    )  # fmt: skip
    channels = channels_in_group(group_size, x.shape[-1], "the last dimension of x", "D")
    dtype, out_dtype = x.dtype, out_dtype or x.dtype
    compute = torch.promote_types(dtype, torch.float32) if upcast else dtype
    after_norm, after_weight = ROUNDING[numerics]
    gate = None
    if z is not None:
        gate = z.to(compute)
        gate = torch.sigmoid(gate) if activation == "sigmoid" else F.silu(gate)
    h = x.to(compute)
    if gate is not None and not norm_before_gate:
        h = h * gate
    h = rearrange(h, "... (groups channels) -> ... groups channels", channels=channels)
    if not is_rms_norm:
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    h = rearrange(h, "... groups channels -> ... (groups channels)")
    if after_norm:
        h = h.to(dtype).to(compute)
    if weight is not None:
        w = weight.to(compute)
        h = h * (1 + w if zero_centered else w)
        if after_weight:
            wider = torch.promote_types(dtype, weight.dtype)
            h = h.to(dtype if after_weight == "x" else wider).to(compute)
    if bias is not None:
        h = h + bias.to(compute)
    if gate is not None and norm_before_gate:
        h = h * gate
    return h.to(out_dtype)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
    **options: Any,
) -> Tensor:
    """Gated RMS norm in plain PyTorch; :func:`gated_norm_ref` with `is_rms_norm=True`."""
    return gated_norm_ref(
        x, weight, bias, z, eps, group_size, norm_before_gate, upcast, is_rms_norm=True, **options
    )


def quantize_fp8_ref(
    y: Tensor, scaling: str = "1x128", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """FP8 values and their scales, `y = values * scale`, in the order of operations of the kernels.

    `scale = max(amax, 1e-12) * (1 / 448)`, where `amax` is the largest magnitude of a row or of its
    128 columns, so that the largest value becomes 448, the largest of the format; zeros have a
    scale of `1e-12 / 448`. With `mxfp8` it is the smallest power of two that is no less. An
    infinity or NaN makes the scale infinite or NaN, and all that shares it NaN once it is
    multiplied. With a given scale what exceeds 448 becomes 448.

    `nvfp4` has values of four bits (`e2m1`: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), and for each 16
    columns a scale `amax / 6` in units of the given one, rounded to `float8_e4m3fn`, 2^-6 at least;
    `y = values * scale * given`. Values of four bits know no NaN: the scale is NaN instead.

    Args:
        y: `[rows, K]` in fp32; `K` is a multiple of 128 for `1x128`, of 32 for `mxfp8`, of 16 for
            `nvfp4`, and for `128x128` rows are a multiple of 128 too.
        scaling: `1x128`, `mxfp8`, `rowwise`, `tensorwise` or `nvfp4` with a given scale, or
            `128x128`, as a product reads its weight.
        scale: one fp32 number, of `tensorwise` and `nvfp4` alone.

    Returns:
        Values `[rows, K]` in `float8_e4m3fn`; scales in fp32, `[rows, K / 128]` with strides
        `[1, rows]`, `[rows, 1]`, the given one, or `[rows / 128, K / 128]`. For `mxfp8` in
        `float8_e8m0fnu`, padded with zeros to a multiple of 128 rows and of 4 blocks of 32 columns,
        and swizzled as PyTorch's `SWIZZLE_32_4_4`. For `nvfp4` values `[rows, K / 2]` in
        `float4_e2m1fn_x2`, the first of two in the lower bits, and scales in `float8_e4m3fn`, as
        those of `mxfp8` for 16 columns each.

    Raises:
        ValueError: a scaling that is not there, a scale where none belongs or none where one does
            or that is not one fp32 number, values that are not `[rows, K]` in fp32 of whole blocks.
        TypeError: a scale that is no tensor.
    """
    one_of("scaling", scaling, ("1x128", "rowwise", "tensorwise", "mxfp8", "nvfp4", "128x128"))
    check_scale(scaling, scale)
    blocks = (128, 128) if scaling == "128x128" else (1, BLOCKS.get(scaling, 1))
    fits = y.dim() == 2 and y.shape[1] > 0 and y.dtype == torch.float32
    if not fits or any(n % block for n, block in zip(y.shape, blocks, strict=True)):
        raise ValueError(
            f"y must be [rows, K] in float32, of blocks of {list(blocks)} with "
            f"scaling={scaling!r}, got {list(y.shape)} in {y.dtype}; flatten and convert it, or "
            "use another scaling"
        )
    if scaling == "nvfp4":
        assert scale is not None  # it is given
        return _quantize_nvfp4(y, scale)
    if scaling == "tensorwise":
        assert scale is not None  # it is given
        return (y * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    columns = {"rowwise": y.shape[-1], "mxfp8": 32}.get(scaling, 128)
    rows = 128 if scaling == "128x128" else 1
    pattern = "(m rows) (k columns) -> m k rows columns"
    parts = rearrange(y, pattern, rows=rows, columns=columns)
    amax = parts.abs().amax((-2, -1)).clamp(min=1e-12)
    scale = amax * (1 / 448)
    inverse = 1 / scale
    if scaling == "mxfp8":
        exponent = (scale.view(torch.int32).clamp(max=0x7F800000) + 0x7FFFFF) >> 23
        inverse = ((254 - exponent) << 23).view(torch.float32).where(exponent < 255, float("nan"))
        scale = swizzled(exponent.to(torch.uint8)).view(torch.float8_e8m0fnu)
    elif scaling != "128x128":
        scale = scale.t().contiguous().t()
    values = (parts * inverse[..., None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return rearrange(values, "m k rows columns -> (m rows) (k columns)"), scale


def _quantize_nvfp4(y: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    parts = rearrange(y, "m (k columns) -> m k columns", columns=16)
    amax = parts.abs().amax(-1)
    wanted = (amax * (1 / 6) * (1 / given)).clamp(2**-6, 448).where(amax.isfinite(), float("nan"))
    scale = wanted.to(torch.float8_e4m3fn)
    v = parts * (1 / (scale.float() * given))[..., None]
    size = v.nan_to_num(0).abs().clamp(max=6)
    # To the nearest, ties to even: steps of 0.5 below 2, of 1 below 4, of 2 above.
    code = torch.where(size < 2, (2 * size).round(), size.round() + 2)
    code = torch.where(size < 4, code, (size / 2).round() + 4).to(torch.uint8)
    code |= (v.signbit() & ~v.isnan()).to(torch.uint8) << 3
    low, high = rearrange(code, "m k (pairs two) -> two m (k pairs)", two=2)
    values = (low | high << 4).view(torch.float4_e2m1fn_x2)
    return values, swizzled(scale.view(torch.uint8)).view(torch.float8_e4m3fn)


def swizzled(scales: Tensor) -> Tensor:
    """`[rows, blocks]` in tiles of 128 x 4, padded with zeros: what `SWIZZLE_32_4_4` names."""
    rows, blocks = scales.shape
    padded = F.pad(scales, (0, -blocks % 4, 0, -rows % 128))
    tiles = rearrange(padded, "(r a b) (c d) -> r c b a d", a=4, b=32, d=4)
    return tiles.reshape(padded.shape)

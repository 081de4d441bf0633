"""FP8: the norm's result as `float8_e4m3fn` and scales, as the product after it reads them."""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .autograd import NAMESPACE, Maybe, needs_operator
from .call import check_tensors, describe
from .functional import refuse_gradients, refuse_transforms
from .operators import check_shapes, implement, none_to_empty
from .options import BLOCKS, Options, check_scale, make_options, one_of

SCALINGS = ("1x128", "rowwise", "tensorwise", "mxfp8", "nvfp4")


def rms_norm_gated_fp8(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    is_rms_norm: bool = True,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    scaling: str = "1x128",
    scale: Tensor | None = None,
    heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated norm for inference, in FP8: what a product such as `torch.nn.functional.scaled_mm` or
    DeepGEMM reads, written by the norm itself.

    Arguments and promises as :func:`rms_norm_gated`, and:

    Args:
        scaling: `1x128` one scale for each row and 128 columns, `rowwise` one a row, `tensorwise`
            a given one; `mxfp8` a power of two for each row and 32 columns; `nvfp4` values of four
            bits, with a scale of eight for each row and 16 columns, and a given one for all.
        scale: one fp32 number on the device of `x`, for `tensorwise` and `nvfp4` alone.
        heads: `x` is `[..., H, D]`, and a row of the product has all heads of a token: `K = H * D`
            columns. Otherwise `K = D`.

    Returns:
        Values `[..., K]` in `float8_e4m3fn`, contiguous, and their scales in fp32: for `1x128`
        `[rows, K / 128]` with strides `[1, rows]`, for `rowwise` `[rows, 1]`, else the given one;
        for `mxfp8` in `float8_e8m0fnu`, swizzled. `values * scale` is the result; the bits are
        those of :func:`quantize_fp8_ref` for the norm's result in fp32. For `nvfp4` values
        `[..., K / 2]` in `float4_e2m1fn_x2`, two a byte, and scales in `float8_e4m3fn`, swizzled;
        `values * scales * scale` is the result.

    Raises:
        ValueError, TypeError: as :func:`rms_norm_gated`; also for a scale that does not fit, for
            a `K` that is no multiple of 128 (`1x128`), 32 (`mxfp8`) or 16 (`nvfp4`), and on a GPU
            without FP8.
        RuntimeError: as :func:`rms_norm_gated`.
    """
    refuse_transforms("rms_norm_gated_fp8", x, weight, bias, z)
    refuse_gradients("rms_norm_gated_fp8", x=x, z=z, weight=weight, bias=bias)
    values = (
        eps, group_size, norm_before_gate, is_rms_norm, activation, zero_centered, numerics,
        torch.float32, None,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        options = Options(*values)
    else:
        options = make_options(*values)
        check_tensors(x=x)
        check_device(x.device)
    y, scales, _, _ = forward_fp8(x, weight, bias, z, options, scaling, scale, heads, False)
    return y, scales


def forward_fp8(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    z: Maybe,
    options: Options,
    scaling: str,
    scale: Maybe,
    heads: bool,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Maybe, Maybe]:
    """Values, scales, and the `mean` and `rstd` of the norm where they are kept; by way of the
    operator where something traces."""
    check_tensors(x=x, weight=weight, bias=bias, z=z, scale=scale)
    if not torch.compiler.is_compiling() and autograd.dtensors(type(x)) is not None:
        raise TypeError("FP8 takes local tensors, and x is a DTensor; pass x.to_local()")
    _check_scaling(x, scaling, scale, heads)
    given = (x, weight, bias, z, scale)
    if not needs_operator(*given):
        return _run_forward(*given, options, scaling, heads, save_stats)
    y, scales, mean, rstd = autograd.ops.forward_fp8(
        *given, *tuple(options)[:-2], scaling, heads, save_stats
    )
    if scale is not None and scaling == "tensorwise":
        scales = scale  # an operator may not return what it was given
    return y, scales, mean, rstd


def _run_forward(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    z: Maybe,
    scale: Maybe,
    options: Options,
    scaling: str,
    heads: bool,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Maybe, Maybe]:
    call = describe(x, weight, bias, z, None, options)
    mean = rstd = None
    if save_stats:
        stats = (x.numel() // call.width, call.n_groups)
        rstd = torch.empty(stats, dtype=call.compute_dtype, device=x.device)
        mean = None if options.is_rms_norm else torch.empty_like(rstd)
    y, scales = _new_forward(x, scaling, scale, heads)
    if x.numel():
        n_heads = x.shape[-2] if heads else 1
        flat, bits = y.view(math.prod(y.shape[:-1]), y.shape[-1]), scales
        if scaling == "nvfp4":
            flat = flat.view(torch.uint8)
        if scaling in ("mxfp8", "nvfp4"):
            bits = scales.view(torch.uint8)  # triton knows neither e8m0 nor pairs of four bits
        backend(x.device).forward_fp8(
            call, x, weight, bias, z, flat, mean, rstd, scaling, bits, n_heads, scale
        )
    return y, scales, mean, rstd


def _new_forward(x: Tensor, scaling: str, scale: Maybe, heads: bool) -> tuple[Tensor, Tensor]:
    """Memory for the values and scales of a forward; a given scale for all is that itself."""
    *outer, width = _shape(x, heads)
    rows = math.prod(outer)
    if scaling == "nvfp4":
        y = x.new_empty((*outer, width // 2), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    else:
        y = x.new_empty((*outer, width), dtype=torch.float8_e4m3fn)
    if scale is not None and scaling == "tensorwise":
        return y, scale
    return y, new_scales(x, rows, width, scaling)


Pair = tuple[Tensor, Tensor]


def quantize(
    x: Tensor, *, rows: bool = False, columns: bool = False, square: bool = False
) -> list[Pair]:
    """`x` `[M, K]`, of a multiple of 128 columns, as a product reads it: pairs of values and scales
    along its rows `[M, K]`, along its columns `[K, padded]`, or both, in this order.

    One scale for each 128 values, or for a square of 128 times 128; rows are padded with zeros to a
    multiple of 128 where scales run along them.

    Raises:
        ValueError: squares along both, which no product needs, and which on an H200 differed from
            the reference; sizes that are no multiple of 128 along a sum.
    """
    sizes = (x.shape[1], x.shape[0] if rows and square else 0)
    if any(size % 128 for size in sizes):
        raise ValueError(
            f"columns, and rows of squares, must be a multiple of 128, got {list(x.shape)}; pad "
            "them with zeros"
        )
    if square and rows and columns:
        raise ValueError(
            "squares must be along rows or along columns, got both; ask for one at a time"
        )
    if needs_operator(x):
        found = autograd.ops.quantize(x, rows, columns, square)
    else:
        found = _run_quantize(x, rows, columns, square)
    return [found[i : i + 2] for i, asked in ((0, rows), (2, columns)) if asked]


def norm_columns(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    z: Maybe,
    mean: Maybe,
    rstd: Tensor,
    options: Options,
    heads: bool,
) -> Pair:
    """The columns of the norm's result `[tokens, K]`, in squares, from what its forward kept."""
    given = (x, weight, bias, z, mean, rstd)
    if not needs_operator(*given):
        return _run_columns(*given, options, heads)
    y, scales = autograd.ops.norm_columns(*given, *tuple(options)[:-2], heads)
    return y, scales


def _run_quantize(x: Tensor, *asked: bool) -> tuple[Tensor, ...]:
    found = _new_tiles(x, False, *asked)
    if x.numel():
        nothing = (None,) * 5
        _run_tiles(x, *nothing, Options(), found, asked, 1)
    return found


def _run_columns(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    z: Maybe,
    mean: Maybe,
    rstd: Tensor,
    options: Options,
    heads: bool,
) -> Pair:
    asked = (False, True, True)
    found = _new_tiles(x, heads, *asked)
    if x.numel():
        mean = None if options.is_rms_norm else mean
        n_heads = x.shape[-2] if heads else 1
        _run_tiles(x, weight, bias, z, mean, rstd, options, found, asked, n_heads)
    return found[2], found[3]


def _run_tiles(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    z: Maybe,
    mean: Maybe,
    rstd: Maybe,
    options: Options,
    found: tuple[Tensor, ...],
    asked: tuple[bool, ...],
    heads: int,
) -> None:
    rows, columns, square = asked
    call = describe(x, weight, bias, z, None, options._replace(out_dtype=torch.float32))
    backend(x.device).quantize_tiles(
        call, x, weight, bias, z, mean, rstd, found[:2] if rows else None,
        found[2:] if columns else None, square, heads,
    )  # fmt: skip


def _new_tiles(
    x: Tensor, heads: bool, rows: bool, columns: bool, square: bool
) -> tuple[Tensor, ...]:
    """Memory for values and scales along rows, and along columns; of no elements for what is not
    asked for."""
    *outer, width = _shape(x, heads)
    tokens = math.prod(outer)
    padded = (tokens + 127) // 128 * 128
    found = []
    for asked, shape in ((rows, (tokens, width)), (columns, (width, padded))):
        y = x.new_empty(shape if asked else (0, 0), dtype=torch.float8_e4m3fn)
        found += [y, new_scales(y, y.shape[0], y.shape[1], "128x128" if square else "1x128")]
    return tuple(found)


def backend(device: torch.device) -> ModuleType:
    """The module beside that of the norm whose functions write FP8, or plain PyTorch's where its
    kernels cannot."""
    name = f"{autograd.backend(device.type).__name__}_fp8"
    return importlib.import_module(name if _lacks_fp8(device) is None else f"{__package__}.cpu_fp8")


def _shape(x: Tensor, heads: bool) -> tuple[Any, ...]:
    """Of the product's operand."""
    return (*x.shape[:-2], x.shape[-2] * x.shape[-1]) if heads else tuple(x.shape)


def new_scales(y: Tensor, rows: int, width: int, scaling: str) -> Tensor:
    """Memory beside `y` for the scales of `[rows, K]`."""
    if scaling in ("mxfp8", "nvfp4"):
        shape = (rows + 127) // 128 * 128, (width // BLOCKS[scaling] + 3) // 4 * 4
        dtype = torch.float8_e8m0fnu if scaling == "mxfp8" else torch.float8_e4m3fn
        return y.new_zeros(shape, dtype=torch.uint8).view(dtype)
    if scaling == "128x128":
        return y.new_empty((rows // 128, width // 128), dtype=torch.float32)
    blocks = width // 128 if scaling == "1x128" else 1
    return y.new_empty((blocks, rows), dtype=torch.float32).t()


def _check_scaling(x: Tensor, scaling: str, scale: Maybe, heads: bool) -> None:
    """Raises TypeError or ValueError."""
    one_of("scaling", scaling, SCALINGS)
    if not isinstance(heads, bool):
        raise TypeError(f"heads must be True or False, got {heads!r}")
    if heads and x.dim() < 2:
        raise ValueError(
            f"x must be [..., H, D] with heads=True, got shape {tuple(x.shape)}; pass heads=False"
        )
    check_scale(scaling, scale)
    if scale is not None and scale.device != x.device:
        raise ValueError(
            f"scale must be on the device of x, got {scale.device} and {x.device}; "
            f"move it with scale.to('{x.device}')"
        )
    width, block = _shape(x, heads)[-1] if x.dim() else 0, BLOCKS.get(scaling, 1)
    if width % block:
        raise ValueError(
            f"a row must be a multiple of {block} channels with scaling={scaling!r}, got {width}; "
            "use scaling='rowwise', or add whole groups or heads of zeros"
        )


def check_device(device: torch.device) -> None:
    """Raises ValueError for a device whose kernels cannot write `float8_e4m3fn`."""
    found = _lacks_fp8(device)
    if found is not None:
        raise ValueError(
            "float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or above, or a CPU, got "
            f"{found}; use rms_norm_gated, whose result is in the dtype of x"
        )


def _lacks_fp8(device: torch.device) -> str | None:
    """What a device is whose kernels cannot write `float8_e4m3fn`; None for one that can."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (8, 9) else f"compute capability {major}.{minor}"


# ---- torch.library ----

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_NORM = (
    "float eps, int? group_size, bool norm_before_gate, bool is_rms_norm, str activation, "
    "bool zero_centered, str numerics"
)
_library.define(
    "forward_fp8(Tensor x, Tensor? weight, Tensor? bias, Tensor? z, Tensor? scale, "
    f"{_NORM}, str scaling, bool heads, bool save_stats) "
    "-> (Tensor y, Tensor scales, Tensor mean, Tensor rstd)"
)


_library.define(
    "quantize(Tensor x, bool rows, bool columns, bool square) "
    "-> (Tensor rows, Tensor row_scales, Tensor columns, Tensor column_scales)"
)
_library.define(
    "norm_columns(Tensor x, Tensor? weight, Tensor? bias, Tensor? z, Tensor? mean, Tensor rstd, "
    f"{_NORM}, bool heads) -> (Tensor columns, Tensor scales)"
)


def _split(*values: Any) -> tuple[tuple[Any, ...], str, bool, bool]:
    *norm, scaling, heads, save_stats = values
    return (*norm, torch.float32, None), scaling, heads, save_stats


def _forward_impl(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, scale: Maybe, *values: Any
) -> tuple[Tensor, ...]:
    options, scaling, heads, save_stats = _split(*values)
    given = (x, weight, bias, z, scale)
    y, scales, mean, rstd = _run_forward(*given, make_options(*options), scaling, heads, save_stats)
    return none_to_empty(x, y, None if scales is scale else scales, mean, rstd)


def _forward_fake(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, scale: Maybe, *values: Any
) -> tuple[Tensor, ...]:
    options, scaling, heads, save_stats = _split(*values)
    options = Options(*options)
    check_shapes(x, weight, bias, z, None, options)
    y, scales = _new_forward(x, scaling, scale, heads)
    mean = rstd = None
    if save_stats:
        groups = x.shape[-1] // (options.group_size or x.shape[-1])
        stats_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rstd = x.new_empty((math.prod(x.shape[:-1]), groups), dtype=stats_dtype)
        mean = None if options.is_rms_norm else torch.empty_like(rstd)
    return none_to_empty(x, y, None if scales is scale else scales, mean, rstd)


def _quantize_fake(x: Tensor, *asked: bool) -> tuple[Tensor, ...]:
    return _new_tiles(x, False, *asked)


def _columns_impl(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, mean: Maybe, rstd: Tensor, *values: Any
) -> Pair:
    *norm, heads = values
    options = make_options(*norm, None, None)
    return _run_columns(x, weight, bias, z, mean, rstd, options, heads)


def _columns_fake(x: Tensor, *values: Any) -> tuple[Tensor, ...]:
    return _new_tiles(x, values[-1], False, True, True)[2:]


implement(
    _library,
    ("forward_fp8", _forward_impl, _forward_fake),
    ("quantize", _run_quantize, _quantize_fake),
    ("norm_columns", _columns_impl, _columns_fake),
)

"""The launches of FP8: the norm's own forward where a program has all that shares a scale, else a
forward in fp32 and a kernel that quantises it."""

import functools

import torch
from torch import Tensor

from ..call import Call, Kind, describe
from ..options import BLOCKS, Options
from . import fp8 as fp8_kernels
from .launch import Launcher, constants_of, forward
from .tiles import WIDEST

CHUNK = 4096  # columns of a row that a program quantises where they have scales of their own


def forward_fp8(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    scaling: str,
    scale: Tensor,
    heads: int,
    given: Tensor | None,
) -> None:
    """Write `y` `[rows, K]`, its scales unless `scale` is the `given` one, and `mean`, `rstd`
    unless None; a row has `heads` rows of the norm. `call` is that of a result in fp32."""
    alone = scaling == "tensorwise"
    if scaling in BLOCKS and scaling != "nvfp4":
        alone = call.group_size % BLOCKS[scaling] == 0
    elif scaling == "rowwise":
        alone = heads * call.n_groups == 1 and call.group_size <= WIDEST
    if alone:
        forward(call, x, weight, bias, z, y, mean, rstd, False, scaling, scale, heads)
    else:
        wide = torch.empty(x.shape, dtype=torch.float32, device=y.device)
        forward(call, x, weight, bias, z, wide, mean, rstd)
        quantize_rows(wide.view(len(y), heads * call.width), y, scaling, scale, given)


@functools.lru_cache(maxsize=4096)
def _rows_launcher(
    width: int, dtype: torch.dtype, scaling: str, device: torch.device
) -> tuple[int, int, Launcher]:
    """Rows a program, programs a row, and the launcher; `dtype` tells apart what is compiled."""
    block = max(128, 1 << (width - 1).bit_length())
    block = min(block, WIDEST if scaling == "rowwise" else CHUNK)
    rows, chunks = max(1, 2048 // block), -(-width // block)
    constants = {"D": width, "ROWS": rows, "BLOCK": block, "CHUNKS": chunks, "SCALING": scaling}
    num_warps = max(4, min(16, block // 512))
    launcher = Launcher(fp8_kernels.quantize_rows_kernel, constants, device, num_warps)
    return rows, 1 if scaling == "rowwise" else chunks, launcher


def quantize_rows(
    x: Tensor, y: Tensor, scaling: str, scale: Tensor, given: Tensor | None = None
) -> None:
    """Write the values `y` and scales of contiguous rows `x` `[rows, K]`."""
    n_rows, width = x.shape
    rows, chunks, launcher = _rows_launcher(width, x.dtype, scaling, x.device)
    tensors = [x, y, scale, given]
    launcher(x.device, -(-n_rows // rows) * chunks, tensors, (n_rows, y.shape[1]))


@functools.lru_cache(maxsize=4096)
def _tiles_launcher(
    kind: Kind, heads: int, square: bool, norm: bool, rows: bool, columns: bool
) -> Launcher:
    """The last three tell apart what is compiled."""
    constants = constants_of(kind) | {"HEADS": heads, "SQUARE": square}
    # More warps would have too few registers for a tile, and more registers too few warps.
    return Launcher(fp8_kernels.quantize_tiles_kernel, constants, kind.device, 8, maxnreg=128)


def quantize_tiles(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
    square: bool,
    heads: int,
) -> None:
    """Write the values and scales of `rows`, `columns` or both of the norm's result `[tokens, K]`;
    without `rstd`, of `x` itself. `square`: one scale for 128 of each."""
    if call.width % 128:  # a tile has several heads
        wide = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        forward(call, x, weight, bias, z, wide, None, None)
        wide = wide.view(-1, heads * call.width)
        plain = describe(wide, None, None, None, None, Options())
        quantize_tiles(plain, wide, None, None, None, None, None, rows, columns, square, 1)
        return
    tokens = x.numel() // (call.width * heads)
    programs = -(-tokens // 128) * (call.width * heads // 128)
    no_pair = (None, None)
    tensors = [x, weight, bias, z, mean, rstd, *(rows or no_pair), *(columns or no_pair)]
    launcher = _tiles_launcher(
        call.kind, heads, square, rstd is not None, rows is not None, columns is not None
    )
    numbers = (tokens, *call.numbers[:-3])  # without the strides of out
    launcher(call.device, programs, tensors, numbers)

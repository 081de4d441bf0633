"""Tiles and launches: which program owns which rows, and how a compiled kernel is started.

Tiles follow from the group's width and the dtype, never from the number of rows.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .kernels import INTERPRETED, tl
from .problem import Problem, rows_of

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WIDEST = 16384  # a wider group goes in chunks
CHUNK = 4096


class Tile(NamedTuple):
    """A program's share: `rows` rows of `block_a + block_b` columns; `chunks` of them a group."""

    rows: int
    block_a: int
    block_b: int
    chunks: int
    num_warps: int
    stages: int = 1  # depth of the backward's load pipeline
    workers_per_sm: int = 0
    hoist: bool = True  # keep the parameters in registers over the backward's loop
    reload: bool = False  # read a row again after its sums instead of keeping it in registers
    maxnreg: int | None = None

    @property
    def sums(self) -> dict[str, int]:
        """How a row's sum runs: 8 columns a thread, 256 a warp, side by side, then repeated."""
        options = {}
        for piece, block in (("A", self.block_a), ("B", self.block_b)):
            warps = max(1, min(self.num_warps, block // 256))
            options[f"WARPS_{piece}"] = warps
            options[f"REPEATS_{piece}"] = max(1, block // (256 * self.num_warps))
        return options


def _power_of_2_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _pieces(n: int) -> tuple[int, int]:
    """Two powers of two that cover `n` columns; the second is 0 where one covers them as well."""
    one = _power_of_2_above(n)
    if n == one or n < 512:
        return one, 0
    two = _power_of_2_above(n - one // 2)
    return (one, 0) if two == one // 2 else (one // 2, two)


@functools.cache
def forward_tile(n: int) -> Tile:
    """The forward's tile for groups of `n` columns."""
    if n > WIDEST:
        return Tile(1, CHUNK, 0, -(-n // CHUNK), 4, 1, 0)
    a, b = _pieces(n)
    rows = max(1, min(32, 4096 // a))
    num_warps = min(16, max(1, (a * rows) // 1024))
    return Tile(rows, a, b, 1, num_warps, 1, 0)


@functools.cache
def backward_tile(n: int) -> Tile:
    """The backward's tile for groups of `n` columns."""
    if n > WIDEST:
        return Tile(1, CHUNK, 0, -(-n // CHUNK), 8, 1, 2)
    a, b = _pieces(n)
    rows = max(1, min(32, 2048 // a))
    num_warps = min(16, max(4, (a * rows) // 512))
    return Tile(rows, a, b, 1, num_warps, 1, max(1, 16 // num_warps))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_eu_count // 8


def _pad(strides: tuple[int, ...]) -> tuple[int, int, int]:
    return (*strides, 0, 0, 0)[:3]


def _align(strides: tuple[tuple[int, ...], ...]) -> int:
    """The largest power of two up to 16 that divides every stride."""
    return min(16, math.gcd(16, *(s for tensor in strides for s in tensor)))


@functools.lru_cache(maxsize=4096)
def _geometry(shape: torch.Size, *strides: tuple[int, ...]) -> tuple[tuple, tuple, tuple]:
    """Sizes `(size1, size2)`, padded strides of each tensor, and DIMS, ALIGN."""
    sizes, merged = rows_of(shape, *strides)
    inner = (*sizes[1:], 1, 1)[:2]
    return inner, tuple(_pad(s) for s in merged), (len(sizes), _align(merged))


def _options(p: Problem, tile: Tile, has_z: bool, x_dtype, w_dtype) -> dict:
    round_weight = w_dtype and torch.promote_types(x_dtype, w_dtype)
    return dict(
        N=p.group_size,
        GROUPS=p.n_groups,
        FULL=p.group_size % (tile.block_a + tile.block_b) == 0,
        LONG=p.n_rows + tile.rows >= 2**31,
        IS_RMS=p.is_rms_norm,
        GATE_FIRST=has_z and not p.norm_before_gate,
        SIGMOID=p.activation == "sigmoid",
        ADD=float(p.zero_centered),
        ROUND_NORM=TL_DTYPES[x_dtype] if p.round_norm and x_dtype != torch.float32 else None,
        ROUND_WEIGHT=TL_DTYPES[round_weight]
        if p.round_weight and round_weight not in (None, torch.float32)
        else None,
    )


def _tile_options(tile: Tile) -> dict:
    return dict(
        CHUNKS=tile.chunks,
        ROWS=tile.rows,
        BLOCK_A=tile.block_a,
        BLOCK_B=tile.block_b,
        **tile.sums,
    )


def _start(kernel, grid: int, args: tuple, options: dict, num_warps: int, maxnreg=None) -> None:
    launch = {} if INTERPRETED else dict(num_warps=num_warps, enable_fp_fusion=False)
    if maxnreg and not INTERPRETED:
        launch["maxnreg"] = maxnreg
    kernel[(grid,)](*args, **options, **launch)


def forward(p: Problem, x, z, weight, bias, out: Tensor, mean, rstd) -> None:
    """Write `out` `[..., D]`, and `mean`, `rstd` `[rows, groups]` unless None."""
    tile = forward_tile(p.group_size)
    present = [t for t in (x, out, z) if t is not None]
    (size1, size2), strides, (dims, align) = _geometry(p.shape, *(t.stride() for t in present))
    sx, sy, sz = strides if z is not None else (*strides, (0, 0, 0))
    common = _options(p, tile, z is not None, x.dtype, weight.dtype if weight is not None else None)
    common |= dict(DIMS=dims, ALIGN=align)
    wide = tile.chunks > 1
    if wide:
        stats = torch.empty(2, p.n_rows, p.n_groups, dtype=torch.float32, device=x.device)
        rstd = stats[0] if rstd is None else rstd
        mean = stats[1] if mean is None else mean
        sums = {k: v for k, v in common.items() if k not in ("ADD", "ROUND_NORM", "ROUND_WEIGHT")}
        _start(
            kernels.forward_sums_kernel,
            p.n_rows * p.n_groups,
            (x, z, mean, rstd, p.n_rows, size1, size2, *sx, *sz, p.eps),
            sums | dict(BLOCK=tile.block_a, REPEATS=tile.sums["REPEATS_A"], WARPS=tile.sums["WARPS_A"]),
            tile.num_warps,
        )
    _start(
        kernels.forward_kernel,
        -(-p.n_rows // tile.rows) * p.n_groups * tile.chunks,
        (x, z, weight, bias, out, mean, rstd, p.n_rows, size1, size2, *sx, *sz, *sy, p.eps),
        common | _tile_options(tile) | dict(STATS_GIVEN=wide),
        tile.num_warps,
        tile.maxnreg,
    )


def backward(
    p: Problem, dy: Tensor, x, z, weight, bias, mean, rstd: Tensor, dx: Tensor, dz
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx`, `dz` `[..., D]`; return `dw`, `db` `[D]` in the dtypes of weight and bias."""
    tile = backward_tile(p.group_size)
    present = [t for t in (dy, x, dx, z, dz) if t is not None]
    (size1, size2), strides, (dims, align) = _geometry(p.shape, *(t.stride() for t in present))
    sdy, sx, sdx, sz, sdz = strides if z is not None else (*strides, (0, 0, 0), (0, 0, 0))
    common = _options(p, tile, z is not None, x.dtype, weight.dtype if weight is not None else None)
    common |= dict(DIMS=dims, ALIGN=align)
    wide = tile.chunks > 1
    c1 = c2 = None
    if wide:
        c1, c2 = torch.empty(2, p.n_rows, p.n_groups, dtype=torch.float32, device=x.device)
        sums = {k: v for k, v in common.items() if k not in ("ROUND_NORM", "ROUND_WEIGHT")}
        _start(
            kernels.backward_sums_kernel,
            p.n_rows * p.n_groups,
            (dy, x, z, weight, mean, rstd, c1, c2, p.n_rows, size1, size2, *sdy, *sx, *sz),
            sums | dict(BLOCK=tile.block_a, REPEATS=tile.sums["REPEATS_A"], WARPS=tile.sums["WARPS_A"]),
            tile.num_warps,
        )
    column_tiles = p.n_groups * tile.chunks
    row_tiles = -(-p.n_rows // tile.rows)
    workers = -(-_multiprocessors(x.device) * tile.workers_per_sm // column_tiles)
    workers = max(1, min(workers, row_tiles))
    partial = functools.partial(torch.empty, workers, p.width, dtype=torch.float32, device=x.device)
    dw_part = None if weight is None else partial()
    db_part = None if bias is None else partial()
    _start(
        kernels.backward_kernel,
        workers * column_tiles,
        (
            dy, x, z, weight, bias, mean, rstd, c1, c2, dx, dz, dw_part, db_part,
            p.n_rows, workers, size1, size2, *sdy, *sx, *sz, *sdx, *sdz,
        ),
        common | _tile_options(tile) | dict(SUMS_GIVEN=wide, STAGES=tile.stages, HOIST=tile.hoist, RELOAD=tile.reload),
        tile.num_warps,
        tile.maxnreg,
    )  # fmt: skip
    if weight is None and bias is None:
        return None, None
    dw = None if weight is None else torch.empty_like(weight)
    db = None if bias is None else torch.empty_like(bias)
    block = max(8, min(128, _power_of_2_above(p.width) // 64))
    _start(
        kernels.reduce_kernel,
        -(-p.width // block),
        (dw_part, db_part, dw, db, workers),
        dict(D=p.width, ROWS=1024 // block, BLOCK=block),
        4,
    )
    return dw, db

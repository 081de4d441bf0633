"""Tiles and launches: which program owns which rows, and how a compiled kernel is started.

Tiles follow from the group's width and the options. Where the number of rows has a say
(`one_wave`), a row's sums keep their order, and so its bits. A call's
arguments are worked out once and kept with its Problem; then a launch is a few pointers and a call
into the driver (`driver.py`), past Triton's own binder, which costs more than the kernel.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels, sum_kernels
from .driver import direct_start
from .problem import Problem, rows_of
from .row_kernels import INTERPRETED, NVIDIA, TL_DTYPES, hooked

WIDEST = 16384  # a wider group goes in chunks
CHUNK = 4096


class Tile(NamedTuple):
    """A program's share: `rows` rows of `block_a + block_b` columns; `chunks` of them a group."""

    rows: int
    block_a: int
    block_b: int
    chunks: int
    num_warps: int
    stages: int = 1  # depth of the backward's load pipeline, where rows are not fetched ahead
    workers_per_sm: int = 0
    hoist: bool = True  # read the parameters early and keep them in registers
    reload: bool = False  # read a row again after its sums instead of keeping it in registers
    ahead: bool = False  # fetch the next row into the L2 cache, where that pays (`_fetches_ahead`)
    maxnreg: int | None = None

    @property
    def sums(self) -> dict[str, int]:
        """How a row's sum runs: 8 columns a thread, warps side by side, then repeated.

        A row that has the tile to itself is spread over all warps, if need be with fewer columns.
        """
        options = {}
        for piece, block in (("A", self.block_a), ("B", self.block_b)):
            warps = max(1, min(self.num_warps, block // (32 if self.rows == 1 else 256)))
            options[f"WARPS_{piece}"] = warps if block else 0
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
def forward_tile(
    n: int, bias: bool = False, gate_first: bool = False, one_wave: bool = False
) -> Tile:
    """The forward's tile for groups of `n` columns; benchmarks/NOTES.md says what was measured
    where. `one_wave`: with 32 registers a thread, all programs run at once."""
    if n > WIDEST:
        return Tile(1, CHUNK, 0, -(-n // CHUNK), 8)
    a, b = _pieces(n)
    if a < 256:
        return Tile(16, a, b, 1, 2) if bias and a >= 64 else Tile(min(128, 2048 // a), a, b, 1, 4)
    if a < 1024:
        return Tile(1024 // a, a, b, 1, 2)
    if a < 8192:
        tile = Tile(1, a, b, 1, 4 if a < 4096 else 8)
        if one_wave and a + b == 4096 and gate_first and not bias:
            return tile._replace(hoist=False, maxnreg=32)
        return tile
    if a == 8192 and b == 0:
        return Tile(1, a, b, 1, 16, hoist=False, maxnreg=64 if bias else 40)
    if b == 0:  # two halves: in one piece some registers spill
        a = b = a // 2
    return Tile(1, a, b, 1, 16, hoist=False, maxnreg=64)


@functools.cache
def backward_tile(n: int, bias: bool = False, gate_first: bool = False) -> Tile:
    """The backward's tile for groups of `n` columns; benchmarks/NOTES.md says what was measured
    where."""
    if n > WIDEST:
        return Tile(1, CHUNK, 0, -(-n // CHUNK), 8, workers_per_sm=2)
    a, b = _pieces(n)
    if a < 256:
        return Tile(min(64, 2048 // a), a, b, 1, 8, stages=3, workers_per_sm=2)
    if a < 512:  # one row: Triton computes a tile of two in two layouts, so twice
        return Tile(1, a, b, 1, 1, stages=4, workers_per_sm=8)
    if a < 1024:
        return Tile(1, a, b, 1, 2, stages=3, workers_per_sm=6)
    if a < 2048:
        return Tile(1, a, b, 1, 4, stages=3, workers_per_sm=3)
    if a < 4096:
        if b and bias:  # half the workers, so half of the partial sums of dw and db
            return Tile(1, a, b, 1, 8, stages=4, workers_per_sm=1)
        return Tile(1, a, b, 1, 4, stages=3, workers_per_sm=2)
    if a + b == 4096:
        return Tile(1, a, b, 1, 8, stages=2, workers_per_sm=2, ahead=True)
    if a + b <= 8192:
        warps = 8 if b == 1024 else 16
        return Tile(1, a, b, 1, warps, stages=3, workers_per_sm=1, ahead=a == 8192)
    wide = Tile(1, a, b, 1, 32, workers_per_sm=1, reload=True, maxnreg=64)
    if b > 0:
        return wide._replace(hoist=not bias, ahead=True)
    # Two halves: each step holds half of the row's temporaries.
    wide = wide._replace(block_a=a // 2, block_b=a // 2, hoist=False)
    return wide._replace(num_warps=16, maxnreg=None, ahead=True) if gate_first else wide


def reduce_tile(width: int, workers: int) -> tuple[int, int, int]:
    """Workers a step, columns and warps of the kernel that adds up `dw` and `db`."""
    # All workers in one step, where it can be: each step waits for the memory.
    block = 16 if width >= 8192 else 8
    return min(2048, _power_of_2_above(workers)), block, 16 if workers > 512 else 8


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # under the interpreter: enough for several workers
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_eu_count // 8


@functools.cache
def _shared_memory(device: torch.device) -> int | None:
    """Bytes that a program may have; None where PyTorch does not say."""
    if device.type == "cpu":
        return None
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", None)


@functools.cache
def _since_hopper(device: torch.device) -> bool:
    """Whether kernels on this device may be launched before the one before them has ended, and can
    fetch whole rows with one instruction: NVIDIA's compute capability 9.0."""
    if device.type != "cuda" or not NVIDIA:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


class Launch:
    """One kernel with all that a call needs but its tensors.

    The first call goes through Triton, which compiles; later ones hand the tensors' addresses to
    the driver. Addresses that are not divisible by 16, for which Triton compiles another variant,
    profilers that hook into Triton's launches, and other vendors' GPUs always go through Triton.

    `early` lets it be set up while the kernel before it still runs, where the device can do that.
    """

    __slots__ = ("device", "grid", "kernel", "options", "scalars", "start")

    def __init__(
        self, kernel, device, grid: int, scalars: tuple, options: dict, num_warps: int,
        maxnreg: int | None = None, early: bool = True,
    ):  # fmt: skip
        self.kernel = kernel
        self.device = device
        self.grid = (grid, 1, 1)
        self.scalars = scalars
        self.options = options | {"PDL": not INTERPRETED and _since_hopper(device)}
        self.start = None  # not tried yet; False where it cannot be
        if not INTERPRETED:
            self.options |= {"num_warps": num_warps, "enable_fp_fusion": False}
            if NVIDIA:
                self.options |= {"launch_pdl": early and self.options["PDL"], "maxnreg": maxnreg}

    def __call__(self, *tensors: Tensor | None) -> None:
        start = self.start
        if not start:
            return self._through_triton(tensors)
        pointers = [t.data_ptr() for t in tensors if t is not None]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if bits & 15 or hooked():
            return self._through_triton(tensors)
        index = self.device.index
        if index == torch._C._cuda_getDevice():
            started = start(pointers, torch._C._cuda_getCurrentRawStream(index))
        else:
            with torch.cuda.device(index):
                started = start(pointers, torch._C._cuda_getCurrentRawStream(index))
        if not started:  # Triton repeats it: with a context of its own, or with a proper error
            self._through_triton(tensors)

    def _through_triton(self, tensors: tuple) -> None:
        kernel = self.kernel[self.grid]
        if self.device.type == "cpu":
            kernel(*tensors, *self.scalars, **self.options)
            return
        with torch.get_device_module(self.device).device(self.device.index):
            compiled = kernel(*tensors, *self.scalars, **self.options)
            if (
                NVIDIA
                and self.start is None
                and not any(t is not None and t.data_ptr() % 16 for t in tensors)
            ):
                self.start = direct_start(compiled, self.grid, self.scalars) or False


def _pad(strides: tuple[int, ...]) -> tuple[int, int, int]:
    return (*strides, 0, 0, 0)[:3]


def _geometry(p: Problem, tensors: list[Tensor | None]) -> tuple[tuple, list, dict]:
    """Inner outer sizes, three strides for each tensor, and DIMS, ALIGN, LONG."""
    sizes, merged = rows_of(p.shape, *(t.stride() for t in tensors if t is not None))
    each = iter(merged)
    strides = [_pad(()) if t is None else _pad(next(each)) for t in tensors]
    align = math.gcd(16, *(s for tensor in merged for s in tensor))
    # Rows go on by a tile, or by a step of all workers, beyond the end.
    long = max(p.n_rows + 2**20, p.width) >= 2**31
    return (*sizes[1:], 1, 1)[:2], strides, {"DIMS": len(sizes), "ALIGN": align, "LONG": long}


def _tile_options(p: Problem, tile: Tile) -> dict:
    return {
        "N": p.group_size, "GROUPS": p.n_groups, "CHUNKS": tile.chunks, "ROWS": tile.rows,
        "BLOCK_A": tile.block_a, "BLOCK_B": tile.block_b,
        "REPEATS_A": tile.sums["REPEATS_A"], "REPEATS_B": tile.sums["REPEATS_B"],
        "WARPS_A": tile.sums["WARPS_A"], "WARPS_B": tile.sums["WARPS_B"],
        "FULL": p.group_size % (tile.block_a + tile.block_b) == 0,
    }  # fmt: skip


def _sums_options(p: Problem, tile: Tile) -> dict:
    return {
        "N": p.group_size, "GROUPS": p.n_groups, "BLOCK": tile.block_a,
        "REPEATS": tile.sums["REPEATS_A"], "WARPS": tile.sums["WARPS_A"],
        "FULL": p.group_size % tile.block_a == 0,
    }  # fmt: skip


def _norm_options(p: Problem, z: Tensor | None) -> dict:
    return {
        "IS_RMS": p.is_rms_norm,
        "GATE_FIRST": z is not None and not p.norm_before_gate,
        "SIGMOID": p.activation == "sigmoid",
    }


def _rounding(p: Problem, x: Tensor, weight: Tensor | None) -> dict:
    """The dtypes that a value is rounded to on its way, None for no rounding."""

    def rounds(when: bool, dtype: torch.dtype):
        return TL_DTYPES[dtype] if when and dtype != torch.float32 else None

    after = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    return {
        "ADD": float(p.zero_centered),
        "ROUND_NORM": rounds(p.round_norm, x.dtype),
        "ROUND_WEIGHT": rounds(p.round_weight, after),
    }


def _plan_forward(p: Problem, x, z, weight, bias, out) -> tuple[Launch, Launch | None]:
    norm = _norm_options(p, z)
    # 32 registers: 8 programs of 8 warps a multiprocessor, and with 40, as it would be, 6.
    programs = p.n_rows * p.n_groups / _multiprocessors(x.device)
    tile = forward_tile(p.group_size, bias is not None, norm["GATE_FIRST"], 6 < programs <= 8)
    inner, (sx, sz, sy), rows = _geometry(p, [x, z, out])
    wide = tile.chunks > 1
    sums = None
    if wide:
        sums = Launch(
            sum_kernels.forward_sums_kernel, x.device, p.n_rows * p.n_groups,
            (*inner, *sx, *sz, p.eps), _sums_options(p, tile) | rows | norm,
            tile.num_warps,
        )  # fmt: skip
    tiles = -(-p.n_rows // tile.rows) * p.n_groups * tile.chunks
    main = Launch(
        kernels.forward_kernel, x.device, tiles,
        (p.n_rows, *inner, *sx, *sz, *sy, p.eps),
        _tile_options(p, tile) | rows | norm | _rounding(p, x, weight)
        | {"STATS_GIVEN": wide, "HOIST": tile.hoist and bias is None},
        tile.num_warps, tile.maxnreg,
    )  # fmt: skip
    return main, sums


def forward(p: Problem, x: Tensor, z, weight, bias, out: Tensor, mean, rstd) -> None:
    """Write `out` `[..., D]`, and `mean`, `rstd` `[rows, groups]` unless None."""
    key = rstd is None
    plan = p.plans.get(key)
    if plan is None:
        plan = p.plans[key] = _plan_forward(p, x, z, weight, bias, out)
    main, sums = plan
    if sums is not None:
        if rstd is None:
            rstd = torch.empty(p.n_rows, p.n_groups, dtype=torch.float32, device=x.device)
            mean = None if p.is_rms_norm else torch.empty_like(rstd)
        sums(x, z, mean, rstd)
    main(x, z, weight, bias, out, mean, rstd)


def _fit(tile: Tile, device: torch.device, *loaded: Tensor | None) -> Tile:
    """The tile as this GPU can hold it; on one GPU it is always the same one."""
    if torch.version.hip:  # 64 lanes a warp, 1024 a program
        return tile._replace(num_warps=min(tile.num_warps, 16))
    room = _shared_memory(device)
    columns = tile.rows * (tile.block_a + tile.block_b)
    bytes_a_tile = columns * sum(t.element_size() for t in loaded if t is not None)
    buffers = (tile.stages - 1) * bytes_a_tile + 1024
    return tile._replace(stages=1) if room and buffers > room else tile


def _fetches_ahead(p: Problem, tile: Tile, *loaded: Tensor | None) -> bool:
    """Whether the backward fetches the next row: one instruction must be able to fetch a whole
    group of each tensor. Rows that are read twice were faster with it on an H200, whose L2 cache
    has 60 MB, and slower on an H100 with 50."""
    sizes = [p.group_size * t.element_size() for t in loaded if t is not None]
    if not tile.ahead or not _since_hopper(p.device) or any(size % 16 for size in sizes):
        return False
    return not tile.reload or torch.cuda.get_device_properties(p.device).L2_cache_size >= 60e6


def _plan_backward(p: Problem, dy, x, z, weight, bias, dx, dz) -> tuple:
    norm = _norm_options(p, z)
    tile = backward_tile(p.group_size, bias is not None, norm["GATE_FIRST"])
    tile = _fit(tile, x.device, dy, x, z)
    inner, (sdy, sx, sz, sdx, sdz), rows = _geometry(p, [dy, x, z, dx, dz])
    wide = tile.chunks > 1
    rounding = _rounding(p, x, weight)
    ahead = _fetches_ahead(p, tile, dy, x, z)
    sums = None
    if wide:
        sums = Launch(
            sum_kernels.backward_sums_kernel, x.device, p.n_rows * p.n_groups,
            (*inner, *sdy, *sx, *sz),
            _sums_options(p, tile) | rows | norm | {"ADD": rounding["ADD"]}, tile.num_warps,
        )  # fmt: skip
    column_tiles = p.n_groups * tile.chunks
    workers = -(-_multiprocessors(x.device) * tile.workers_per_sm // column_tiles)
    workers = max(1, min(workers, -(-p.n_rows // tile.rows)))
    main = Launch(
        kernels.backward_kernel, x.device, workers * column_tiles,
        (p.n_rows, workers, *inner, *sdy, *sx, *sz, *sdx, *sdz),
        _tile_options(p, tile) | rows | norm | rounding
        | {"SUMS_GIVEN": wide, "STAGES": 1 if ahead else tile.stages, "HOIST": tile.hoist,
           "RELOAD": tile.reload, "AHEAD": ahead},
        tile.num_warps, tile.maxnreg,
        # Its workers have equal shares. Started while the kernel before still fills some of the
        # multiprocessors, they would crowd on the others.
        early=False,
    )  # fmt: skip
    rows, block, num_warps = reduce_tile(p.width, workers)
    reduce = Launch(
        sum_kernels.reduce_kernel, x.device, -(-p.width // block), (workers,),
        {"D": p.width, "ROWS": rows, "BLOCK": block}, num_warps,
    )  # fmt: skip
    return main, sums, reduce, workers


def backward(
    p: Problem, dy: Tensor, x: Tensor, z, weight, bias, mean, rstd: Tensor, dx: Tensor, dz
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx`, `dz` `[..., D]`; return `dw`, `db` `[D]` in the dtypes of weight and bias."""
    # Also x and z: what was saved may come back dense from a hook that moved it away and back.
    key = (dy.dtype, *(None if t is None else t.stride() for t in (dy, x, z, dx, dz)))
    plan = p.plans.get(key)
    if plan is None:
        plan = p.plans[key] = _plan_backward(p, dy, x, z, weight, bias, dx, dz)
    main, sums, reduce, workers = plan
    c1 = c2 = None
    if sums is not None:
        c1 = torch.empty(p.n_rows, p.n_groups, dtype=torch.float32, device=x.device)
        c2 = None if p.is_rms_norm else torch.empty_like(c1)
        sums(dy, x, z, weight, mean, rstd, c1, c2)
    dw = db = dw_part = db_part = None
    if weight is not None:
        dw = torch.empty_like(weight)
        dw_part = torch.empty(workers, p.width, dtype=torch.float32, device=x.device)
    if bias is not None:
        db = torch.empty_like(bias)
        db_part = torch.empty(workers, p.width, dtype=torch.float32, device=x.device)
    main(dy, x, z, weight, bias, mean, rstd, c1, c2, dx, dz, dw_part, db_part)
    if dw is not None or db is not None:
        reduce(dw_part, db_part, dw, db)
    return dw, db

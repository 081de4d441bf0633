"""From a checked call to running kernels: constants, grid, launch.

Triton's own launch binds, checks and boxes some sixty arguments a call, which costs more than the
kernel. So the code that it has compiled is kept and called again: what it was compiled for, dtypes,
constants and aligned addresses, is the key under which it is kept.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..call import Call, Kind
from ..options import rounding
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import ranks as ranks_kernels
from .rows import INTERPRETED, NVIDIA, TL_DTYPES
from .tiles import Tile, backward_tile, forward_tile, fp8_tile, reduce_tile, sums_tile


class Launcher:
    """One kernel with its constants. `launcher(device, grid, tensors, numbers)` starts it.

    A call goes through Triton's own launch where an address is not divisible by 16 (Triton compiles
    another variant for it), where a profiler hooks into launches, and on other vendors' GPUs.

    Args:
        kernel: a `triton.jit` function of tensors, then numbers, then constants.
        constants: by name, in any order.
        device: where it runs.
        num_warps, maxnreg: of the tile, see tiles.py.
        early: set it up while the kernel before it still runs, where the device can do that.
    """

    __slots__ = ("code", "constants", "kernel", "options")

    def __init__(
        self, kernel: Any, constants: dict[str, Any], device: torch.device, num_warps: int,
        maxnreg: int | None = None, early: bool = True,
    ):  # fmt: skip
        constants = constants | {"PDL": not INTERPRETED and _since_hopper(device)}
        self.kernel = kernel
        self.constants = [constants[name] for name in kernel.arg_names if name in constants]
        self.code: tuple[Any, Any, Any] | None = None  # what Triton has compiled, with its entry
        self.options: dict[str, Any] = {}
        if not INTERPRETED:
            self.options = {"num_warps": num_warps, "enable_fp_fusion": False}
            if NVIDIA:
                self.options |= {"launch_pdl": early and constants["PDL"], "maxnreg": maxnreg}

    def __call__(
        self,
        device: torch.device,
        grid: int,
        tensors: list[Tensor | None],
        numbers: tuple[float, ...],
    ) -> None:
        if device.type == "cpu":  # under the interpreter
            self.kernel[(grid, 1, 1)](*tensors, *numbers, *self.constants)
        elif device.type == "cuda" and device.index == torch.cuda.current_device():
            self._start(device.index, grid, tensors, numbers)
        else:
            with torch.get_device_module(device).device(device.index):
                self._start(device.index, grid, tensors, numbers)

    def _start(
        self, index: int, grid: int, tensors: list[Tensor | None], numbers: tuple[float, ...]
    ) -> None:
        addresses, bits = [], 0
        for t in tensors:
            address = None if t is None else t.data_ptr()
            addresses.append(address)
            bits |= address or 0
        if self.code is not None and bits % 16 == 0 and not _hooked():
            run, function, metadata = self.code
            stream = driver.active.get_current_stream(index)
            run(grid, 1, 1, stream, function, metadata, None, None, None,
                *addresses, *numbers, *self.constants)  # fmt: skip
            return
        start = self.kernel[(grid, 1, 1)]
        compiled = start(*tensors, *numbers, *self.constants, **self.options)
        if NVIDIA and bits % 16 == 0:
            self.code = compiled.run, compiled.function, compiled.packed_metadata


def _hooked(runtime: Any = knobs.runtime) -> bool:
    """Whether somebody, a profiler say, wants to be called at every launch."""
    # From Triton 3.5 on these are objects with `calls`, before it a function or None.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def constants_of(kind: Kind) -> dict[str, Any]:
    """The constants that all kernels of a call share."""

    round_norm, round_weight = (
        None if dtype in (None, torch.float32) else TL_DTYPES[dtype]
        for dtype in rounding(kind.numerics, *kind.dtypes[:2])
    )
    return {
        "N": kind.group_size,
        "GROUPS": kind.n_groups,
        "DIMS": kind.dims,
        "ALIGN": kind.align,
        "LONG": kind.long,
        "IS_RMS": kind.is_rms_norm,
        "NORM_BEFORE_GATE": kind.norm_before_gate,
        "SIGMOID": {"silu": False, "sigmoid": True}[kind.activation],
        "WEIGHT_OFFSET": float(kind.zero_centered),
        "ROUND_NORM": round_norm,
        "ROUND_WEIGHT": round_weight,
    }


def _of_16_bits(kind: Kind) -> bool:
    return all(dtype is None or dtype.itemsize == 2 for dtype in kind.dtypes[::3])  # x, z


def _in_units(kind: Kind) -> bool:
    """Whether rows of 16 bits lie in units of 16 bytes."""
    return _of_16_bits(kind) and kind.align % 8 == kind.group_size % 8 == 0


def _tile_constants(kind: Kind, tile: Tile) -> dict[str, Any]:
    return {
        "CHUNKS": tile.chunks, "ROWS": tile.rows, "BLOCK_A": tile.block_a, "BLOCK_B": tile.block_b,
        "FULL": kind.group_size % (tile.block_a + tile.block_b) == 0, "HOIST": tile.hoist,
        **tile.sum_layout(),
    }  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _sums_launcher(kernel: Any, kind: Kind, partial: bool = False) -> Launcher:
    """The kernel that makes the sums of wide rows, chunk by chunk, or of a row's part."""
    tile = sums_tile(kind.group_size)
    layout = tile.sum_layout()
    chunk = {
        "BLOCK": tile.block_a, "REPEATS": layout["REPEATS_A"], "WARPS": layout["WARPS_A"],
        "FULL": kind.group_size % tile.block_a == 0, "PARTIAL": partial,
    }  # fmt: skip
    return Launcher(kernel, constants_of(kind) | chunk, kind.device, tile.num_warps)


@functools.lru_cache(maxsize=4096)
def _forward_launchers(
    kind: Kind,
    save_stats: bool,
    stats_given: bool = False,
    scaling: str | None = None,
    heads: int = 1,
) -> tuple[Tile, Launcher, Launcher | None]:
    bias = kind.dtypes[2] is not None
    order, architecture = kind.norm_before_gate, _architecture(kind.device)
    # Not by strides: a row's bits do not depend on how it lies in memory.
    tile = forward_tile(kind.group_size, bias, order, architecture, _of_16_bits(kind))
    tile = _fit(tile, kind)
    constants = constants_of(kind) | _tile_constants(kind, tile)
    sums = None
    if tile.chunks > 1 and not stats_given:
        sums = _sums_launcher(forward_kernels.forward_sums_kernel, kind)
    given = stats_given or sums is not None
    if _in_units(kind):  # after the constants, which say in what order sums run
        tile = fp8_tile(tile, bias, order, scaling, architecture)
    hoist = tile.hoist and (not bias or (scaling is not None and tile.rows > 1))
    constants |= {"STATS_GIVEN": given, "HOIST": hoist, "SCALING": scaling, "HEADS": heads}
    main = Launcher(
        forward_kernels.forward_kernel, constants, kind.device, tile.num_warps, tile.maxnreg
    )
    return tile, main, sums


def forward_means(
    call: Call, x: Tensor, z: Tensor | None, mean: Tensor | None, square: Tensor
) -> None:
    """Write the `mean` of what is normalised (None for RMS) and its mean `square` about that."""
    means = _sums_launcher(forward_kernels.forward_sums_kernel, call.kind, True)
    programs = x.numel() // call.group_size
    numbers = (*call.numbers[:-3], call.options.eps)  # without the strides of out
    means(call.device, programs, [x, z, mean, square], numbers)


def forward(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    stats_given: bool = False,
    scaling: str | None = None,
    scale: Tensor | None = None,
    heads: int = 1,
) -> None:
    """Write `out` `[..., D]`, and `mean`, `rstd` `[rows, groups]` unless None or given; with
    `scaling` FP8 values, and `scale` unless that is given (launch_fp8.py)."""
    tile, main, sums = _forward_launchers(call.kind, rstd is not None, stats_given, scaling, heads)
    numbers, eps, n_rows = call.numbers, call.options.eps, x.numel() // call.width
    if sums is not None:
        if rstd is None:
            rstd = torch.empty(n_rows, call.n_groups, dtype=torch.float32, device=x.device)
            mean = None if call.options.is_rms_norm else torch.empty_like(rstd)
        inputs = (*numbers[:-3], eps)  # without the strides of out
        sums(call.device, n_rows * call.n_groups, [x, z, mean, rstd], inputs)
    tiles = -(-n_rows // tile.rows) * call.n_groups * tile.chunks
    tensors = [x, weight, bias, z, out, mean, rstd, scale]
    main(call.device, tiles, tensors, (n_rows, *numbers, eps))


@functools.lru_cache(maxsize=4096)
def _backward_launchers(
    kind: Kind, y_dtype: torch.dtype | None, parameters: bool = True, sums_given: bool = False
) -> tuple[Tile, Launcher, Launcher | None]:
    """`y_dtype` tells apart what is compiled with and without the forward's output, `parameters`
    with and without gradients of weight and bias."""
    bias = kind.dtypes[2] is not None
    order, architecture = kind.norm_before_gate, _architecture(kind.device)
    tile = backward_tile(kind.group_size, bias, order, architecture, _in_units(kind))
    tile = _fit(tile, kind)
    # One instruction fetches a whole group, in units of 16 bytes.
    loaded = [dtype for dtype in (kind.dtypes[0], *kind.dtypes[3:]) if dtype is not None]
    if tile.reload == "registers" and max(dtype.itemsize for dtype in loaded) > 2:
        tile = tile._replace(reload="memory")
    whole = all(kind.group_size * dtype.itemsize % 16 == 0 for dtype in loaded)
    ahead = tile.ahead and whole and _since_hopper(kind.device)
    constants = constants_of(kind) | _tile_constants(kind, tile)
    sums = None
    if tile.chunks > 1 and not sums_given:
        sums = _sums_launcher(backward_kernels.backward_sums_kernel, kind)
    constants |= {
        "SUMS_GIVEN": sums_given or sums is not None, "STAGES": 1 if ahead else tile.stages,
        "RELOAD": tile.reload == "memory" and not sums_given,
        "KEPT": tile.reload == "registers" and not sums_given, "AHEAD": ahead,
    }  # fmt: skip
    # Its workers have equal shares. Started while the kernel before still fills some of the
    # multiprocessors, they would crowd on the others.
    main = Launcher(
        backward_kernels.backward_kernel, constants, kind.device, tile.num_warps, tile.maxnreg,
        early=False,
    )  # fmt: skip
    return tile, main, sums


@functools.lru_cache(maxsize=4096)
def _combine_launcher(
    ranks: int, numbers: int, statistics: bool, device: torch.device
) -> tuple[int, Launcher]:
    """How many rows a program has, and the kernel; `numbers` tells apart what is compiled."""
    places = 1 << (ranks - 1).bit_length()
    block = max(16, min(256, 2048 // places))
    constants = {"RANKS": ranks, "PLACES": places, "BLOCK": block, "STATISTICS": statistics}
    # After an exchange, of whose kernel we do not know what it lets start early.
    return block, Launcher(ranks_kernels.combine_kernel, constants, device, 4, early=False)


def combine(parts: Tensor, first: Tensor, second: Tensor | None, eps: float | None = None) -> None:
    """Write the means over ranks of `parts` `[ranks, numbers, rows]`, of which each rank has the
    same, to `first` and `second` (None where there is one number); with `eps` the `rstd` and the
    `mean` of what `forward_means` has written."""
    ranks, numbers, n_rows = parts.shape
    block, start = _combine_launcher(ranks, numbers, eps is not None, parts.device)
    start(parts.device, -(-n_rows // block), [parts, first, second], (n_rows, eps or 0.0))


@functools.lru_cache(maxsize=4096)
def _reduce_launcher(
    width: int, tile: tuple[int, int, int], dtypes: tuple[Any, ...], device: torch.device
) -> Launcher:
    rows, block, num_warps = tile
    constants = {"D": width, "ROWS": rows, "BLOCK": block}
    return Launcher(backward_kernels.reduce_kernel, constants, device, num_warps)


def backward_means(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor | None,
) -> None:
    """Write the means `c1` and `c2` (None for RMS) of backward.py."""
    means = _sums_launcher(backward_kernels.backward_sums_kernel, call.kind)
    tensors = [dy, x, weight, z, mean, rstd, c1, c2]
    means(call.device, x.numel() // call.group_size, tensors, call.numbers[:-6])  # dy, x, z


def backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dz: Tensor | None,
    y: Tensor | None,
    parameters: bool,
    c1: Tensor | None = None,
    c2: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx`, `dz` `[..., D]`, and the forward's `y` with the strides of `dx`, unless None;
    return `dw`, `db` `[D]` in the dtypes of weight and bias, unless `parameters` is false. `c1`,
    `c2`: where they are given."""
    given, y_dtype = c1 is not None, None if y is None else y.dtype
    tile, main, sums = _backward_launchers(call.kind, y_dtype, parameters, given)
    numbers, device, n_rows = call.numbers, call.device, x.numel() // call.width
    if sums is not None:
        c1 = torch.empty(n_rows, call.n_groups, dtype=torch.float32, device=device)
        c2 = None if call.options.is_rms_norm else torch.empty_like(c1)
        tensors = [dy, x, weight, z, mean, rstd, c1, c2]
        sums(device, n_rows * call.n_groups, tensors, numbers[:-6])  # dy, x, z
    column_tiles = call.n_groups * tile.chunks
    workers = -(-_multiprocessors(device) * tile.workers_per_sm // column_tiles)
    workers = max(1, min(workers, -(-n_rows // tile.rows)))
    dw = db = dw_part = db_part = None
    if weight is not None and parameters:
        dw = torch.empty_like(weight)
        dw_part = torch.empty(workers, call.width, dtype=torch.float32, device=device)
    if bias is not None and parameters:
        db = torch.empty_like(bias)
        db_part = torch.empty(workers, call.width, dtype=torch.float32, device=device)
    tensors = [dy, x, weight, bias, z, mean, rstd, c1, c2, dx, dw_part, db_part, dz, y]
    main(device, workers * column_tiles, tensors, (n_rows, workers, *numbers))
    if dw is not None or db is not None:
        dtypes = (dw is not None and dw.dtype, db is not None and db.dtype)
        reduction = reduce_tile(call.width, workers)
        reduce = _reduce_launcher(call.width, reduction, dtypes, device)
        reduce(device, -(-call.width // reduction[1]), [dw_part, db_part, dw, db], (workers,))
    return dw, db


# ---- what the device can do ----


def _fit(tile: Tile, kind: Kind) -> Tile:
    """The tile that this GPU can hold; the same GPU always gets the same one."""
    if torch.version.hip:  # 64 lanes a warp, 1024 a program
        return tile._replace(num_warps=min(tile.num_warps, 16))
    room = _shared_memory(kind.device)
    columns = tile.rows * (tile.block_a + tile.block_b)
    loaded = [dtype for dtype in (kind.dtypes[0], *kind.dtypes[3:]) if dtype is not None]
    buffers = (tile.stages - 1) * columns * sum(dtype.itemsize for dtype in loaded) + 1024
    return tile._replace(stages=1) if room and buffers > room else tile


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # under the interpreter: enough for several workers
        return 2
    properties = _properties(device)
    count = getattr(properties, "multi_processor_count", None) or properties.gpu_eu_count // 8
    return int(count)


def _shared_memory(device: torch.device) -> int | None:
    """Bytes that a program may have; None where PyTorch does not say."""
    if device.type == "cpu":
        return None
    return getattr(_properties(device), "shared_memory_per_block_optin", None)


def _architecture(device: torch.device) -> int:
    """NVIDIA's major compute capability, 0 elsewhere."""
    if device.type != "cuda" or not NVIDIA:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _since_hopper(device: torch.device) -> bool:
    """Whether kernels on this device may be launched before the one before them has ended, and can
    fetch whole rows with one instruction."""
    return _architecture(device) >= 9

"""What the memory allows: elementwise kernels that move the bytes of a gated norm and compute next
to nothing. The best of several tile sizes on a shape is its ceiling; `gatednorm.bench` times them.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

__all__ = ["backward_ways", "do_bench", "forward_ways"]

TILES = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))  # elements, warps
Ways = list[Callable[[], object]]


@triton.jit
def _read_two_write_one(x_ptr, z_ptr, y_ptr, n, z_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """y = x + z; `z` `[n / D, D]` with a row stride."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    z = tl.load(z_ptr + i // D * z_stride + i % D, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x + z, mask=i < n)


@triton.jit
def _read_three_write_two(
    dy_ptr, x_ptr, z_ptr, dx_ptr, dz_ptr, n, z_stride, D: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = x + dy * z, dz = x * dy + z."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, mask=i < n, other=0.0)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    z = tl.load(z_ptr + i // D * z_stride + i % D, mask=i < n, other=0.0)
    tl.store(dx_ptr + i, x + dy * z, mask=i < n)
    tl.store(dz_ptr + i, x * dy + z, mask=i < n)


def _ways(kernel: Any, tensors: tuple[Tensor, ...], z: Tensor) -> Ways:
    n, z_stride, width = z.numel(), z.stride(0), z.shape[1]
    if z.is_contiguous():
        # Any rows will do, and up to 15 elements less: with a width of a power of two and a count
        # that Triton knows to be a multiple of 16, all loads are whole vectors.
        z_stride = width = TILES[0][0]
        n -= n % 16

    def way(block: int, num_warps: int) -> Callable[[], object]:
        start = kernel[(triton.cdiv(n, block),)]
        return lambda: start(*tensors, n, z_stride, width, block, num_warps=num_warps)

    return [way(*tile) for tile in TILES]


def forward_ways(x: Tensor, z: Tensor, y: Tensor) -> Ways:
    """Calls that read `x`, `z` `[rows, D]` and write `y`, one for each tile."""
    return _ways(_read_two_write_one, (x, z, y), z)


def backward_ways(dy: Tensor, x: Tensor, z: Tensor, dx: Tensor, dz: Tensor) -> Ways:
    """Calls that read `dy`, `x`, `z` `[rows, D]` and write `dx`, `dz`, one for each tile."""
    return _ways(_read_three_write_two, (dy, x, z, dx, dz), z)

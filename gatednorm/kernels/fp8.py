"""FP8: how fp32 values become `float8_e4m3fn`, and the kernels that quantise what lies in memory.

`scale = amax / 448` for each 128 columns or each row, the stored value `v / scale`, by the products
that `quantize_fp8_ref` writes out. A maximum does not depend on the order in which it is taken, and
no sum runs across values, so the bits of a row depend on that row alone. Names: rows.py.
"""

import triton
import triton.language as tl

from .rows import (
    INTERPRETED,
    UNSPECIALIZED,
    act_of,
    affine,
    load,
    load_parameters,
    overlap_launches,
    row_offset,
    store,
    to_fp32,
)

EMULATED = tl.constexpr(INTERPRETED)
COLUMNS = tl.constexpr(128)  # of a block
INVERSE_LARGEST = tl.constexpr(1 / 448)
LEAST = tl.constexpr(0x2B8CBCCC)  # the bits of 1e-12


@triton.jit
def to_fp8(v):
    """To the nearest `float8_e4m3fn`, ties to even, 448 at most; NaN stays NaN. The hardware's own
    conversion does this. The interpreter's does not: it loses the carry of a rounding."""
    if EMULATED:
        bits = v.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        byte = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 0x3C0
        # Below 2^-6 the steps are 2^-9, those of fp32 at 2^14.
        small = (tl.abs(v) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        byte = tl.where(size < 0x3C800000, small, tl.minimum(byte, 0x7E))
        byte = tl.where(size > 0x7F800000, 0x7F, byte) | ((bits >> 24) & 0x80)
        return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return v.to(tl.float8e4nv)


@triton.jit
def magnitude(v):
    """`abs(v)` as its bits: as integers they have the same order, and NaN is above all."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales_of(largest):
    """The scale, and what to multiply by, from the bits of the largest magnitude."""
    scale = tl.maximum(largest, LEAST).to(tl.float32, bitcast=True) * INVERSE_LARGEST
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def block_scales(v, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The scales of each 128 columns `[ROWS, BLOCK / 128]`, and `v / scale`."""
    BLOCKS: tl.constexpr = BLOCK // COLUMNS
    v = tl.reshape(v, [ROWS, BLOCKS, COLUMNS])
    scale, inverse = scales_of(tl.max(magnitude(v), axis=2))
    return scale, tl.reshape(v * inverse[:, :, None], [ROWS, BLOCK])


@triton.jit
def store_block_scales(ptr, scale, row, row_mask, n_rows, heads, first, last,
                       HEAD_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """`scale` `[ROWS, BLOCKS]` of the blocks from `first` to before `last` of a head; the scales
    `[tokens, blocks]` lie with strides `[1, tokens]`."""
    row = row.to(tl.int64)
    block = first + tl.arange(0, BLOCKS)
    place = (row % heads * HEAD_BLOCKS)[:, None] + block[None, :]
    ptr = ptr + place * (n_rows // heads) + (row // heads)[:, None]
    mask = (block < last)[None, :]
    if row_mask is not None:
        mask = mask & row_mask[:, None]
    tl.store(ptr, scale, mask=mask)


@triton.jit
def quantize_rows_kernel(
    x_ptr, y_ptr, scale_ptr, n_rows: tl.int64,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SCALING: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Contiguous rows `[n_rows, D]` with one scale a row (`rowwise`), or each 128 columns. A program
    has a chunk of a row; with one scale a row, all of it, what follows the first chunk twice."""
    overlap_launches(PDL)
    pid = tl.program_id(0).to(tl.int64)
    FULL: tl.constexpr = D % BLOCK == 0
    if SCALING == "rowwise":
        row = pid + tl.arange(0, 1)
        offset = row * D
        v = to_fp32(load(x_ptr, offset, None, 0, D, BLOCK, FULL, ""))
        largest = magnitude(v)
        for start in range(BLOCK, D, BLOCK):
            more = to_fp32(load(x_ptr, offset, None, start, D, BLOCK, FULL, ""))
            largest = tl.maximum(largest, magnitude(more))
        scale, inverse = scales_of(tl.max(largest, axis=1))
        inverse = inverse[:, None]
        tl.store(scale_ptr + row, scale)
        store(y_ptr, offset, None, 0, to_fp8(v * inverse), D, BLOCK, FULL)
        for start in range(BLOCK, D, BLOCK):
            more = to_fp32(load(x_ptr, offset, None, start, D, BLOCK, FULL, ""))
            store(y_ptr, offset, None, start, to_fp8(more * inverse), D, BLOCK, FULL)
    else:
        row = pid // CHUNKS + tl.arange(0, 1)
        start = pid % CHUNKS * BLOCK
        v = to_fp32(load(x_ptr, row * D, None, start, D, BLOCK, FULL, ""))
        scale, v = block_scales(v, 1, BLOCK)
        store_block_scales(scale_ptr, scale, row, None, n_rows, 1, start // COLUMNS, D // COLUMNS,
                           0, BLOCK // COLUMNS)  # fmt: skip
        store(y_ptr, row * D, None, start, to_fp8(v), D, BLOCK, FULL)

"""FP8: how fp32 values become `float8_e4m3fn`, and the kernels that quantise what lies in memory.

`scale = amax / 448` for each 128 columns or each row, the stored value `v / scale`, by the products
that `quantize_fp8_ref` writes out. A maximum does not depend on the order in which it is taken, and
no sum runs across values, so the bits of a row depend on that row alone. Names: rows.py.
"""

import triton
import triton.language as tl

from .rows import (
    INTERPRETED,
    NVIDIA,
    UNSPECIALIZED,
    act_of,
    affine,
    gated_input,
    load,
    load_parameters,
    load_rows,
    overlap_launches,
    row_offset,
    store,
    to_fp32,
)

EMULATED = tl.constexpr(INTERPRETED)
COLUMNS = tl.constexpr(128)  # of a block
INVERSE_LARGEST = tl.constexpr(1 / 448)
INVERSE_SIX = tl.constexpr(1 / 6)
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
def inverse_of(scale):
    """`1 / scale`, rounded once."""
    if NVIDIA:  # shorter than a division
        return tl.inline_asm_elementwise(
            "rcp.rn.f32 $0, $1;", "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def scales_of(largest):
    """The scale, and what to multiply by, from the bits of the largest magnitude."""
    scale = tl.maximum(largest, LEAST).to(tl.float32, bitcast=True) * INVERSE_LARGEST
    return scale, inverse_of(scale)


@triton.jit
def power_scales_of(largest):
    """The same for the smallest power of two that is no less: the biased exponent, which is what
    `float8_e8m0fnu` holds, 255 for NaN."""
    scale, _ = scales_of(largest)
    bits = tl.minimum(scale.to(tl.int32, bitcast=True), 0x7F800000)
    exponent = (bits + 0x7FFFFF) >> 23
    inverse = tl.where(exponent == 255, 0x7FC00000, (254 - exponent) << 23)
    return exponent.to(tl.uint8), inverse.to(tl.float32, bitcast=True)


@triton.jit
def block_scales(v, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The scales of each WIDTH columns `[ROWS, BLOCK / WIDTH]`, and `v / scale`. 32 columns have a
    power of two."""
    BLOCKS: tl.constexpr = BLOCK // WIDTH
    v = tl.reshape(v, [ROWS, BLOCKS, WIDTH])
    largest = tl.max(magnitude(v), axis=2)
    if WIDTH == 32:
        scale, inverse = power_scales_of(largest)
    else:
        scale, inverse = scales_of(largest)
    return scale, tl.reshape(v * inverse[:, :, None], [ROWS, BLOCK])


@triton.jit
def to_fp4(v):
    """The code of the nearest `e2m1`, ties to even, 6 at most; of NaN that of 0."""
    size = tl.abs(v)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | tl.where(v == v, (v.to(tl.int32, bitcast=True) >> 28) & 8, 0)


@triton.jit
def nvfp4_blocks(v, given, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The scales of each 16 columns in units of `given`, as bytes of e4m3 `[ROWS, BLOCK / 16]`, and
    the values, two a byte `[ROWS, BLOCK / 2]`."""
    v = tl.reshape(v, [ROWS, BLOCK // 16, 16])
    largest = tl.max(magnitude(v), axis=2)
    scale = largest.to(tl.float32, bitcast=True) * INVERSE_SIX * inverse_of(given)
    scale = tl.minimum(tl.maximum(scale, 0.015625), 448.0)
    byte = to_fp8(scale).to(tl.uint8, bitcast=True).to(tl.int32)
    finite = largest < 0x7F800000
    # Read again by hand: the scale is a normal number, or NaN.
    bits = tl.where(finite, (byte << 20) + 0x3C000000, 0x7FC00000)
    inverse = inverse_of(bits.to(tl.float32, bitcast=True) * given)
    low, high = tl.split(tl.reshape(to_fp4(v * inverse[:, :, None]), [ROWS, BLOCK // 2, 2]))
    return tl.where(finite, byte, 0x7F).to(tl.uint8), (low | high << 4).to(tl.uint8)


@triton.jit
def store_block_scales(ptr, scale, row, row_mask, n_rows, first, last, WIDTH: tl.constexpr,
                       HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
                       LONG: tl.constexpr):  # fmt: skip
    """`scale` `[ROWS, BLOCKS]` of the blocks from `first` to before `last` of a head. The scales of
    128 columns `[tokens, blocks]` lie with strides `[1, tokens]`; those of fewer in tiles of 128
    tokens and 4 blocks, in each by `token % 32`, `token // 32`, block. Rows have 64 bits if
    `LONG`."""
    if not LONG:
        row = row.to(tl.uint32)
        n_rows = n_rows.to(tl.uint32)
    block = (first + tl.arange(0, BLOCKS))[None, :]
    mask = block < last
    if row_mask is not None:
        mask = mask & row_mask[:, None]
    if HEADS > 1:
        block = (row % HEADS * HEAD_BLOCKS)[:, None] + block
    token = (row // HEADS)[:, None]
    if WIDTH < 128:
        TILES: tl.constexpr = (HEADS * HEAD_BLOCKS + 3) // 4
        tile = (token // 128).to(tl.int64) * TILES + block // 4
        place = tile * 512 + (token % 32 * 16 + token % 128 // 32 * 4 + block % 4)
    else:
        place = block.to(tl.int64) * (n_rows // HEADS) + token
    tl.store(ptr + place, scale, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_rows_kernel(
    x_ptr, y_ptr, scale_ptr, given_ptr, n_rows: tl.int64, y_s0: tl.int64,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    SCALING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Contiguous rows `[n_rows, D]` with one scale a row (`rowwise`), or each 128, 32 or 16
    columns. A program has a chunk of a row, or several short rows; with one scale a row all of it,
    and what follows the first chunk is read twice."""
    WIDTH: tl.constexpr = 32 if SCALING == "mxfp8" else 16 if SCALING == "nvfp4" else 128
    overlap_launches(PDL)
    pid = tl.program_id(0).to(tl.int64)
    FULL: tl.constexpr = D % BLOCK == 0
    start = 0
    if SCALING != "rowwise":
        start = pid % CHUNKS * BLOCK
        pid = pid // CHUNKS
    row = pid * ROWS + tl.arange(0, ROWS)
    row_mask = row < n_rows if ROWS > 1 else None
    offset = row * D
    # The values of a thread stay with it, as in the forward.
    y_off = tl.multiple_of(row * y_s0, 8 if D % 8 == 0 else 1)
    v = to_fp32(load(x_ptr, offset, row_mask, start, D, BLOCK, FULL, ""))
    if SCALING != "rowwise":
        if SCALING == "nvfp4":
            given = tl.load(given_ptr + tl.arange(0, 1))[:, None]
            scale, pairs = nvfp4_blocks(v, given, ROWS, BLOCK)
            store(y_ptr, y_off, row_mask, start // 2, pairs, D // 2, BLOCK // 2, FULL)
        else:
            scale, v = block_scales(v, ROWS, BLOCK, WIDTH)
            store(y_ptr, y_off, row_mask, start, to_fp8(v), D, BLOCK, FULL)
        store_block_scales(scale_ptr, scale, row, row_mask, n_rows, start // WIDTH, D // WIDTH,
                           WIDTH, 1, D // WIDTH, BLOCK // WIDTH, True)  # fmt: skip
    else:
        largest = magnitude(v)
        for more in range(BLOCK, D, BLOCK):
            other = to_fp32(load(x_ptr, offset, row_mask, more, D, BLOCK, FULL, ""))
            largest = tl.maximum(largest, magnitude(other))
        scale, inverse = scales_of(tl.max(largest, axis=1))
        inverse = inverse[:, None]
        tl.store(scale_ptr + row, scale, mask=row_mask)
        store(y_ptr, y_off, row_mask, 0, to_fp8(v * inverse), D, BLOCK, FULL)
        for more in range(BLOCK, D, BLOCK):
            other = to_fp32(load(x_ptr, offset, row_mask, more, D, BLOCK, FULL, ""))
            store(y_ptr, y_off, row_mask, more, to_fp8(other * inverse), D, BLOCK, FULL)


@triton.jit
def _statistics(ptr, row, row_mask, col, GROUPS: tl.constexpr, N: tl.constexpr):
    """`[ROWS, BLOCK]`, or `[ROWS, 1]` for one group, of what is saved for each row and group."""
    if GROUPS == 1:
        return load_rows(ptr, row.to(tl.int64), row_mask)[:, None]
    else:
        stat = row.to(tl.int64)[:, None] * GROUPS + (col // N)[None, :]
        return tl.load(ptr + stat, mask=row_mask[:, None], other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_tiles_kernel(
    x_ptr, w_ptr, b_ptr, z_ptr, mean_ptr, rstd_ptr, rows_ptr, row_scale_ptr, cols_ptr,
    col_scale_ptr, n_rows: tl.int64, size1: tl.int64, size2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64,
    N: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, SQUARE: tl.constexpr,
    DIMS: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr, IS_RMS: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr, SIGMOID: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of 128 tokens and 128 columns of the norm's result `[n_rows, K]`, K = HEADS * N *
    GROUPS, along its rows, its columns, or both; what is not asked for has no pointer.

    Along rows: values `[n_rows, K]`, scales `[n_rows, K / 128]` with strides `[1, n_rows]`. Along
    columns: values `[K, padded]`, scales `[K, padded / 128]` with strides `[1, K]`, where the
    tokens are padded with zeros to a multiple of 128. SQUARE: one scale a tile, contiguous. The
    result comes from `x`, `z` and the saved statistics, in the forward's bits; without an
    `rstd_ptr` it is `x` itself. Both without SQUARE: of `x` itself alone.
    """
    D: tl.constexpr = N * GROUPS
    K: tl.constexpr = HEADS * D
    BLOCKS: tl.constexpr = K // COLUMNS
    overlap_launches(PDL)
    pid = tl.program_id(0)
    part = pid // BLOCKS
    block = pid % BLOCKS
    column = block * COLUMNS
    col_start = tl.multiple_of(column % D, 128)
    token = part * COLUMNS + tl.arange(0, COLUMNS)
    if LONG:
        token = token.to(tl.int64)
    row_mask = token < n_rows
    row = token * HEADS + column // D
    x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
    z_off = x_off
    if z_ptr is not None:
        z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
    h, z = gated_input(x_ptr, x_off, z_ptr, z_off, row_mask, col_start, D, COLUMNS, True,
                       NORM_BEFORE_GATE, SIGMOID)  # fmt: skip
    if rstd_ptr is not None:
        col = col_start + tl.arange(0, COLUMNS)
        if not IS_RMS:
            h = h - _statistics(mean_ptr, row, row_mask, col, GROUPS, N)
        w, b = load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET, D, COLUMNS)
        rstd = _statistics(rstd_ptr, row, row_mask, col, GROUPS, N)
        _, h = affine(h * rstd, w, b, w_ptr is not None, b_ptr is not None, ROUND_NORM,
                      ROUND_WEIGHT)  # fmt: skip
        if z_ptr is not None and NORM_BEFORE_GATE:
            h = h * act_of(to_fp32(z), SIGMOID)
        h = tl.where(row_mask[:, None], h, 0.0)
    parts = (n_rows + COLUMNS - 1) // COLUMNS
    size = magnitude(h)
    tile_rows = tl.reshape(row_mask, [COLUMNS, 1])
    along = tl.arange(0, COLUMNS)
    if cols_ptr is not None and not SQUARE:
        largest = tl.max(size, axis=0)
    if SQUARE:
        scale, inverse = scales_of(tl.max(tl.max(size, axis=1), axis=0))
        values = to_fp8(h * inverse)
        if rows_ptr is not None:
            tl.store(row_scale_ptr + part.to(tl.int64) * BLOCKS + block, scale)
        if cols_ptr is not None:
            tl.store(col_scale_ptr + block * parts + part, scale)
    if rows_ptr is not None:
        if not SQUARE:
            scale, inverse = scales_of(tl.max(size, axis=1))
            values = to_fp8(h * inverse[:, None])
            tl.store(row_scale_ptr + block * n_rows + token, scale, mask=row_mask)
        # The values of a thread stay with it, as in the forward.
        place = tl.multiple_of(token.to(tl.int64) * K + column, 8)
        tl.store(rows_ptr + place[:, None] + along[None, :], values, mask=tile_rows)
    if cols_ptr is not None:
        if not SQUARE:
            if rows_ptr is not None:
                # Read again, from the cache: two sets of values at a time take too many registers.
                # The zero, which the compiler cannot see, keeps the two reads apart.
                again = x_off + (n_rows >> 40) * 16
                h = to_fp32(load(x_ptr, again, row_mask, col_start, D, COLUMNS, True, ""))
            scale, inverse = scales_of(largest)
            values = to_fp8(h * inverse[None, :])
            tl.store(col_scale_ptr + part.to(tl.int64) * K + column + along, scale)
        place = (column + along).to(tl.int64) * (parts * COLUMNS) + part * COLUMNS
        place = tl.multiple_of(place, 16)
        tl.store(cols_ptr + place[:, None] + along[None, :], tl.trans(values))

"""The forward: one kernel for rows that fit into registers, and for the chunks of wider ones.

A program owns a tile of `ROWS` rows of one norm group. The group's `N` channels lie in registers in
two pieces, A and B, whose widths are powers of two (5120 = 4096 + 1024), so that few lanes idle.
Wider groups go in chunks: `forward_sums_kernel` leaves each row's statistics in memory, and the
forward kernel, told so (`STATS_GIVEN`), takes them from there. So it does for a group that lies on
several ranks (distributed.py). Names: rows.py.
"""

import triton
import triton.language as tl

from .fp8 import block_scales, inverse_of, magnitude, scales_of, store_block_scales, to_fp8
from .rows import (
    UNSPECIALIZED,
    act_of,
    affine,
    centre,
    gated_input,
    load_parameters,
    load_rows,
    mean_of,
    overlap_launches,
    row_offset,
    row_sum,
    rsqrt,
    store,
    sum_pieces,
    to_fp32,
    warp_dots,
    warp_sums,
)


@triton.jit
def _result(u, z, rstd, w_ptr, b_ptr, w, b, col_start, WEIGHT_OFFSET: tl.constexpr,
            N: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr,
            ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr,
            HOIST: tl.constexpr):  # fmt: skip
    """One piece from the centred value to the result in fp32; `GATE`: the gate comes here."""
    if not HOIST:
        w, b = load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET, N, BLOCK)
    _, h = affine(u * rstd[:, None], w, b, w_ptr is not None, b_ptr is not None, ROUND_NORM,
                  ROUND_WEIGHT)  # fmt: skip
    if GATE:
        h = h * act_of(to_fp32(z), SIGMOID)
    return h


@triton.jit
def _write(h, y_ptr, y_off, inverse, row_mask, col_start, N: tl.constexpr, ROWS: tl.constexpr,
           BLOCK: tl.constexpr, FULL: tl.constexpr, SCALING: tl.constexpr):  # fmt: skip
    """One piece to memory, in the dtype of `y_ptr` or as FP8 values; the scales of blocks."""
    scale = inverse
    if SCALING == "1x128" or SCALING == "mxfp8":
        scale, h = block_scales(h, ROWS, BLOCK, 32 if SCALING == "mxfp8" else 128)
        h = to_fp8(h)
    elif SCALING is not None:
        h = to_fp8(h * inverse)
    store(y_ptr, y_off, row_mask, col_start, h, N, BLOCK, FULL)
    return scale


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    x_ptr, w_ptr, b_ptr, z_ptr, y_ptr, mean_ptr, rstd_ptr, scale_ptr,
    n_rows: tl.int64, size1: tl.int64, size2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64,
    y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64,
    eps: tl.float32,
    N: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, REPEATS_A: tl.constexpr, REPEATS_B: tl.constexpr,
    WARPS_A: tl.constexpr, WARPS_B: tl.constexpr,
    FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr,
    IS_RMS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, SIGMOID: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr,
    STATS_GIVEN: tl.constexpr, HOIST: tl.constexpr, SCALING: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = (norm(x) * w + b) * act(z), or norm(x * act(z)) * w + b unless NORM_BEFORE_GATE.

    norm(u) = (u - mean(u)) * rstd, rstd = 1 / sqrt(mean((u - mean(u))^2) + eps), mean(u) = 0 for
    RMS. Mamba-2 (arXiv 2405.21060) gates before the norm, Gated DeltaNet (arXiv 2412.06464) after.

    SCALING: y is FP8 with scales of each 128 or 32 columns of a row of HEADS heads, of each row (of
    one program), or a given one.
    """
    GATE_HERE: tl.constexpr = z_ptr is not None and NORM_BEFORE_GATE
    FULL_A: tl.constexpr = FULL or BLOCK_B > 0
    overlap_launches(PDL)
    pid = tl.program_id(0)
    if LONG:
        pid = pid.to(tl.int64)
    column_tile = pid % (GROUPS * CHUNKS)
    row = pid // (GROUPS * CHUNKS) * ROWS + tl.arange(0, ROWS)
    row_mask = row < n_rows if ROWS > 1 else None
    group = column_tile // CHUNKS
    col_start = column_tile % CHUNKS * BLOCK_A
    stat = row.to(tl.int64) * GROUPS + group
    x_ptr += group * N
    y_ptr += group * N
    x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
    # A thread stores the 8 columns that it has: with 16, which its widest store would take, the
    # compiler moves every value to another thread.
    Y_ALIGN: tl.constexpr = 8 if SCALING is not None and ALIGN > 8 else ALIGN
    y_off = row_offset(row, size1, size2, y_s0, y_s1, y_s2, DIMS, Y_ALIGN, LONG)
    z_off = x_off
    if z_ptr is not None:
        z_ptr += group * N
        z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
    if w_ptr is not None:
        w_ptr += group * N
    if b_ptr is not None:
        b_ptr += group * N

    w_a, b_a, w_b, b_b = 0.0, 0.0, 0.0, 0.0
    # What is loaded last says which thread has which columns of the result, until it is stored. A
    # maximum over these must find them as the rows were loaded.
    PARAMETERS_FIRST: tl.constexpr = HOIST and SCALING is not None
    if PARAMETERS_FIRST:
        w_a, b_a = load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET, N, BLOCK_A)
    u_a, z_a = gated_input(x_ptr, x_off, z_ptr, z_off, row_mask, col_start, N, BLOCK_A, FULL_A,
                           NORM_BEFORE_GATE, SIGMOID)  # fmt: skip
    if HOIST and not PARAMETERS_FIRST:
        w_a, b_a = load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET, N, BLOCK_A)
    if BLOCK_B > 0:
        if HOIST:
            w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, WEIGHT_OFFSET, N, BLOCK_B)
        u_b, z_b = gated_input(x_ptr, x_off, z_ptr, z_off, row_mask, BLOCK_A, N, BLOCK_B, FULL,
                               NORM_BEFORE_GATE, SIGMOID)  # fmt: skip
    if STATS_GIVEN:
        rstd = load_rows(rstd_ptr, stat, row_mask)
        if not IS_RMS:
            mean = load_rows(mean_ptr, stat, row_mask)
            u_a -= mean[:, None]
            if BLOCK_B > 0:
                u_b -= mean[:, None]
    else:
        if not IS_RMS:
            sums_a = warp_sums(u_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
            sums_b = sums_a
            if BLOCK_B > 0:
                sums_b = warp_sums(u_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
            mean = mean_of(sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B), N)
            u_a = centre(u_a, mean, 0, N, BLOCK_A, FULL_A)
            if BLOCK_B > 0:
                u_b = centre(u_b, mean, BLOCK_A, N, BLOCK_B, FULL)
            if mean_ptr is not None:
                tl.store(mean_ptr + stat, mean, mask=row_mask)
        sums_a = warp_dots(u_a, u_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
        sums_b = sums_a
        if BLOCK_B > 0:
            sums_b = warp_dots(u_b, u_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
        total = sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B)
        rstd = rsqrt(mean_of(total, N) + eps)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + stat, rstd, mask=row_mask)
    inverse = 1.0
    if SCALING == "tensorwise":
        inverse = inverse_of(tl.load(scale_ptr + tl.arange(0, 1)))[:, None]
    h_a = _result(u_a, z_a, rstd, w_ptr, b_ptr, w_a, b_a, col_start, WEIGHT_OFFSET, N, BLOCK_A,
                  GATE_HERE, SIGMOID, ROUND_NORM, ROUND_WEIGHT, HOIST)  # fmt: skip
    if SCALING != "rowwise":
        scale_a = _write(h_a, y_ptr, y_off, inverse, row_mask, col_start, N, ROWS, BLOCK_A, FULL_A,
                         SCALING)  # fmt: skip
    if BLOCK_B > 0:
        h_b = _result(u_b, z_b, rstd, w_ptr, b_ptr, w_b, b_b, BLOCK_A, WEIGHT_OFFSET, N, BLOCK_B,
                      GATE_HERE, SIGMOID, ROUND_NORM, ROUND_WEIGHT, HOIST)  # fmt: skip
        if SCALING != "rowwise":
            scale_b = _write(h_b, y_ptr, y_off, inverse, row_mask, BLOCK_A, N, ROWS, BLOCK_B, FULL,
                             SCALING)  # fmt: skip
    if SCALING == "1x128" or SCALING == "mxfp8":
        WIDTH: tl.constexpr = 32 if SCALING == "mxfp8" else 128
        BLOCKS: tl.constexpr = N // WIDTH
        first = group * BLOCKS
        store_block_scales(scale_ptr, scale_a, row, row_mask, n_rows, first + col_start // WIDTH,
                           first + BLOCKS, WIDTH, HEADS, GROUPS * BLOCKS, BLOCK_A // WIDTH,
                           LONG)  # fmt: skip
        if BLOCK_B > 0:
            store_block_scales(scale_ptr, scale_b, row, row_mask, n_rows,
                               first + BLOCK_A // WIDTH, first + BLOCKS, WIDTH, HEADS,
                               GROUPS * BLOCKS, BLOCK_B // WIDTH, LONG)  # fmt: skip
    if SCALING == "rowwise":
        largest = magnitude(h_a)
        if BLOCK_B == BLOCK_A:
            largest = tl.maximum(largest, magnitude(h_b))
        largest = tl.max(largest, axis=1)
        if BLOCK_B > 0 and BLOCK_B != BLOCK_A:
            largest = tl.maximum(largest, tl.max(magnitude(h_b), axis=1))
        scale, inverse = scales_of(largest)
        inverse = inverse[:, None]
        _write(h_a, y_ptr, y_off, inverse, row_mask, 0, N, ROWS, BLOCK_A, FULL_A,
               SCALING)  # fmt: skip
        if BLOCK_B > 0:
            _write(h_b, y_ptr, y_off, inverse, row_mask, BLOCK_A, N, ROWS, BLOCK_B, FULL,
                   SCALING)  # fmt: skip
        tl.store(scale_ptr + row, scale, mask=row_mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_sums_kernel(
    x_ptr, z_ptr, mean_ptr, rstd_ptr, size1: tl.int64, size2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64, eps: tl.float32,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    WARPS: tl.constexpr, FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    LONG: tl.constexpr, IS_RMS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    SIGMOID: tl.constexpr, PARTIAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`mean` and `rstd` `[rows, GROUPS]` of one wide row and group per program, chunk by chunk.
    PARTIAL, of a part of a group: instead of `rstd`, the mean square of `u - mean`.
    """
    overlap_launches(PDL)
    # From the last row on: L2 then holds the first ones, with which the next kernel begins.
    pid = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    group = pid % GROUPS
    row = pid // GROUPS + tl.arange(0, 1)
    x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
    z_off = x_off
    x_ptr += group * N
    if NORM_BEFORE_GATE:
        z_ptr = None
    else:
        z_ptr += group * N
        z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
    mean = tl.zeros([1], tl.float32)
    if not IS_RMS:
        total = tl.zeros([1, BLOCK], tl.float32)
        for col_start in range(0, N, BLOCK):
            u, _ = gated_input(x_ptr, x_off, z_ptr, z_off, None, col_start, N, BLOCK, FULL,
                               NORM_BEFORE_GATE, SIGMOID)  # fmt: skip
            total += u
        mean = mean_of(row_sum(total, BLOCK, REPEATS, WARPS), N)
        tl.store(mean_ptr + pid + tl.arange(0, 1), mean)
    total = tl.zeros([1, BLOCK], tl.float32)
    for col_start in range(0, N, BLOCK):
        u, _ = gated_input(x_ptr, x_off, z_ptr, z_off, None, col_start, N, BLOCK, FULL,
                           NORM_BEFORE_GATE, SIGMOID)  # fmt: skip
        if not IS_RMS:
            u = centre(u, mean, col_start, N, BLOCK, FULL)
        total += u * u
    total = row_sum(total, BLOCK, REPEATS, WARPS)
    rstd = mean_of(total, N)
    if not PARTIAL:
        rstd = rsqrt(rstd + eps)
    tl.store(rstd_ptr + pid + tl.arange(0, 1), rstd)

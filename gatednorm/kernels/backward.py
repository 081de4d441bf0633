"""The backward: one kernel for `dx`, `dz` and each worker's share of `dw` and `db`, one that adds
these up, and for wide rows one that computes their sums first. Pieces and chunks as in forward.py.
"""

import triton
import triton.language as tl

from .rows import (
    UNSPECIALIZED,
    act_slope,
    affine,
    centre,
    fetch,
    hidden,
    load,
    load_parameters,
    load_rows,
    mean_of,
    overlap_launches,
    row_offset,
    row_sum,
    sigmoid,
    store,
    sum_pieces,
    sum_pieces_twice,
    to_fp32,
    warp_dots,
    warp_sums,
)


@triton.jit
def _read(dy_ptr, dy_off, x_ptr, x_off, w_ptr, b_ptr, z_ptr, z_off, w, b, s, mean, rstd,
          row_mask, col_start, WEIGHT_OFFSET: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
          FULL: tl.constexpr, IS_RMS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
          SIGMOID: tl.constexpr, ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr,
          HOIST: tl.constexpr, EVICT: tl.constexpr, y_ptr=None, y_off=None,
          KEPT: tl.constexpr = False, dy=0.0, x=0.0, z=0.0, zero=0):  # fmt: skip
    """One piece from memory, or as KEPT: `xhat`, its rounded value, `g`, `dxhat`, `act(z)`, `dz`,
    `s = sigmoid(z)` (computed where None is given), and `dy`, `x`, `z` to keep; the forward's `y`
    is stored where asked for.

    `dz` is all of it for a gate after the norm, its factor `x * act'(z)` for one before. What a
    caller does not use is neither read nor computed.
    """
    if KEPT:
        dy = hidden(dy, zero)
        x = hidden(x, zero)
        z = hidden(z, zero)
        if w_ptr is not None:
            w_ptr += zero
    if not HOIST:
        w, b = load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET, N, BLOCK)
    if not KEPT:
        dy = load(dy_ptr, dy_off, row_mask, col_start, N, BLOCK, FULL, EVICT)
        x = load(x_ptr, x_off, row_mask, col_start, N, BLOCK, FULL, EVICT)
        z = x
        if z_ptr is not None:
            z = load(z_ptr, z_off, row_mask, col_start, N, BLOCK, FULL, EVICT)
    if s is None:
        s = sigmoid(to_fp32(z))
    g = to_fp32(dy)
    u = to_fp32(x)
    act = u
    dz = u
    if z_ptr is not None:
        act, slope = act_slope(to_fp32(z), s, SIGMOID)
        if not NORM_BEFORE_GATE:
            dz = u * slope
            u = u * act
    if not IS_RMS:
        u = centre(u, mean, col_start, N, BLOCK, FULL)
    xhat = u * rstd[:, None]
    rounded, h = affine(xhat, w, b, w_ptr is not None, b_ptr is not None, ROUND_NORM, ROUND_WEIGHT)
    y = h
    if z_ptr is not None and NORM_BEFORE_GATE:
        dz = g * h * slope
        g = g * act
        y = h * act
    if y_ptr is not None:
        store(y_ptr, y_off, row_mask, col_start, y, N, BLOCK, FULL)
    dxhat = g
    if w_ptr is not None:
        dxhat = g * w
    return xhat, rounded, g, dxhat, act, dz, s, dy, x, z


@triton.jit
def _finish(xhat, dxhat, act, dz, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off, row_mask,
            col_start, N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
            IS_RMS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr):  # fmt: skip
    """One piece after the row sums: `dx`, and `dz` of a gate before the norm."""
    if IS_RMS:
        du = tl.fma(xhat, -c1[:, None], dxhat) * rstd[:, None]
    else:
        du = tl.fma(dxhat, rstd[:, None], -(c2 * rstd)[:, None])
        du = tl.fma(xhat, -(c1 * rstd)[:, None], du)
    if not NORM_BEFORE_GATE:
        store(dz_ptr, dz_off, row_mask, col_start, du * dz, N, BLOCK, FULL)
        du *= act
    store(dx_ptr, dx_off, row_mask, col_start, du, N, BLOCK, FULL)


@triton.jit
def _store_share(ptr, v, col_start, N: tl.constexpr, BLOCK: tl.constexpr):
    """A worker's share of `dw` or `db`: `v` `[ROWS, BLOCK]`, added up over its rows."""
    col = col_start + tl.arange(0, BLOCK)
    tl.store(ptr + col, tl.sum(v, axis=0), mask=col < N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, z_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr,
    dx_ptr, dw_ptr, db_ptr, dz_ptr, y_ptr,
    n_rows: tl.int64, n_workers: tl.int64, size1: tl.int64, size2: tl.int64,
    dy_s0: tl.int64, dy_s1: tl.int64, dy_s2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64,
    dx_s0: tl.int64, dx_s1: tl.int64, dx_s2: tl.int64,
    dz_s0: tl.int64, dz_s1: tl.int64, dz_s2: tl.int64,
    N: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, REPEATS_A: tl.constexpr, REPEATS_B: tl.constexpr,
    WARPS_A: tl.constexpr, WARPS_B: tl.constexpr,
    FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr,
    IS_RMS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, SIGMOID: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr, ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr,
    SUMS_GIVEN: tl.constexpr, STAGES: tl.constexpr, HOIST: tl.constexpr, RELOAD: tl.constexpr,
    KEPT: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """du = rstd * (dxhat - xhat * c1 - c2), c1 = mean(dxhat * xhat), c2 = mean(dxhat) (0 for RMS).

    Gate after the norm: g = dy * act(z), dz = dy * (xhat * w + b) * act'(z), dx = du.
    Gate before the norm: g = dy, dz = du * x * act'(z), dx = du * act(z).
    Both: dxhat = g * w; dw = sum of g * xhat, db = sum of g over the rows. Each of `n_workers`
    programs of a column tile walks over its share of the row tiles and leaves its sums in row
    `worker` of `dw_ptr`, `db_ptr` `[n_workers, D]`, unless None; `reduce_kernel` adds them up in
    that order.
    The forward's `y` is written again, with the strides of dx, where there is a `y_ptr`.
    SUMS_GIVEN: c1 and c2 come from memory, for groups in chunks and those of several processes.
    """
    FULL_A: tl.constexpr = FULL or BLOCK_B > 0
    D: tl.constexpr = N * GROUPS
    KEEP: tl.constexpr = "evict_last" if RELOAD else ""
    overlap_launches(PDL)
    # A zero that the compiler cannot see: it would keep the terms of a row from their first time.
    zero = (n_workers >> 40) * 16  # divisible by any alignment
    pid = tl.program_id(0)
    if LONG or RELOAD or KEPT:  # a wide row takes all registers, and with short counters some spill
        pid = pid.to(tl.int64)
    else:
        n_rows = n_rows.to(tl.int32)
        n_workers = n_workers.to(tl.int32)
    column_tile = pid % (GROUPS * CHUNKS)
    worker = pid // (GROUPS * CHUNKS)
    group = column_tile // CHUNKS
    col_start = column_tile % CHUNKS * BLOCK_A
    dy_ptr += group * N
    x_ptr += group * N
    dx_ptr += group * N
    if y_ptr is not None:
        y_ptr += group * N
    if z_ptr is not None:
        z_ptr += group * N
        dz_ptr += group * N
    if w_ptr is not None:
        w_ptr += group * N
    if b_ptr is not None:
        b_ptr += group * N
    if dw_ptr is not None:
        dw_ptr += worker.to(tl.int64) * D + group * N
    if db_ptr is not None:
        db_ptr += worker.to(tl.int64) * D + group * N

    w_a, b_a, w_b, b_b = 0.0, 0.0, 0.0, 0.0
    dw_a = tl.zeros([ROWS, BLOCK_A], tl.float32)
    db_a = dw_a
    if HOIST:
        w_a, b_a = load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET, N, BLOCK_A)
    if BLOCK_B > 0:
        dw_b = tl.zeros([ROWS, BLOCK_B], tl.float32)
        db_b = dw_b
        if HOIST:
            w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, WEIGHT_OFFSET, N, BLOCK_B)
    for tile in tl.range(worker, tl.cdiv(n_rows, ROWS), n_workers, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        row_mask = row < n_rows if ROWS > 1 else None
        stat = row.to(tl.int64) * GROUPS + group
        dy_off = row_offset(row, size1, size2, dy_s0, dy_s1, dy_s2, DIMS, ALIGN, LONG)
        x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
        dx_off = row_offset(row, size1, size2, dx_s0, dx_s1, dx_s2, DIMS, ALIGN, LONG)
        z_off = x_off
        dz_off = dx_off
        if z_ptr is not None:
            z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
            dz_off = row_offset(row, size1, size2, dz_s0, dz_s1, dz_s2, DIMS, ALIGN, LONG)
        rstd = load_rows(rstd_ptr, stat, row_mask)
        mean = rstd
        if not IS_RMS:
            mean = load_rows(mean_ptr, stat, row_mask)
        if AHEAD:  # tiles of one row
            later = tl.minimum(tile + n_workers, n_rows - 1)
            fetch(dy_ptr, later, size1, size2, dy_s0, dy_s1, dy_s2, N, DIMS, ALIGN, LONG)
            fetch(x_ptr, later, size1, size2, x_s0, x_s1, x_s2, N, DIMS, ALIGN, LONG)
            if z_ptr is not None:
                fetch(z_ptr, later, size1, size2, z_s0, z_s1, z_s2, N, DIMS, ALIGN, LONG)

        xhat_a, rounded, g, dxhat_a, act_a, dz_a, s_a, dy_a, x_a, z_a = _read(
            dy_ptr, dy_off, x_ptr, x_off, w_ptr, b_ptr, z_ptr, z_off, w_a, b_a, None, mean, rstd,
            row_mask, col_start, WEIGHT_OFFSET, N, BLOCK_A, FULL_A, IS_RMS, NORM_BEFORE_GATE,
            SIGMOID, ROUND_NORM, ROUND_WEIGHT, HOIST, KEEP, y_ptr, dx_off)  # fmt: skip
        if z_ptr is not None and NORM_BEFORE_GATE:
            store(dz_ptr, dz_off, row_mask, col_start, dz_a, N, BLOCK_A, FULL_A)
        if dw_ptr is not None:
            dw_a = tl.fma(g, rounded, dw_a)
        if db_ptr is not None:
            db_a += g
        if BLOCK_B > 0:
            xhat_b, rounded, g, dxhat_b, act_b, dz_b, s_b, dy_b, x_b, z_b = _read(
                dy_ptr, dy_off, x_ptr, x_off, w_ptr, b_ptr, z_ptr, z_off, w_b, b_b, None, mean,
                rstd, row_mask, BLOCK_A, WEIGHT_OFFSET, N, BLOCK_B, FULL, IS_RMS,
                NORM_BEFORE_GATE, SIGMOID, ROUND_NORM, ROUND_WEIGHT, HOIST, KEEP,
                y_ptr, dx_off)  # fmt: skip
            if z_ptr is not None and NORM_BEFORE_GATE:
                store(dz_ptr, dz_off, row_mask, BLOCK_A, dz_b, N, BLOCK_B, FULL)
            if dw_ptr is not None:
                dw_b = tl.fma(g, rounded, dw_b)
            if db_ptr is not None:
                db_b += g
        c2 = rstd
        if SUMS_GIVEN:
            c1 = load_rows(c1_ptr, stat, row_mask)
            if not IS_RMS:
                c2 = load_rows(c2_ptr, stat, row_mask)
        else:
            sums_a = warp_dots(dxhat_a, xhat_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
            sums_b = sums_a
            if BLOCK_B > 0:
                sums_b = warp_dots(dxhat_b, xhat_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
            if IS_RMS:
                c1 = sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B)
            else:
                plain_a = warp_sums(dxhat_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
                plain_b = plain_a
                if BLOCK_B > 0:
                    plain_b = warp_sums(dxhat_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
                c1, c2 = sum_pieces_twice(
                    sums_a, sums_b, plain_a, plain_b, ROWS, WARPS_A, WARPS_B)  # fmt: skip
                c2 = mean_of(c2, N)
            c1 = mean_of(c1, N)
        if RELOAD or KEPT:
            xhat_a, _, _, again, act, dz, _, _, _, _ = _read(
                dy_ptr, dy_off + zero, x_ptr, x_off + zero, w_ptr, b_ptr, z_ptr, z_off + zero,
                w_a, b_a, s_a if RELOAD else None, mean, rstd, row_mask, col_start,
                WEIGHT_OFFSET, N, BLOCK_A, FULL_A, IS_RMS, NORM_BEFORE_GATE, SIGMOID, ROUND_NORM,
                ROUND_WEIGHT, HOIST, "evict_first", None, None, KEPT, dy_a, x_a,
                z_a, zero)  # fmt: skip
            if not NORM_BEFORE_GATE:
                dxhat_a, act_a, dz_a = again, act, dz
        _finish(xhat_a, dxhat_a, act_a, dz_a, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off,
                row_mask, col_start, N, BLOCK_A, FULL_A, IS_RMS, NORM_BEFORE_GATE)  # fmt: skip
        if BLOCK_B > 0:
            if RELOAD or KEPT:
                xhat_b, _, _, again, act, dz, _, _, _, _ = _read(
                    dy_ptr, dy_off + zero, x_ptr, x_off + zero, w_ptr, b_ptr, z_ptr, z_off + zero,
                    w_b, b_b, s_b if RELOAD else None, mean, rstd, row_mask, BLOCK_A,
                    WEIGHT_OFFSET, N, BLOCK_B, FULL, IS_RMS, NORM_BEFORE_GATE, SIGMOID, ROUND_NORM,
                    ROUND_WEIGHT, HOIST, "evict_first", None, None, KEPT, dy_b,
                    x_b, z_b, zero)  # fmt: skip
                if not NORM_BEFORE_GATE:
                    dxhat_b, act_b, dz_b = again, act, dz
            _finish(xhat_b, dxhat_b, act_b, dz_b, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off,
                    row_mask, BLOCK_A, N, BLOCK_B, FULL, IS_RMS, NORM_BEFORE_GATE)  # fmt: skip

    if dw_ptr is not None:
        _store_share(dw_ptr, dw_a, col_start, N, BLOCK_A)
        if BLOCK_B > 0:
            _store_share(dw_ptr, dw_b, BLOCK_A, N, BLOCK_B)
    if db_ptr is not None:
        _store_share(db_ptr, db_a, col_start, N, BLOCK_A)
        if BLOCK_B > 0:
            _store_share(db_ptr, db_b, BLOCK_A, N, BLOCK_B)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_sums_kernel(
    dy_ptr, x_ptr, w_ptr, z_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr,
    size1: tl.int64, size2: tl.int64,
    dy_s0: tl.int64, dy_s1: tl.int64, dy_s2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    WARPS: tl.constexpr, FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    LONG: tl.constexpr, IS_RMS: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    SIGMOID: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`c1` and `c2` `[rows, GROUPS]` of one wide row and group per program, chunk by chunk."""
    overlap_launches(PDL)
    # From the last row on: L2 then holds the first ones, with which the next kernel begins.
    pid = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    group = pid % GROUPS
    row = pid // GROUPS + tl.arange(0, 1)
    dy_off = row_offset(row, size1, size2, dy_s0, dy_s1, dy_s2, DIMS, ALIGN, LONG)
    x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
    z_off = x_off
    dy_ptr += group * N
    x_ptr += group * N
    if z_ptr is not None:
        z_ptr += group * N
        z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
    if w_ptr is not None:
        w_ptr += group * N
    rstd = load_rows(rstd_ptr + pid, tl.arange(0, 1), None)
    mean = rstd
    if not IS_RMS:
        mean = load_rows(mean_ptr + pid, tl.arange(0, 1), None)
    c1 = tl.zeros([1, BLOCK], tl.float32)
    c2 = tl.zeros([1, BLOCK], tl.float32)
    for col_start in range(0, N, BLOCK):
        xhat, _, _, dxhat, _, _, _, _, _, _ = _read(
            dy_ptr, dy_off, x_ptr, x_off, w_ptr, None, z_ptr, z_off, 0.0, 0.0, None, mean, rstd,
            None, col_start, WEIGHT_OFFSET, N, BLOCK, FULL, IS_RMS, NORM_BEFORE_GATE, SIGMOID,
            None, None, False, "")  # fmt: skip
        c1 += dxhat * xhat
        c2 += dxhat
    c1 = row_sum(c1, BLOCK, REPEATS, WARPS)
    tl.store(c1_ptr + pid + tl.arange(0, 1), mean_of(c1, N))
    if not IS_RMS:
        c2 = row_sum(c2, BLOCK, REPEATS, WARPS)
        tl.store(c2_ptr + pid + tl.arange(0, 1), mean_of(c2, N))


@triton.jit(do_not_specialize=["n_workers"])
def reduce_kernel(
    dw_part_ptr, db_part_ptr, dw_ptr, db_ptr, n_workers: tl.int64,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the workers' shares `[n_workers, D]` of `dw` and `db`, always in the same order."""
    overlap_launches(PDL)
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n_workers, ROWS):
        worker = start + tl.arange(0, ROWS)
        mask = (worker < n_workers)[:, None] & (col < D)[None, :]
        offset = worker[:, None] * D + col[None, :]
        if dw_ptr is not None:
            dw += tl.load(dw_part_ptr + offset, mask=mask, other=0.0)
        if db_ptr is not None:
            db += tl.load(db_part_ptr + offset, mask=mask, other=0.0)
    if dw_ptr is not None:
        tl.store(dw_ptr + col, tl.sum(dw, axis=0).to(dw_ptr.dtype.element_ty), mask=col < D)
    if db_ptr is not None:
        tl.store(db_ptr + col, tl.sum(db, axis=0).to(db_ptr.dtype.element_ty), mask=col < D)

"""The Triton kernels: one row formula, forward and backward.

A program owns a tile of `ROWS` rows of one norm group; the group's `N` channels lie in registers in
two pieces whose widths are powers of two (5120 = 4096 + 1024), so that few lanes idle. Wide groups
go in chunks: a first kernel (`sum_kernels.py`) leaves each row's sums in memory, and the same
forward and backward kernels, told so, need no sum of their own. `launch.py` picks tiles and starts
the kernels; what happens to a piece of a row is in `row_kernels.py`, with the names.
"""

import triton
import triton.language as tl

from .row_kernels import (
    UNSPECIALIZED,
    act_of,
    affine,
    centre,
    fetch,
    gated_input,
    load,
    load_parameters,
    load_rows,
    mean_of,
    overlap_launches,
    read,
    row_offset,
    rsqrt,
    sigmoid,
    store,
    sum_pieces,
    sum_pieces_twice,
    terms,
    warp_dots,
    warp_sums,
    widen,
)


@triton.jit
def _finish(u, z, rstd, w, b, y_ptr, y_off, live, first,
            HAS_W: tl.constexpr, HAS_B: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
            FULL: tl.constexpr, GATE_LAST: tl.constexpr, SIGMOID: tl.constexpr,
            ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr):  # fmt: skip
    """One piece from the centred value to the stored result."""
    _, h = affine(u * rstd[:, None], w, b, HAS_W, HAS_B, ROUND_NORM, ROUND_WEIGHT)
    if GATE_LAST:
        h = h * act_of(widen(z), SIGMOID)
    store(y_ptr, y_off, live, first, h, N, BLOCK, FULL)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    x_ptr, z_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr,
    n_rows: tl.int64, size1: tl.int64, size2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64,
    y_s0: tl.int64, y_s1: tl.int64, y_s2: tl.int64,
    eps: tl.float32,
    N: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, REPEATS_A: tl.constexpr, REPEATS_B: tl.constexpr,
    WARPS_A: tl.constexpr, WARPS_B: tl.constexpr,
    FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, LONG: tl.constexpr,
    IS_RMS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, ADD: tl.constexpr,
    ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr, STATS_GIVEN: tl.constexpr,
    HOIST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = (norm(x) * w + b) * act(z), or norm(x * act(z)) * w + b with GATE_FIRST.

    norm(u) = (u - mean(u)) * rstd, rstd = 1 / sqrt(mean((u - mean(u))^2) + eps), mean(u) = 0 for
    RMS. Mamba-2 (arXiv 2405.21060) gates first, Gated DeltaNet (arXiv 2412.06464) last.
    """
    GATE_LAST: tl.constexpr = z_ptr is not None and not GATE_FIRST
    HAS_W: tl.constexpr = w_ptr is not None
    HAS_B: tl.constexpr = b_ptr is not None
    FULL_A: tl.constexpr = FULL or BLOCK_B > 0
    overlap_launches(PDL)
    pid = tl.program_id(0)
    if LONG:
        pid = pid.to(tl.int64)
    column_tile = pid % (GROUPS * CHUNKS)
    row = pid // (GROUPS * CHUNKS) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows if ROWS > 1 else None
    group = column_tile // CHUNKS
    first = column_tile % CHUNKS * BLOCK_A
    stat = row.to(tl.int64) * GROUPS + group
    x_ptr += group * N
    y_ptr += group * N
    x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
    y_off = row_offset(row, size1, size2, y_s0, y_s1, y_s2, DIMS, ALIGN, LONG)
    z_off = x_off
    if z_ptr is not None:
        z_ptr += group * N
        z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
    if w_ptr is not None:
        w_ptr += group * N
    if b_ptr is not None:
        b_ptr += group * N

    u_a, z_a = gated_input(x_ptr, x_off, z_ptr, z_off, live, first, N, BLOCK_A, FULL_A,
                           GATE_FIRST, SIGMOID)  # fmt: skip
    if HOIST:
        w_a, b_a = load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
    if BLOCK_B > 0:
        if HOIST:
            w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
        u_b, z_b = gated_input(x_ptr, x_off, z_ptr, z_off, live, BLOCK_A, N, BLOCK_B, FULL,
                               GATE_FIRST, SIGMOID)  # fmt: skip
    if STATS_GIVEN:
        rstd = load_rows(rstd_ptr, stat, live)
        if not IS_RMS:
            u_a -= load_rows(mean_ptr, stat, live)[:, None]
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
                tl.store(mean_ptr + stat, mean, mask=live)
        sums_a = warp_dots(u_a, u_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
        sums_b = sums_a
        if BLOCK_B > 0:
            sums_b = warp_dots(u_b, u_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
        total = sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B)
        rstd = rsqrt(mean_of(total, N) + eps)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + stat, rstd, mask=live)
    if not HOIST:
        w_a, b_a = load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
    _finish(u_a, z_a, rstd, w_a, b_a, y_ptr, y_off, live, first, HAS_W, HAS_B, N, BLOCK_A, FULL_A,
            GATE_LAST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
    if BLOCK_B > 0:
        if not HOIST:
            w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
        _finish(u_b, z_b, rstd, w_b, b_b, y_ptr, y_off, live, BLOCK_A, HAS_W, HAS_B, N, BLOCK_B,
                FULL, GATE_LAST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip


@triton.jit
def _xhat(x_ptr, x_off, live, mean, rstd, first, N: tl.constexpr, BLOCK: tl.constexpr,
          FULL: tl.constexpr, IS_RMS: tl.constexpr):  # fmt: skip
    """One piece's `xhat` from memory once more, for a gate that comes last."""
    u = widen(load(x_ptr, x_off, live, first, N, BLOCK, FULL, "evict_first"))
    if not IS_RMS:
        u = centre(u, mean, first, N, BLOCK, FULL)
    return u * rstd[:, None]


@triton.jit
def _tail(xhat, dxhat, act, dz, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off, live, first,
          N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, IS_RMS: tl.constexpr,
          GATE_FIRST: tl.constexpr):  # fmt: skip
    """One piece after the row sums: `dx`, and `dz` of a gate that comes first."""
    if IS_RMS:
        du = tl.fma(xhat, -c1[:, None], dxhat) * rstd[:, None]
    else:
        du = tl.fma(dxhat, rstd[:, None], -(c2 * rstd)[:, None])
        du = tl.fma(xhat, -(c1 * rstd)[:, None], du)
    if GATE_FIRST:
        store(dz_ptr, dz_off, live, first, du * dz, N, BLOCK, FULL)
        du *= act
    store(dx_ptr, dx_off, live, first, du, N, BLOCK, FULL)


@triton.jit
def _store_partial(ptr, v, first, N: tl.constexpr, BLOCK: tl.constexpr):
    col = first + tl.arange(0, BLOCK)
    tl.store(ptr + col, tl.sum(v, axis=0), mask=col < N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    dy_ptr, x_ptr, z_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr,
    dx_ptr, dz_ptr, dw_ptr, db_ptr,
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
    IS_RMS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, ADD: tl.constexpr,
    ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr, SUMS_GIVEN: tl.constexpr,
    STAGES: tl.constexpr, HOIST: tl.constexpr, RELOAD: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """du = rstd * (dxhat - xhat * c1 - c2), c1 = mean(dxhat * xhat), c2 = mean(dxhat) (0 for RMS).

    Gate last: g = dy * act(z), dz = dy * (xhat * w + b) * act'(z), dx = du.
    Gate first: g = dy, dz = du * x * act'(z), dx = du * act(z).
    Both: dxhat = g * w; dw = sum of g * xhat, db = sum of g over the rows. Each of `n_workers`
    programs of a column tile walks over its share of the row tiles and leaves its sums in row
    `worker` of `dw_ptr`, `db_ptr` `[n_workers, D]`; `reduce_kernel` adds them up in that order.
    """
    FULL_A: tl.constexpr = FULL or BLOCK_B > 0
    D: tl.constexpr = N * GROUPS
    HAS_W: tl.constexpr = w_ptr is not None
    HAS_B: tl.constexpr = b_ptr is not None
    HAS_Z: tl.constexpr = z_ptr is not None
    KEEP: tl.constexpr = "evict_last" if RELOAD else ""
    overlap_launches(PDL)
    zero = (n_workers >> 40) * 16  # 0, which only the caller knows; divisible by any alignment
    pid = tl.program_id(0)
    if LONG or RELOAD:  # a wide row takes all registers, and with short counters some spill
        pid = pid.to(tl.int64)
    else:
        n_rows = n_rows.to(tl.int32)
        n_workers = n_workers.to(tl.int32)
    column_tile = pid % (GROUPS * CHUNKS)
    worker = pid // (GROUPS * CHUNKS)
    group = column_tile // CHUNKS
    first = column_tile % CHUNKS * BLOCK_A
    dy_ptr += group * N
    x_ptr += group * N
    dx_ptr += group * N
    if z_ptr is not None:
        z_ptr += group * N
        dz_ptr += group * N
    if w_ptr is not None:
        w_ptr += group * N
        dw_ptr += worker.to(tl.int64) * D + group * N
    if b_ptr is not None:
        b_ptr += group * N
        db_ptr += worker.to(tl.int64) * D + group * N

    dw_a = tl.zeros([ROWS, BLOCK_A], tl.float32)
    db_a = dw_a
    if HOIST:
        w_a, b_a = load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
    if BLOCK_B > 0:
        dw_b = tl.zeros([ROWS, BLOCK_B], tl.float32)
        db_b = dw_b
        if HOIST:
            w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
    for tile in tl.range(worker, tl.cdiv(n_rows, ROWS), n_workers, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = row < n_rows if ROWS > 1 else None
        stat = row.to(tl.int64) * GROUPS + group
        dy_off = row_offset(row, size1, size2, dy_s0, dy_s1, dy_s2, DIMS, ALIGN, LONG)
        x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
        dx_off = row_offset(row, size1, size2, dx_s0, dx_s1, dx_s2, DIMS, ALIGN, LONG)
        z_off = x_off
        dz_off = dx_off
        if z_ptr is not None:
            z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
            dz_off = row_offset(row, size1, size2, dz_s0, dz_s1, dz_s2, DIMS, ALIGN, LONG)
        rstd = load_rows(rstd_ptr, stat, live)
        mean = rstd
        if not IS_RMS:
            mean = load_rows(mean_ptr, stat, live)
        if AHEAD:  # tiles of one row
            later = tl.minimum(tile + n_workers, n_rows - 1)
            fetch(
                dy_ptr + row_offset(later, size1, size2, dy_s0, dy_s1, dy_s2, DIMS, ALIGN, LONG), N
            )
            fetch(x_ptr + row_offset(later, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG), N)
            if z_ptr is not None:
                fetch(
                    z_ptr + row_offset(later, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG), N
                )

        if not HOIST:
            w_a, b_a = load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
        dy_a, x_a, z_a = read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, live, first,
                              N, BLOCK_A, FULL_A, KEEP)  # fmt: skip
        s_a = sigmoid(widen(z_a))
        xhat_a, rounded, g, dxhat_a, act_a, dz_a = terms(
            dy_a, x_a, z_a, s_a, w_a, b_a, mean, rstd, first, HAS_Z, HAS_W, HAS_B, N, BLOCK_A,
            FULL_A, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
        if HAS_Z and not GATE_FIRST:
            store(dz_ptr, dz_off, live, first, dz_a, N, BLOCK_A, FULL_A)
        if HAS_W:
            dw_a = tl.fma(g, rounded, dw_a)
        if HAS_B:
            db_a += g
        if BLOCK_B > 0:
            if not HOIST:
                w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
            dy_b, x_b, z_b = read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, live, BLOCK_A,
                                  N, BLOCK_B, FULL, KEEP)  # fmt: skip
            s_b = sigmoid(widen(z_b))
            xhat_b, rounded, g, dxhat_b, act_b, dz_b = terms(
                dy_b, x_b, z_b, s_b, w_b, b_b, mean, rstd, BLOCK_A, HAS_Z, HAS_W, HAS_B, N, BLOCK_B,
                FULL, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
            if HAS_Z and not GATE_FIRST:
                store(dz_ptr, dz_off, live, BLOCK_A, dz_b, N, BLOCK_B, FULL)
            if HAS_W:
                dw_b = tl.fma(g, rounded, dw_b)
            if HAS_B:
                db_b += g
        c2 = rstd
        if SUMS_GIVEN:
            c1 = load_rows(c1_ptr, stat, live)
            if not IS_RMS:
                c2 = load_rows(c2_ptr, stat, live)
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
        if RELOAD and not GATE_FIRST:
            xhat_a = _xhat(x_ptr, x_off + zero, live, mean, rstd, first, N, BLOCK_A, FULL_A,
                           IS_RMS)  # fmt: skip
        if RELOAD and GATE_FIRST:
            dy_a, x_a, z_a = read(dy_ptr, dy_off + zero, x_ptr, x_off + zero, z_ptr, z_off + zero,
                                  live, first, N, BLOCK_A, FULL_A, "evict_first")  # fmt: skip
            if not HOIST:
                w_a, b_a = load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
            xhat_a, rounded, g, dxhat_a, act_a, dz_a = terms(
                dy_a, x_a, z_a, s_a, w_a, b_a, mean, rstd, first, HAS_Z, HAS_W, HAS_B, N, BLOCK_A,
                FULL_A, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
        _tail(xhat_a, dxhat_a, act_a, dz_a, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off, live,
              first, N, BLOCK_A, FULL_A, IS_RMS, GATE_FIRST)  # fmt: skip
        if BLOCK_B > 0:
            if RELOAD and not GATE_FIRST:
                xhat_b = _xhat(x_ptr, x_off + zero, live, mean, rstd, BLOCK_A, N, BLOCK_B, FULL,
                               IS_RMS)  # fmt: skip
            if RELOAD and GATE_FIRST:
                dy_b, x_b, z_b = read(dy_ptr, dy_off + zero, x_ptr, x_off + zero, z_ptr,
                                      z_off + zero, live, BLOCK_A, N, BLOCK_B, FULL,
                                      "evict_first")  # fmt: skip
                if not HOIST:
                    w_b, b_b = load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
                xhat_b, rounded, g, dxhat_b, act_b, dz_b = terms(
                    dy_b, x_b, z_b, s_b, w_b, b_b, mean, rstd, BLOCK_A, HAS_Z, HAS_W, HAS_B, N,
                    BLOCK_B, FULL, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM,
                    ROUND_WEIGHT)  # fmt: skip
            _tail(xhat_b, dxhat_b, act_b, dz_b, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off, live,
                  BLOCK_A, N, BLOCK_B, FULL, IS_RMS, GATE_FIRST)  # fmt: skip

    if w_ptr is not None:
        _store_partial(dw_ptr, dw_a, first, N, BLOCK_A)
        if BLOCK_B > 0:
            _store_partial(dw_ptr, dw_b, BLOCK_A, N, BLOCK_B)
    if b_ptr is not None:
        _store_partial(db_ptr, db_a, first, N, BLOCK_A)
        if BLOCK_B > 0:
            _store_partial(db_ptr, db_b, BLOCK_A, N, BLOCK_B)

"""The Triton kernels around the two of `kernels.py`: sums of wide rows, and of `dw` and `db`."""

import triton
import triton.language as tl

from .row_kernels import (
    UNSPECIALIZED,
    centre,
    gated_input,
    load_parameters,
    mean_of,
    overlap_launches,
    read,
    row_offset,
    row_sum,
    rsqrt,
    sigmoid,
    terms,
    widen,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_sums_kernel(
    x_ptr, z_ptr, mean_ptr, rstd_ptr, size1: tl.int64, size2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64, eps: tl.float32,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    WARPS: tl.constexpr, FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    IS_RMS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`mean` and `rstd` `[rows, GROUPS]` of one wide row and group per program, in chunks."""
    overlap_launches(PDL)
    pid = tl.program_id(0).to(tl.int64)
    group = pid % GROUPS
    row = pid // GROUPS + tl.arange(0, 1)
    x_off = row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN, LONG)
    z_off = x_off
    x_ptr += group * N
    if GATE_FIRST:
        z_ptr += group * N
        z_off = row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN, LONG)
    else:
        z_ptr = None
    mean = tl.zeros([1], tl.float32)
    if not IS_RMS:
        total = tl.zeros([1, BLOCK], tl.float32)
        for first in range(0, N, BLOCK):
            u, _ = gated_input(x_ptr, x_off, z_ptr, z_off, None, first, N, BLOCK, FULL,
                               GATE_FIRST, SIGMOID)  # fmt: skip
            total += u
        mean = mean_of(row_sum(total, BLOCK, REPEATS, WARPS), N)
        tl.store(mean_ptr + pid + tl.arange(0, 1), mean)
    total = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        u, _ = gated_input(x_ptr, x_off, z_ptr, z_off, None, first, N, BLOCK, FULL,
                           GATE_FIRST, SIGMOID)  # fmt: skip
        if not IS_RMS:
            u = centre(u, mean, first, N, BLOCK, FULL)
        total += u * u
    total = row_sum(total, BLOCK, REPEATS, WARPS)
    rstd = rsqrt(mean_of(total, N) + eps)
    tl.store(rstd_ptr + pid + tl.arange(0, 1), rstd)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_sums_kernel(
    dy_ptr, x_ptr, z_ptr, w_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr,
    size1: tl.int64, size2: tl.int64,
    dy_s0: tl.int64, dy_s1: tl.int64, dy_s2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    WARPS: tl.constexpr, FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    IS_RMS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`c1` and `c2` `[rows, GROUPS]` of one wide row and group per program, in chunks."""
    overlap_launches(PDL)
    pid = tl.program_id(0).to(tl.int64)
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
    rstd = tl.load(rstd_ptr + pid + tl.arange(0, 1))
    mean = rstd
    if not IS_RMS:
        mean = tl.load(mean_ptr + pid + tl.arange(0, 1))
    c1 = tl.zeros([1, BLOCK], tl.float32)
    c2 = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        w, b = load_parameters(w_ptr, None, first, ADD, N, BLOCK)
        dy, x, z = read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, None, first, N, BLOCK, FULL,
                        "")  # fmt: skip
        s = sigmoid(widen(z))
        xhat, _, _, dxhat, _, _ = terms(
            dy, x, z, s, w, b, mean, rstd, first, z_ptr is not None, w_ptr is not None, False, N,
            BLOCK, FULL, IS_RMS, GATE_FIRST, SIGMOID, None, None)  # fmt: skip
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
    """Add up `[n_workers, D]` partial sums of `dw` and `db`, always in the same order."""
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

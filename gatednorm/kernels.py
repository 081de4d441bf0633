"""The Triton kernels: one row formula, forward and backward.

A program owns a tile of `ROWS` rows of one norm group; the group's `N` channels lie in registers in
two pieces whose widths are powers of two (5120 = 4096 + 1024), so that few lanes idle. Wide groups
go in chunks: a first kernel leaves each row's sums in memory, and the same forward and backward
kernels, told so, need no sum of their own. `launch.py` picks tiles and starts the kernels.

Every sum over a row is a tree fixed by column numbers (`_row_sum`) and no multiply-add is fused
behind our back (`enable_fp_fusion=False`), so a row's bits do not depend on the layout that the
compiler picks for aligned or unaligned, whole or partial tiles.

Names: rows are addressed by up to three outer strides `*_s0, *_s1, *_s2`; `u` is what is
normalised, `xhat` the normalised value, `g` the gradient of `xhat * w + b`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = triton.knobs.runtime.interpret
NVIDIA = tl.constexpr(
    not INTERPRETED and torch.version.hip is None and getattr(torch.version, "xpu", None) is None
)


def hooked() -> bool:
    """Whether somebody, a profiler say, wants to be called at every launch."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)  # older Tritons hold a function


UNSPECIALIZED = [
    "n_rows", "size1", "size2", "n_workers", "x_s0", "x_s1", "x_s2", "z_s0", "z_s1", "z_s2",
    "y_s0", "y_s1", "y_s2", "dy_s0", "dy_s1", "dy_s2", "dx_s0", "dx_s1", "dx_s2",
    "dz_s0", "dz_s1", "dz_s2",
]  # fmt: skip


@triton.jit
def _overlap(PDL: tl.constexpr):
    """Let the next kernel be set up now, and wait until the one before has written its results.

    Programmatic dependent launch (NVIDIA, from compute capability 9.0 on) hides the launch latency
    of short kernels; nothing that another kernel writes may be read before this.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _warp_sums(
    v, ROWS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr
):
    """The first part of a row's sum: `v` `[ROWS, BLOCK]` to one sum a warp, `[ROWS, WARPS]`.

    The order is fixed by column numbers: first the `REPEATS` passes that the threads of a tile make
    over a row (in registers), then neighbours, pair by pair (registers, lanes). Each step adds two
    numbers, and a sum of two has one value, so the layout cannot change the result. `tl.sum` over
    more than two makes no such promise.
    """
    for i in tl.static_range(24):
        if (REPEATS >> i) > 1:
            v = tl.sum(tl.reshape(v, [ROWS, 2, BLOCK >> (i + 1)]), axis=1)
    for i in tl.static_range(24):
        if ((BLOCK // REPEATS) >> i) > WARPS:
            v = tl.sum(tl.reshape(v, [ROWS, (BLOCK // REPEATS) >> (i + 1), 2]), axis=2)
    return tl.reshape(v, [ROWS, WARPS])


@triton.jit
def _across_warps(v, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """The rest of it, `[ROWS, WARPS]` to `[ROWS]`, pair by pair. `tl.split` fetches the sums of all
    warps in one exchange, where a reduction would meet at a barrier for each step."""
    if WARPS > 1:
        left, right = tl.split(tl.reshape(v, [ROWS, WARPS // 2, 2]))
        v = left + right
    for i in tl.static_range(1, 6):
        if (WARPS >> i) > 1:
            v = tl.sum(tl.reshape(v, [ROWS, WARPS >> (i + 1), 2]), axis=2)
    return tl.reshape(v, [ROWS])


@triton.jit
def _sum_pieces(a, b, ROWS: tl.constexpr, WARPS_A: tl.constexpr, WARPS_B: tl.constexpr):
    """One number a row from the warps' sums of both pieces (`b` is unused where WARPS_B is 0)."""
    if WARPS_B == WARPS_A:
        a += b
    total = _across_warps(a, ROWS, WARPS_A)
    if WARPS_B > 0 and WARPS_B != WARPS_A:
        total += _across_warps(b, ROWS, WARPS_B)
    return total


@triton.jit
def _across_warps_twice(v, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """`[ROWS, WARPS, 2]` to `[ROWS, 2]`: two sums a row in one exchange."""
    for i in tl.static_range(6):
        if (WARPS >> i) > 1:
            v = tl.trans(tl.reshape(v, [ROWS, WARPS >> (i + 1), 2, 2]), 0, 1, 3, 2)
            left, right = tl.split(v)
            v = left + right
    return tl.reshape(v, [ROWS, 2])


@triton.jit
def _sum_pieces_twice(a, b, c, d, ROWS: tl.constexpr, WARPS_A: tl.constexpr, WARPS_B: tl.constexpr):
    """`_sum_pieces` of `a, b` and of `c, d` in one exchange."""
    first = tl.join(a, c)
    if WARPS_B == WARPS_A:
        first += tl.join(b, d)
    total = _across_warps_twice(first, ROWS, WARPS_A)
    if WARPS_B > 0 and WARPS_B != WARPS_A:
        total += _across_warps_twice(tl.join(b, d), ROWS, WARPS_B)
    return tl.split(total)


@triton.jit
def _row_sum(v, BLOCK: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr):
    """All of it for one row: `[1, BLOCK]` to `[1]`."""
    v = _warp_sums(v, 1, BLOCK, REPEATS, WARPS)
    return _sum_pieces(v, v, 1, WARPS, 0)


@triton.jit
def _mean(total, N: tl.constexpr):
    """`total / N`, rounded once; a product does it where `1 / N` is exact."""
    if N & (N - 1) == 0:
        return total * (1.0 / N)
    else:
        return tl.div_rn(total, N * 1.0)


@triton.jit
def _rsqrt(v):
    """`1 / sqrt(v)` to within an ulp: the hardware's estimate and one step of Newton's method."""
    r = tl.rsqrt(v)
    return tl.where((v > 0) & (v < float("inf")), r * tl.fma(-0.5 * v * r, r, 1.5), r)


@triton.jit
def _row_offset(row, size1, size2, s0, s1, s2, DIMS: tl.constexpr, ALIGN: tl.constexpr):
    """Offset in elements of each row; `ALIGN` divides every stride."""
    if DIMS == 1:
        offset = row.to(tl.int64) * s0
    elif DIMS == 2:
        offset = (row // size1).to(tl.int64) * s0 + (row % size1).to(tl.int64) * s1
    else:
        outer = row // size2
        offset = (outer // size1).to(tl.int64) * s0 + (outer % size1).to(tl.int64) * s1
        offset += (row % size2).to(tl.int64) * s2
    return tl.multiple_of(offset, ALIGN)


@triton.jit
def _load(ptr, offset, live, first, N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
          EVICT: tl.constexpr):  # fmt: skip
    """`[ROWS, BLOCK]` values of the columns from `first` on; 0 outside the rows and the group."""
    col = first + tl.arange(0, BLOCK)
    mask = live[:, None]
    if not FULL:
        mask = mask & (col < N)[None, :]
    ptr = ptr + offset[:, None] + col[None, :]
    return tl.load(ptr, mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def _store(ptr, offset, live, first, v, N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    col = first + tl.arange(0, BLOCK)
    mask = live[:, None]
    if not FULL:
        mask = mask & (col < N)[None, :]
    tl.store(ptr + offset[:, None] + col[None, :], v.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_parameters(w_ptr, b_ptr, first, ADD: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """`[1, BLOCK]` of the weight, plus `ADD`, and of the bias, in fp32; 0 for an absent one."""
    col = (first + tl.arange(0, BLOCK))[None, :]
    w = 0.0
    b = 0.0
    if w_ptr is not None:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
        if ADD != 0:
            w = w + ADD
    if b_ptr is not None:
        b = tl.load(b_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def _sigmoid(z):
    if NVIDIA:
        # The portable form spends four times the instructions on results below 2^-126.
        return tl.inline_asm_elementwise(
            """{
                .reg .f32 t;
                mul.f32 t, $1, 0fBFB8AA3B;
                ex2.approx.ftz.f32 t, t;
                add.f32 t, t, 0f3F800000;
                rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _act(z, SIGMOID: tl.constexpr):
    s = _sigmoid(z)
    return s if SIGMOID else z * s


@triton.jit
def _act_slope(z, SIGMOID: tl.constexpr):
    """`act(z)` and `d act / dz`."""
    s = _sigmoid(z)
    if SIGMOID:
        act = s
        slope = s * (1.0 - s)
    else:
        act = z * s
        slope = tl.fma(act, 1.0 - s, s)
    return act, slope


@triton.jit
def _centre(u, mean, first, N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """`u - mean`, and 0 outside the group, where the sums must not see the mean."""
    u = u - mean[:, None]
    if not FULL:
        u = tl.where((first + tl.arange(0, BLOCK) < N)[None, :], u, 0.0)
    return u


@triton.jit
def _affine(xhat, w, b, HAS_W: tl.constexpr, HAS_B: tl.constexpr,
            ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr):  # fmt: skip
    """`xhat` with its rounding point, and `xhat * w + b` with its own."""
    if ROUND_NORM is not None:
        xhat = xhat.to(ROUND_NORM).to(tl.float32)
    h = xhat
    if HAS_W:
        h = h * w
        if ROUND_WEIGHT is not None:
            h = h.to(ROUND_WEIGHT).to(tl.float32)
    if HAS_B:
        h = h + b
    return xhat, h


@triton.jit
def _gated_input(x_ptr, x_off, z_ptr, z_off, live, first, N: tl.constexpr, BLOCK: tl.constexpr,
                 FULL: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr):  # fmt: skip
    """What is normalised, and the gate as loaded: `x` or `x * act(z)`, and `z`."""
    u = _load(x_ptr, x_off, live, first, N, BLOCK, FULL, "")
    z = u
    if z_ptr is not None:
        z = _load(z_ptr, z_off, live, first, N, BLOCK, FULL, "")
    u = u.to(tl.float32)
    if GATE_FIRST:
        u = u * _act(z.to(tl.float32), SIGMOID)
    return u, z


@triton.jit
def _finish(u, z, rstd, w, b, y_ptr, y_off, live, first,
            HAS_W: tl.constexpr, HAS_B: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
            FULL: tl.constexpr, GATE_LAST: tl.constexpr, SIGMOID: tl.constexpr,
            ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr):  # fmt: skip
    """One piece from the centred value to the stored result."""
    _, h = _affine(u * rstd[:, None], w, b, HAS_W, HAS_B, ROUND_NORM, ROUND_WEIGHT)
    if GATE_LAST:
        h = h * _act(z.to(tl.float32), SIGMOID)
    _store(y_ptr, y_off, live, first, h, N, BLOCK, FULL)


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
    _overlap(PDL)
    pid = tl.program_id(0).to(tl.int64)
    column_tile = pid % (GROUPS * CHUNKS)
    row = pid // (GROUPS * CHUNKS) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    if not LONG:
        row = row.to(tl.int32)
        size1 = size1.to(tl.int32)
        size2 = size2.to(tl.int32)
    group = column_tile // CHUNKS
    first = (column_tile % CHUNKS).to(tl.int32) * BLOCK_A
    stat = row.to(tl.int64) * GROUPS + group
    x_ptr += group * N
    y_ptr += group * N
    x_off = _row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN)
    y_off = _row_offset(row, size1, size2, y_s0, y_s1, y_s2, DIMS, ALIGN)
    z_off = x_off
    if z_ptr is not None:
        z_ptr += group * N
        z_off = _row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN)
    if w_ptr is not None:
        w_ptr += group * N
    if b_ptr is not None:
        b_ptr += group * N

    u_a, z_a = _gated_input(x_ptr, x_off, z_ptr, z_off, live, first, N, BLOCK_A, FULL_A,
                            GATE_FIRST, SIGMOID)  # fmt: skip
    if HOIST:
        w_a, b_a = _load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
    if BLOCK_B > 0:
        if HOIST:
            w_b, b_b = _load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
        u_b, z_b = _gated_input(x_ptr, x_off, z_ptr, z_off, live, BLOCK_A, N, BLOCK_B, FULL,
                                GATE_FIRST, SIGMOID)  # fmt: skip
    if STATS_GIVEN:
        rstd = tl.load(rstd_ptr + stat, mask=live, other=0.0)
        if not IS_RMS:
            u_a -= tl.load(mean_ptr + stat, mask=live, other=0.0)[:, None]
    else:
        if not IS_RMS:
            sums_a = _warp_sums(u_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
            sums_b = sums_a
            if BLOCK_B > 0:
                sums_b = _warp_sums(u_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
            mean = _mean(_sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B), N)
            u_a = _centre(u_a, mean, 0, N, BLOCK_A, FULL_A)
            if BLOCK_B > 0:
                u_b = _centre(u_b, mean, BLOCK_A, N, BLOCK_B, FULL)
            if mean_ptr is not None:
                tl.store(mean_ptr + stat, mean, mask=live)
        sums_a = _warp_sums(u_a * u_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
        sums_b = sums_a
        if BLOCK_B > 0:
            sums_b = _warp_sums(u_b * u_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
        total = _sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B)
        rstd = _rsqrt(_mean(total, N) + eps)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + stat, rstd, mask=live)
    if not HOIST:
        w_a, b_a = _load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
    _finish(u_a, z_a, rstd, w_a, b_a, y_ptr, y_off, live, first, HAS_W, HAS_B, N, BLOCK_A, FULL_A,
            GATE_LAST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
    if BLOCK_B > 0:
        if not HOIST:
            w_b, b_b = _load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
        _finish(u_b, z_b, rstd, w_b, b_b, y_ptr, y_off, live, BLOCK_A, HAS_W, HAS_B, N, BLOCK_B,
                FULL, GATE_LAST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip


@triton.jit
def _read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, live, first, N: tl.constexpr,
          BLOCK: tl.constexpr, FULL: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """`dy`, `x`, `z` of one piece as they lie in memory; without a gate `z` is `x`."""
    dy = _load(dy_ptr, dy_off, live, first, N, BLOCK, FULL, EVICT)
    x = _load(x_ptr, x_off, live, first, N, BLOCK, FULL, EVICT)
    z = x
    if z_ptr is not None:
        z = _load(z_ptr, z_off, live, first, N, BLOCK, FULL, EVICT)
    return dy, x, z


@triton.jit
def _terms(dy, x, z, w, b, mean, rstd, first, HAS_Z: tl.constexpr, HAS_W: tl.constexpr,
           HAS_B: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
           IS_RMS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr,
           ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr):  # fmt: skip
    """One piece: `xhat`, its rounded value, `g`, `dxhat`, `act(z)`, and `dz`: the whole of it for a
    gate that comes last, its factor `x * act'(z)` for a gate that comes first."""
    g = dy.to(tl.float32)
    u = x.to(tl.float32)
    act = u
    dz = u
    if HAS_Z:
        act, slope = _act_slope(z.to(tl.float32), SIGMOID)
        if GATE_FIRST:
            dz = u * slope
            u = u * act
    if not IS_RMS:
        u = _centre(u, mean, first, N, BLOCK, FULL)
    xhat = u * rstd[:, None]
    rounded, h = _affine(xhat, w, b, HAS_W, HAS_B, ROUND_NORM, ROUND_WEIGHT)
    if HAS_Z and not GATE_FIRST:
        dz = g * h * slope
        g = g * act
    dxhat = g
    if HAS_W:
        dxhat = g * w
    return xhat, rounded, g, dxhat, act, dz


@triton.jit
def _tail(xhat, dxhat, act, dz, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off, live, first,
          N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, IS_RMS: tl.constexpr,
          GATE_FIRST: tl.constexpr):  # fmt: skip
    """One piece after the row sums: `dx`, and `dz` of a gate that comes first."""
    du = tl.fma(xhat, -c1[:, None], dxhat)
    if not IS_RMS:
        du -= c2[:, None]
    du *= rstd[:, None]
    if GATE_FIRST:
        _store(dz_ptr, dz_off, live, first, du * dz, N, BLOCK, FULL)
        du *= act
    _store(dx_ptr, dx_off, live, first, du, N, BLOCK, FULL)


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
    STAGES: tl.constexpr, HOIST: tl.constexpr, RELOAD: tl.constexpr, PDL: tl.constexpr,
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
    _overlap(PDL)
    zero = (n_workers >> 40) * 16  # 0, which only the caller knows; divisible by any alignment
    pid = tl.program_id(0).to(tl.int64)
    column_tile = pid % (GROUPS * CHUNKS)
    worker = pid // (GROUPS * CHUNKS)
    group = column_tile // CHUNKS
    first = (column_tile % CHUNKS).to(tl.int32) * BLOCK_A
    dy_ptr += group * N
    x_ptr += group * N
    dx_ptr += group * N
    if z_ptr is not None:
        z_ptr += group * N
        dz_ptr += group * N
    if w_ptr is not None:
        w_ptr += group * N
        dw_ptr += worker * D + group * N
    if b_ptr is not None:
        b_ptr += group * N
        db_ptr += worker * D + group * N
    if not LONG:
        size1 = size1.to(tl.int32)
        size2 = size2.to(tl.int32)

    dw_a = tl.zeros([ROWS, BLOCK_A], tl.float32)
    db_a = dw_a
    if HOIST:
        w_a, b_a = _load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
    if BLOCK_B > 0:
        dw_b = tl.zeros([ROWS, BLOCK_B], tl.float32)
        db_b = dw_b
        if HOIST:
            w_b, b_b = _load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
    for tile in tl.range(worker, tl.cdiv(n_rows, ROWS), n_workers, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        live = row < n_rows
        stat = row * GROUPS + group
        if not LONG:
            row = row.to(tl.int32)
        dy_off = _row_offset(row, size1, size2, dy_s0, dy_s1, dy_s2, DIMS, ALIGN)
        x_off = _row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN)
        dx_off = _row_offset(row, size1, size2, dx_s0, dx_s1, dx_s2, DIMS, ALIGN)
        z_off = x_off
        dz_off = dx_off
        if z_ptr is not None:
            z_off = _row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN)
            dz_off = _row_offset(row, size1, size2, dz_s0, dz_s1, dz_s2, DIMS, ALIGN)
        rstd = tl.load(rstd_ptr + stat, mask=live, other=0.0)
        mean = rstd
        if not IS_RMS:
            mean = tl.load(mean_ptr + stat, mask=live, other=0.0)

        if not HOIST:
            w_a, b_a = _load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
        dy_a, x_a, z_a = _read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, live, first,
                               N, BLOCK_A, FULL_A, KEEP)  # fmt: skip
        xhat_a, rounded, g, dxhat_a, act_a, dz_a = _terms(
            dy_a, x_a, z_a, w_a, b_a, mean, rstd, first, HAS_Z, HAS_W, HAS_B, N, BLOCK_A, FULL_A,
            IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
        if HAS_Z and not GATE_FIRST:
            _store(dz_ptr, dz_off, live, first, dz_a, N, BLOCK_A, FULL_A)
        if HAS_W:
            dw_a = tl.fma(g, rounded, dw_a)
        if HAS_B:
            db_a += g
        if BLOCK_B > 0:
            if not HOIST:
                w_b, b_b = _load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
            dy_b, x_b, z_b = _read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, live, BLOCK_A,
                                   N, BLOCK_B, FULL, KEEP)  # fmt: skip
            xhat_b, rounded, g, dxhat_b, act_b, dz_b = _terms(
                dy_b, x_b, z_b, w_b, b_b, mean, rstd, BLOCK_A, HAS_Z, HAS_W, HAS_B, N, BLOCK_B,
                FULL, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
            if HAS_Z and not GATE_FIRST:
                _store(dz_ptr, dz_off, live, BLOCK_A, dz_b, N, BLOCK_B, FULL)
            if HAS_W:
                dw_b = tl.fma(g, rounded, dw_b)
            if HAS_B:
                db_b += g
        c2 = rstd
        if SUMS_GIVEN:
            c1 = tl.load(c1_ptr + stat, mask=live, other=0.0)
            if not IS_RMS:
                c2 = tl.load(c2_ptr + stat, mask=live, other=0.0)
        else:
            sums_a = _warp_sums(dxhat_a * xhat_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
            sums_b = sums_a
            if BLOCK_B > 0:
                sums_b = _warp_sums(dxhat_b * xhat_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
            if IS_RMS:
                c1 = _sum_pieces(sums_a, sums_b, ROWS, WARPS_A, WARPS_B)
            else:
                plain_a = _warp_sums(dxhat_a, ROWS, BLOCK_A, REPEATS_A, WARPS_A)
                plain_b = plain_a
                if BLOCK_B > 0:
                    plain_b = _warp_sums(dxhat_b, ROWS, BLOCK_B, REPEATS_B, WARPS_B)
                c1, c2 = _sum_pieces_twice(
                    sums_a, sums_b, plain_a, plain_b, ROWS, WARPS_A, WARPS_B)  # fmt: skip
                c2 = _mean(c2, N)
            c1 = _mean(c1, N)
        if RELOAD:
            dy_a, x_a, z_a = _read(dy_ptr, dy_off + zero, x_ptr, x_off + zero, z_ptr, z_off + zero,
                                   live, first, N, BLOCK_A, FULL_A, "evict_first")  # fmt: skip
            if not HOIST:
                w_a, b_a = _load_parameters(w_ptr, b_ptr, first, ADD, N, BLOCK_A)
            xhat_a, rounded, g, dxhat_a, act_a, dz_a = _terms(
                dy_a, x_a, z_a, w_a, b_a, mean, rstd, first, HAS_Z, HAS_W, HAS_B, N, BLOCK_A,
                FULL_A, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
        _tail(xhat_a, dxhat_a, act_a, dz_a, rstd, c1, c2, dx_ptr, dx_off, dz_ptr, dz_off, live,
              first, N, BLOCK_A, FULL_A, IS_RMS, GATE_FIRST)  # fmt: skip
        if BLOCK_B > 0:
            if RELOAD:
                dy_b, x_b, z_b = _read(dy_ptr, dy_off + zero, x_ptr, x_off + zero, z_ptr,
                                       z_off + zero, live, BLOCK_A, N, BLOCK_B, FULL,
                                       "evict_first")  # fmt: skip
                if not HOIST:
                    w_b, b_b = _load_parameters(w_ptr, b_ptr, BLOCK_A, ADD, N, BLOCK_B)
                xhat_b, rounded, g, dxhat_b, act_b, dz_b = _terms(
                    dy_b, x_b, z_b, w_b, b_b, mean, rstd, BLOCK_A, HAS_Z, HAS_W, HAS_B, N, BLOCK_B,
                    FULL, IS_RMS, GATE_FIRST, SIGMOID, ROUND_NORM, ROUND_WEIGHT)  # fmt: skip
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_sums_kernel(
    x_ptr, z_ptr, mean_ptr, rstd_ptr, n_rows: tl.int64, size1: tl.int64, size2: tl.int64,
    x_s0: tl.int64, x_s1: tl.int64, x_s2: tl.int64,
    z_s0: tl.int64, z_s1: tl.int64, z_s2: tl.int64, eps: tl.float32,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    WARPS: tl.constexpr, FULL: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    IS_RMS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`mean` and `rstd` `[rows, GROUPS]` of one wide row and group per program, in chunks."""
    _overlap(PDL)
    pid = tl.program_id(0).to(tl.int64)
    group = pid % GROUPS
    row = pid // GROUPS + tl.arange(0, 1)
    live = row < n_rows
    if not LONG:
        row = row.to(tl.int32)
        size1 = size1.to(tl.int32)
        size2 = size2.to(tl.int32)
    x_off = _row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN)
    z_off = x_off
    x_ptr += group * N
    if GATE_FIRST:
        z_ptr += group * N
        z_off = _row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN)
    else:
        z_ptr = None
    mean = tl.zeros([1], tl.float32)
    if not IS_RMS:
        total = tl.zeros([1, BLOCK], tl.float32)
        for first in range(0, N, BLOCK):
            u, _ = _gated_input(x_ptr, x_off, z_ptr, z_off, live, first, N, BLOCK, FULL,
                                GATE_FIRST, SIGMOID)  # fmt: skip
            total += u
        mean = _mean(_row_sum(total, BLOCK, REPEATS, WARPS), N)
        tl.store(mean_ptr + pid + tl.arange(0, 1), mean)
    total = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        u, _ = _gated_input(x_ptr, x_off, z_ptr, z_off, live, first, N, BLOCK, FULL,
                            GATE_FIRST, SIGMOID)  # fmt: skip
        if not IS_RMS:
            u = _centre(u, mean, first, N, BLOCK, FULL)
        total += u * u
    total = _row_sum(total, BLOCK, REPEATS, WARPS)
    rstd = _rsqrt(_mean(total, N) + eps)
    tl.store(rstd_ptr + pid + tl.arange(0, 1), rstd)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_sums_kernel(
    dy_ptr, x_ptr, z_ptr, w_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr,
    n_rows: tl.int64, size1: tl.int64, size2: tl.int64,
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
    _overlap(PDL)
    pid = tl.program_id(0).to(tl.int64)
    group = pid % GROUPS
    row = pid // GROUPS + tl.arange(0, 1)
    live = row < n_rows
    if not LONG:
        row = row.to(tl.int32)
        size1 = size1.to(tl.int32)
        size2 = size2.to(tl.int32)
    dy_off = _row_offset(row, size1, size2, dy_s0, dy_s1, dy_s2, DIMS, ALIGN)
    x_off = _row_offset(row, size1, size2, x_s0, x_s1, x_s2, DIMS, ALIGN)
    z_off = x_off
    dy_ptr += group * N
    x_ptr += group * N
    if z_ptr is not None:
        z_ptr += group * N
        z_off = _row_offset(row, size1, size2, z_s0, z_s1, z_s2, DIMS, ALIGN)
    if w_ptr is not None:
        w_ptr += group * N
    rstd = tl.load(rstd_ptr + pid + tl.arange(0, 1))
    mean = rstd
    if not IS_RMS:
        mean = tl.load(mean_ptr + pid + tl.arange(0, 1))
    c1 = tl.zeros([1, BLOCK], tl.float32)
    c2 = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        w, b = _load_parameters(w_ptr, None, first, ADD, N, BLOCK)
        dy, x, z = _read(dy_ptr, dy_off, x_ptr, x_off, z_ptr, z_off, live, first, N, BLOCK, FULL,
                         "")  # fmt: skip
        xhat, _, _, dxhat, _, _ = _terms(
            dy, x, z, w, b, mean, rstd, first, z_ptr is not None, w_ptr is not None, False, N,
            BLOCK, FULL, IS_RMS, GATE_FIRST, SIGMOID, None, None)  # fmt: skip
        c1 += dxhat * xhat
        c2 += dxhat
    c1 = _row_sum(c1, BLOCK, REPEATS, WARPS)
    tl.store(c1_ptr + pid + tl.arange(0, 1), _mean(c1, N))
    if not IS_RMS:
        c2 = _row_sum(c2, BLOCK, REPEATS, WARPS)
        tl.store(c2_ptr + pid + tl.arange(0, 1), _mean(c2, N))


@triton.jit(do_not_specialize=["n_workers"])
def reduce_kernel(
    dw_part_ptr, db_part_ptr, dw_ptr, db_ptr, n_workers: tl.int64,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up `[n_workers, D]` partial sums of `dw` and `db`, always in the same order."""
    _overlap(PDL)
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

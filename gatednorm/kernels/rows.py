"""What the kernels do with a piece of some rows: sums, loads and stores, gate, norm, affine.

Every sum over a row has an order fixed by column numbers (`warp_sums`, `warp_dots`), and the
compiler may not fuse multiply-adds (`enable_fp_fusion=False`). So a row's bits do not depend on the
layout that it picks for aligned or unaligned, whole or partial tiles.

Names: rows are addressed by up to three outer strides `*_s0, *_s1, *_s2`; a piece begins at column
`col_start` of its group, and `row_mask` says which rows of a tile exist (None: all). `u` is what is
normalised, `xhat` the normalised value, `g` the gradient of `xhat * w + b`. Without a gate
NORM_BEFORE_GATE is True.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
NVIDIA = tl.constexpr(
    not INTERPRETED and torch.version.hip is None and getattr(torch.version, "xpu", None) is None
)

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Triton would compile another variant where a size is 1 or divisible by 16.
UNSPECIALIZED = [
    "n_rows", "size1", "size2", "n_workers", "x_s0", "x_s1", "x_s2", "z_s0", "z_s1",
    "z_s2", "y_s0", "y_s1", "y_s2", "dy_s0", "dy_s1", "dy_s2", "dx_s0", "dx_s1", "dx_s2",
    "dz_s0", "dz_s1", "dz_s2",
]  # fmt: skip


@triton.jit
def overlap_launches(PDL: tl.constexpr):
    """Let the next kernel be set up now, and wait until the one before has written its results.

    Programmatic dependent launch (NVIDIA, from compute capability 9.0 on) hides the launch latency
    of short kernels; nothing that another kernel writes may be read before this.
    """
    if PDL:  # Triton 3.4 has functions for these that it cannot call
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def warp_sums(
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
def _halves(v, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second half of each `COLUMNS` neighbours; a thread has both, so nothing
    moves."""
    v = tl.reshape(v, [ROWS, BLOCK // COLUMNS, 2, COLUMNS // 2])
    left, right = tl.split(tl.trans(v, 0, 1, 3, 2))
    return tl.reshape(left, [ROWS, BLOCK // 2]), tl.reshape(right, [ROWS, BLOCK // 2])


@triton.jit
def _chain_of_2(a, b, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`total` (or None) plus the products of each two neighbours, one multiply-add each."""
    a_left, a_right = _halves(a, ROWS, BLOCK, 2)
    b_left, b_right = _halves(b, ROWS, BLOCK, 2)
    total = a_left * b_left if total is None else tl.fma(a_left, b_left, total)
    return tl.fma(a_right, b_right, total)


@triton.jit
def _chain_of_4(a, b, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of each four neighbours."""
    a_left, a_right = _halves(a, ROWS, BLOCK, 4)
    b_left, b_right = _halves(b, ROWS, BLOCK, 4)
    total = _chain_of_2(a_left, b_left, total, ROWS, BLOCK // 2)
    return _chain_of_2(a_right, b_right, total, ROWS, BLOCK // 2)


@triton.jit
def _chain_of_8(a, b, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of each eight. (A recursion over the length would never end in Triton 3.4.)"""
    a_left, a_right = _halves(a, ROWS, BLOCK, 8)
    b_left, b_right = _halves(b, ROWS, BLOCK, 8)
    total = _chain_of_4(a_left, b_left, None, ROWS, BLOCK // 2)
    return _chain_of_4(a_right, b_right, total, ROWS, BLOCK // 2)


@triton.jit
def warp_dots(
    a, b, ROWS: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr
):
    """`warp_sums(a * b)` of `a`, `b` `[ROWS, BLOCK]`, to `[ROWS, WARPS]`; first the columns that a
    thread has side by side, in a chain."""
    # Of the columns of a warp, a thread has 1/32. A tile of several rows gives each thread 8.
    LANES: tl.constexpr = 32 if ROWS == 1 else 1
    SHARE: tl.constexpr = BLOCK // (REPEATS * WARPS * LANES)
    COLUMNS: tl.constexpr = 8 if SHARE > 8 else (SHARE if SHARE > 0 else 1)
    if COLUMNS == 8:
        v = _chain_of_8(a, b, ROWS, BLOCK)
    elif COLUMNS == 4:
        v = _chain_of_4(a, b, None, ROWS, BLOCK)
    elif COLUMNS == 2:
        v = _chain_of_2(a, b, None, ROWS, BLOCK)
    else:
        v = a * b
    return warp_sums(v, ROWS, BLOCK // COLUMNS, REPEATS, WARPS)


@triton.jit
def across_warps(v, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """The second part of a row's sum, `[ROWS, WARPS]` to `[ROWS]`, pair by pair.

    `tl.split` fetches the sums of all warps in one exchange, where a reduction would meet at a
    barrier for each step.
    """
    if WARPS > 1:
        left, right = tl.split(tl.reshape(v, [ROWS, WARPS // 2, 2]))
        v = left + right
    for i in tl.static_range(1, 6):
        if (WARPS >> i) > 1:
            v = tl.sum(tl.reshape(v, [ROWS, WARPS >> (i + 1), 2]), axis=2)
    return tl.reshape(v, [ROWS])


@triton.jit
def sum_pieces(a, b, ROWS: tl.constexpr, WARPS_A: tl.constexpr, WARPS_B: tl.constexpr):
    """One number a row from the warps' sums of both pieces (`b` is unused where WARPS_B is 0)."""
    if WARPS_B == WARPS_A:
        a += b
    total = across_warps(a, ROWS, WARPS_A)
    if WARPS_B > 0 and WARPS_B != WARPS_A:
        total += across_warps(b, ROWS, WARPS_B)
    return total


@triton.jit
def across_warps_twice(v, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """`[ROWS, WARPS, 2]` to `[ROWS, 2]`: two sums a row in one exchange."""
    for i in tl.static_range(6):
        if (WARPS >> i) > 1:
            v = tl.trans(tl.reshape(v, [ROWS, WARPS >> (i + 1), 2, 2]), 0, 1, 3, 2)
            left, right = tl.split(v)
            v = left + right
    return tl.reshape(v, [ROWS, 2])


@triton.jit
def sum_pieces_twice(a, b, c, d, ROWS: tl.constexpr, WARPS_A: tl.constexpr, WARPS_B: tl.constexpr):
    """`sum_pieces` of `a, b` and of `c, d` in one exchange."""
    first = tl.join(a, c)
    if WARPS_B == WARPS_A:
        first += tl.join(b, d)
    total = across_warps_twice(first, ROWS, WARPS_A)
    if WARPS_B > 0 and WARPS_B != WARPS_A:
        total += across_warps_twice(tl.join(b, d), ROWS, WARPS_B)
    return tl.split(total)


@triton.jit
def row_sum(v, BLOCK: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr):
    """The whole sum of one row: `[1, BLOCK]` to `[1]`."""
    v = warp_sums(v, 1, BLOCK, REPEATS, WARPS)
    return sum_pieces(v, v, 1, WARPS, 0)


@triton.jit
def mean_of(total, N: tl.constexpr):
    """`total / N`: a product where `1 / N` is exact; elsewhere the remainder, divided likewise, is
    added to it.

    A division itself is a branch and a dozen instructions, which the whole row waits for.
    """
    mean = total * (1.0 / N)
    if N & (N - 1) != 0:
        left = tl.fma(mean, -1.0 * N, total)  # NaN for an infinite total
        mean = tl.where(left == left, tl.fma(left, 1.0 / N, mean), mean)
    return mean


@triton.jit
def rsqrt(v):
    """`1 / sqrt(v)` to within an ulp: the hardware's estimate and one step of Newton's method."""
    r = tl.rsqrt(v)
    return tl.where((v > 0) & (v < float("inf")), r * tl.fma(-0.5 * v * r, r, 1.5), r)


@triton.jit
def row_offset(row, size1, size2, s0, s1, s2, DIMS: tl.constexpr, ALIGN: tl.constexpr,
               LONG: tl.constexpr):  # fmt: skip
    """Offset in elements of each row; `ALIGN` divides every stride. Rows have 64 bits if `LONG`."""
    if not LONG:  # unsigned: a product with 64 bits is an instruction shorter
        row = row.to(tl.uint32)
        size1 = size1.to(tl.uint32)
        size2 = size2.to(tl.uint32)
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
def _inside(row_mask, col, N: tl.constexpr, FULL: tl.constexpr):
    """Which values of a tile exist, where not all do; `row_mask` is None where all rows do."""
    if row_mask is None:
        return (col < N)[None, :]
    elif FULL:
        return row_mask[:, None]
    else:
        return row_mask[:, None] & (col < N)[None, :]


@triton.jit
def load_rows(ptr, index, row_mask):
    """One fp32 number for each row of a tile."""
    if row_mask is None:
        return tl.load(ptr + index)
    else:
        return tl.load(ptr + index, mask=row_mask, other=0.0)


@triton.jit
def load(ptr, offset, row_mask, col_start, N: tl.constexpr, BLOCK: tl.constexpr,
         FULL: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """`[ROWS, BLOCK]` values of the columns from `col_start` on; 0 outside of rows and group."""
    col = col_start + tl.arange(0, BLOCK)
    ptr = ptr + offset[:, None] + col[None, :]
    if row_mask is None and FULL:
        return tl.load(ptr, eviction_policy=EVICT)
    else:
        return tl.load(ptr, mask=_inside(row_mask, col, N, FULL), other=0.0, eviction_policy=EVICT)


@triton.jit
def fetch(ptr, row, size1, size2, s0, s1, s2, N: tl.constexpr, DIMS: tl.constexpr,
          ALIGN: tl.constexpr, LONG: tl.constexpr):  # fmt: skip
    """Bring `N` values of a row into the L2 cache, by one thread (NVIDIA, from compute capability
    9.0 on)."""
    ptr += row_offset(row, size1, size2, s0, s1, s2, DIMS, ALIGN, LONG)
    BYTES: tl.constexpr = N * ptr.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        """{
            .reg .pred leader;
            .reg .b32 tid;
            .reg .b64 start;
            mov.u32 tid, %tid.x;
            setp.eq.u32 leader, tid, 0;
            and.b64 start, $1, -16;
            @leader cp.async.bulk.prefetch.L2.global [start], $2;
            mov.u32 $0, 0;
        }""",
        "=r,l,r", [ptr.to(tl.int64), BYTES], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def store(ptr, offset, row_mask, col_start, v, N: tl.constexpr, BLOCK: tl.constexpr,
          FULL: tl.constexpr):  # fmt: skip
    col = col_start + tl.arange(0, BLOCK)
    v = v.to(ptr.dtype.element_ty)
    ptr = ptr + offset[:, None] + col[None, :]
    if row_mask is None and FULL:
        tl.store(ptr, v)
    else:
        tl.store(ptr, v, mask=_inside(row_mask, col, N, FULL))


@triton.jit
def to_fp32(v):
    """To fp32: two instructions for a pair of bf16, where the compiler takes three."""
    if NVIDIA and v.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r", [v], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return v.to(tl.float32)


@triton.jit
def hidden(v, zero):
    """`v`, of 16 bits, as a value that the compiler does not know to be the same."""
    if NVIDIA:
        zero = tl.broadcast_to(zero.to(tl.int32), v.shape)
        return tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2; // $3",
            "=r,r,r,r", [v, zero], dtype=v.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return v


@triton.jit
def load_parameters(w_ptr, b_ptr, col_start, WEIGHT_OFFSET: tl.constexpr, N: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """`[1, BLOCK]` of the weight, plus `WEIGHT_OFFSET`, and of the bias, in fp32; 0 where there is
    none."""
    col = (col_start + tl.arange(0, BLOCK))[None, :]
    w = 0.0
    b = 0.0
    if w_ptr is not None:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
        if WEIGHT_OFFSET != 0:
            w = w + WEIGHT_OFFSET
    if b_ptr is not None:
        b = tl.load(b_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def sigmoid(z):
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
def closed(z, s):
    """`1 - s` for `s = sigmoid(z)`, with all its digits where the gate is nearly open. To be
    multiplied by `s`: where `s` is 0, this is 0 instead of 1."""
    if NVIDIA:
        # exp(-z) * s; the exponential is the one that `sigmoid` has computed.
        return tl.inline_asm_elementwise(
            """{
                .reg .f32 t;
                mul.f32 t, $1, 0fBFB8AA3B;
                ex2.approx.ftz.f32 t, t;
                min.f32 t, t, 0f7E800000;
                mul.f32 $0, t, $2;
            }""",
            "=f,f,f", [z, s], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return sigmoid(-z)


@triton.jit
def act_of(z, SIGMOID: tl.constexpr):
    s = sigmoid(z)
    return s if SIGMOID else z * s


@triton.jit
def act_slope(z, s, SIGMOID: tl.constexpr):
    """`act(z)` and `d act / dz` from `s = sigmoid(z)`."""
    if SIGMOID:
        act = s
        slope = s * closed(z, s)
    else:
        act = z * s
        slope = tl.fma(act, 1.0 - s, s)
    return act, slope


@triton.jit
def centre(u, mean, col_start, N: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """`u - mean`, and 0 outside the group, where the sums must not see the mean."""
    u = u - mean[:, None]
    if not FULL:
        u = tl.where((col_start + tl.arange(0, BLOCK) < N)[None, :], u, 0.0)
    return u


@triton.jit
def affine(xhat, w, b, HAS_W: tl.constexpr, HAS_B: tl.constexpr,
           ROUND_NORM: tl.constexpr, ROUND_WEIGHT: tl.constexpr):  # fmt: skip
    """`xhat` with its rounding point, and `xhat * w + b` with its own."""
    if ROUND_NORM is not None:
        xhat = to_fp32(xhat.to(ROUND_NORM))
    h = xhat
    if HAS_W and HAS_B and ROUND_WEIGHT is None:
        h = tl.fma(h, w, b)
    else:
        if HAS_W:
            h = h * w
            if ROUND_WEIGHT is not None:
                h = to_fp32(h.to(ROUND_WEIGHT))
        if HAS_B:
            h = h + b
    return xhat, h


@triton.jit
def gated_input(x_ptr, x_off, z_ptr, z_off, row_mask, col_start, N: tl.constexpr,
                BLOCK: tl.constexpr, FULL: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
                SIGMOID: tl.constexpr):  # fmt: skip
    """What is normalised, `x` or `x * act(z)`, and `z` as it was loaded (`x` without a gate)."""
    u = load(x_ptr, x_off, row_mask, col_start, N, BLOCK, FULL, "")
    z = u
    if z_ptr is not None:
        z = load(z_ptr, z_off, row_mask, col_start, N, BLOCK, FULL, "")
    u = to_fp32(u)
    if not NORM_BEFORE_GATE:
        u = u * act_of(to_fp32(z), SIGMOID)
    return u, z

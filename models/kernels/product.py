"""Products and running sums for the exact mode: one tile for every number of rows and of matrices,
and no sum that is split between programs, so that a row's bits follow from that row alone.

Shape letters: X matrices, I rows, J summed channels, K columns, C chunk size, R rows of sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(a, b, bias, y, I, J, K, sax, sai, saj, sbx, sbj, sbk,
             HAS_BIAS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """y = a b + bias, one tile of one matrix, summed over J in order."""
    columns = tl.cdiv(K, BK)
    x = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) // columns).to(tl.int64) * BI + tl.arange(0, BI)
    k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    j = tl.arange(0, BJ)
    rows = a + x * sax + i[:, None] * sai + j[None, :] * saj
    cols = b + x * sbx + j[:, None] * sbj + k[None, :].to(tl.int64) * sbk
    total = tl.zeros((BI, BK), tl.float32)
    for start in range(0, J, BJ):
        left = tl.load(rows, mask=(i < I)[:, None] & (j < J - start)[None, :], other=0.0)
        right = tl.load(cols, mask=(j < J - start)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        rows += BJ * saj
        cols += BJ * sbj
    if HAS_BIAS:
        total += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    place = (x * I + i[:, None]) * K + k[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(i < I)[:, None] & (k < K)[None, :])


# By the bytes of an element, for any number of rows: the tile, and how it is computed.
TILES = {
    2: ({"BI": 128, "BJ": 64, "BK": 128}, {"num_warps": 8, "num_stages": 3}),
    4: ({"BI": 64, "BJ": 32, "BK": 64}, {"num_warps": 4}),
}


def _launch(a, b, bias, y, tile, **options) -> None:
    count, rows, columns = y.shape
    grid = (triton.cdiv(rows, tile["BI"]) * triton.cdiv(columns, tile["BK"]), count)
    _product[grid](
        a, b, bias, y, rows, a.shape[2], columns, *a.stride(), *b.stride(),
        HAS_BIAS=bias is not None, **tile, **options,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [I, J] times weight [K, J], plus bias [K] or None: [I, K] in the dtype of x."""
    y = x.new_empty(1, len(x), len(weight))
    tile, options = TILES[x.element_size()]
    _launch(x[None], weight.T[None], bias, y, tile, **options)
    return y[0]


def bmm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [X, I, J] times b [X, J, K] in ``dtype``; the tile follows from I, J and K."""
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=dtype)
    sizes = zip(("BI", "BJ", "BK"), (*a.shape[1:], b.shape[2]), strict=True)
    most = 64 if a.element_size() == 2 else 32
    _launch(a, b, None, y, {n: max(16, min(most, triton.next_power_of_2(s))) for n, s in sizes})
    return y


@triton.jit
def _sums(x, y, R, C, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    ok = (r < R)[:, None] & (c < C)[None, :]
    value = tl.load(x + r[:, None] * C + c[None, :], mask=ok, other=0.0)
    total = tl.cumsum(value.to(y.dtype.element_ty), axis=1)
    tl.store(y + r[:, None] * C + c[None, :], total, mask=ok)


def running_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.cumsum(-1)`` in ``dtype``: [..., C] contiguous."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = x.shape[-1]
    rows = x.numel() // size
    _sums[(triton.cdiv(rows, 16),)](x, y, rows, size, BR=16, BC=triton.next_power_of_2(size))
    return y

"""Linear layers of the exact mode: one tile for every number of rows, and no sum that is split
between programs, so that a row's bits follow from that row alone.

Shape letters: I rows, J summed channels, K columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from models.kernels import on_its_device
from models.kernels.precision import PRECISION


@triton.jit
def _product(a, b, bias, y, I, J, K, sai, saj, sbj, sbk, syi, HAS_BIAS: tl.constexpr,
             BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y = a b + bias, one tile, summed over J in order."""
    columns = tl.cdiv(K, BK)
    i = (tl.program_id(0) // columns).to(tl.int64) * BI + tl.arange(0, BI)
    k = tl.program_id(0) % columns * BK + tl.arange(0, BK)
    j = tl.arange(0, BJ)
    rows = a + i[:, None] * sai + j[None, :] * saj
    cols = b + j[:, None] * sbj + k[None, :].to(tl.int64) * sbk
    total = tl.zeros((BI, BK), tl.float32)
    for start in range(0, J, BJ):
        left = tl.load(rows, mask=(i < I)[:, None] & (j < J - start)[None, :], other=0.0)
        right = tl.load(cols, mask=(j < J - start)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        rows += BJ * saj
        cols += BJ * sbj
    if HAS_BIAS:
        total += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    place = i[:, None] * syi + k[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(i < I)[:, None] & (k < K)[None, :])


# By the bytes of an element, for any number of rows: the tile, and how it is computed.
TILES = {
    2: ({"BI": 128, "BJ": 64, "BK": 128}, {"num_warps": 8, "num_stages": 3}),
    4: ({"BI": 64, "BJ": 32, "BK": 64}, {"num_warps": 4}),
}


@on_its_device
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, multiple: int) -> Tensor:
    """x [I, J] times weight [K, J], plus bias [K] or None: [I, K] in the dtype of x, where a row
    takes the place of a multiple of so many columns."""
    (rows, channels), columns = x.shape, len(weight)
    y = x.new_empty(rows, columns + -columns % multiple)[:, :columns]
    bias = None if bias is None else bias.contiguous()
    tile, options = TILES[x.element_size()]
    _product[(triton.cdiv(rows, tile["BI"]) * triton.cdiv(columns, tile["BK"]),)](
        x, weight.T, bias, y, rows, channels, columns, *x.stride(), *weight.T.stride(),
        y.stride(0), HAS_BIAS=bias is not None, **tile, **options,
    )  # fmt: skip
    return y

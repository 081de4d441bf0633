"""What several ranks know of a row, to what all of them know. Names: rows.py."""

import triton
import triton.language as tl

from .rows import mean_of, overlap_launches, rsqrt


@triton.jit
def _over_ranks(v, RANKS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of `[PLACES, BLOCK]` over the first dimension, in which zeros follow the ranks;
    neighbours are added up pair by pair."""
    for i in tl.static_range(24):
        if (PLACES >> i) > 1:
            v = tl.sum(tl.reshape(v, [PLACES >> (i + 1), 2, BLOCK]), axis=1)
    return mean_of(tl.reshape(v, [BLOCK]), RANKS)


@triton.jit(do_not_specialize=["n_rows"])
def combine_kernel(
    parts_ptr, first_ptr, second_ptr, n_rows: tl.int64, eps: tl.float32,
    RANKS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The means over ranks of `parts` `[ranks, 1 or 2, rows]`; or, if STATISTICS,

    first = rstd = 1 / sqrt(mean(square + (mean_of_rank - mean)^2) + eps), second = mean,

    where a rank's `square` is about its own mean, and RMS norm has no means.
    """
    overlap_launches(PDL)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, PLACES)[:, None]
    inside = (rank < RANKS) & (row < n_rows)[None, :]
    if second_ptr is None:
        place = rank * n_rows + row[None, :]
    else:
        place = rank * (2 * n_rows) + row[None, :]
    first = tl.load(parts_ptr + place, mask=inside, other=0.0)
    first = _over_ranks(first, RANKS, PLACES, BLOCK)
    if second_ptr is not None:
        of_ranks = tl.load(parts_ptr + n_rows + place, mask=inside, other=0.0)
        second = _over_ranks(of_ranks, RANKS, PLACES, BLOCK)
        tl.store(second_ptr + row, second, mask=row < n_rows)
        if STATISTICS:
            apart = tl.where(inside, of_ranks - second[None, :], 0.0)
            first += _over_ranks(apart * apart, RANKS, PLACES, BLOCK)
    if STATISTICS:
        first = rsqrt(first + eps)
    tl.store(first_ptr + row, first, mask=row < n_rows)

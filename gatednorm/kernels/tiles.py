"""Which program owns which rows: tables by architecture, width and options.

Tiles follow from the width of a group and the options alone, never from the number of rows, so that
a row's bits do not depend on the rows around it. To tune for another GPU, add an entry to `TABLES`;
benchmarks/NOTES.md says what was measured where.
"""

from typing import Any, Literal, NamedTuple

WIDEST = 16384  # a wider group goes in chunks
CHUNK = 4096


class Tile(NamedTuple):
    """A program's share: `rows` rows of `block_a + block_b` columns; `chunks` of them a group.

    Attributes:
        num_warps: of 32 threads.
        stages: depth of the backward's load pipeline.
        workers_per_sm: programs of the backward on a multiprocessor.
        hoist: read the parameters early and keep them in registers.
        reload: compute a row's terms again after its sums instead of keeping them, from the row in
            "memory" or in "registers" (there from 16-bit inputs alone, as half as many registers).
        ahead: fetch the next row into the L2 cache.
        maxnreg: registers a thread at most; None for the compiler's choice.
    """

    rows: int
    block_a: int
    block_b: int
    chunks: int
    num_warps: int
    stages: int = 1
    workers_per_sm: int = 0
    hoist: bool = True
    reload: Literal["", "memory", "registers"] = ""
    ahead: bool = False
    maxnreg: int | None = None

    def sum_layout(self) -> dict[str, int]:
        """How a row's sum runs: 8 columns a thread, warps side by side, then repeated.

        A row that has the tile to itself is spread over all warps, if need be with fewer columns.
        """
        layout = {}
        for piece, block in (("A", self.block_a), ("B", self.block_b)):
            warps = max(1, min(self.num_warps, block // (32 if self.rows == 1 else 256)))
            layout[f"WARPS_{piece}"] = warps if block else 0
            layout[f"REPEATS_{piece}"] = max(1, block // (256 * self.num_warps))
        return layout


class Rule(NamedTuple):
    """The tile of groups of up to `upto` columns, for calls with (True) or without (False) a bias,
    a norm before the gate, and `packed` inputs; None for both. The first rule of a table that fits
    holds. Packed are inputs of 16 bits, and in a backward rows in units of 16 bytes too: others
    need more registers for values, addresses and masks.

    `columns` a program make a tile of `columns / block_a` rows, `max_rows` at most; by default one.
    """

    upto: int
    num_warps: int
    tile: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    bias: bool | None = None
    norm_before_gate: bool | None = None
    packed: bool | None = None
    columns: int = 1
    max_rows: int = 128


SPILLS = {"hoist": False, "maxnreg": 64}
WIDE = {"workers_per_sm": 1, "reload": "memory", **SPILLS}
KEPT = {**WIDE, "reload": "registers", "ahead": True}

HOPPER_FORWARD = (
    Rule(32, 4, columns=2048),
    Rule(128, 2, bias=True, columns=2048, max_rows=16),
    Rule(128, 4, columns=2048),
    Rule(768, 2, columns=1024),
    Rule(3072, 4),
    Rule(6144, 8),
    Rule(8192, 16, SPILLS, bias=True),
    Rule(8192, 16, {"hoist": False, "maxnreg": 40}),
    Rule(12288, 16, SPILLS),
    Rule(WIDEST, 32, {"hoist": False, "maxnreg": 32}, False, norm_before_gate=False, packed=True),
    Rule(WIDEST, 16, SPILLS),
)
HOPPER_BACKWARD = (
    Rule(128, 8, {"stages": 3, "workers_per_sm": 2}, columns=2048, max_rows=64),
    # One row: Triton computes a tile of two in two layouts, so twice.
    Rule(256, 1, {"stages": 4, "workers_per_sm": 8}),
    Rule(768, 2, {"stages": 3, "workers_per_sm": 6}),
    # Rows that do not fill the tile, whose masked loads are slow in the pipeline.
    Rule(1023, 4, {"stages": 3, "workers_per_sm": 6, "ahead": True, "maxnreg": 80}, packed=True),
    Rule(1023, 4, {"stages": 3, "workers_per_sm": 3}),
    Rule(1024, 4, {"stages": 3, "workers_per_sm": 4, "maxnreg": 128}),
    Rule(1536, 4, {"stages": 3, "workers_per_sm": 3, "maxnreg": 112}, packed=True),
    Rule(1536, 4, {"stages": 3, "workers_per_sm": 3}),
    Rule(2048, 4, {"stages": 3, "workers_per_sm": 2, "maxnreg": 128}, packed=True),
    Rule(2048, 4, {"stages": 3, "workers_per_sm": 2}),
    # Half the workers, so half of the partial sums of dw and db.
    Rule(3072, 8, {"stages": 4, "workers_per_sm": 1, "maxnreg": 128}, bias=True, packed=True),
    Rule(3072, 8, {"stages": 4, "workers_per_sm": 1}, bias=True),
    Rule(3072, 4, {"stages": 3, "workers_per_sm": 2}),
    Rule(4096, 8, {"stages": 2, "workers_per_sm": 2, "ahead": True}),
    Rule(4608, 16, {"stages": 3, "workers_per_sm": 1}),
    Rule(5120, 8, {"stages": 3, "workers_per_sm": 1}),
    Rule(6144, 16, {"stages": 3, "workers_per_sm": 1}),
    Rule(8192, 16, {"stages": 3, "workers_per_sm": 1, "ahead": True}),
    Rule(12288, 32, {**WIDE, "ahead": True}, bias=True),
    Rule(12288, 32, KEPT, norm_before_gate=True),
    Rule(12288, 32, {**WIDE, "hoist": True, "ahead": True}),
    Rule(WIDEST, 32, WIDE, norm_before_gate=True),
    Rule(WIDEST, 32, KEPT, norm_before_gate=False),
)
# What a forward that writes FP8 from packed inputs has instead, by bias, scaling, gate order and
# columns: registers and warps with which more programs fit on a multiprocessor.
HOPPER_FP8: dict[tuple[bool, str | None, bool, int], dict[str, Any]] = {
    (False, "1x128", True, 4096): {"num_warps": 4, "maxnreg": 64, "hoist": False},
    (False, "rowwise", True, 4096): {"maxnreg": 48},
    (False, "tensorwise", True, 4096): {"maxnreg": 64},
    (False, "1x128", True, 8192): {"num_warps": 8, "maxnreg": 64},
    (False, "rowwise", True, 8192): {"num_warps": 8, "maxnreg": 64},
    (False, "rowwise", False, 8192): {"maxnreg": 32},
    (True, "1x128", True, 4096): {"num_warps": 4, "maxnreg": 64},
    (True, "1x128", True, 8192): {"num_warps": 8, "maxnreg": 80},
    (True, "rowwise", False, 8192): {"maxnreg": 40},
}
# By NVIDIA's major compute capability: H100 and H200 are 9. A GPU that is not here, also of another
# vendor, takes Hopper's, as far as its memory and its warps allow (launch.py). The last rules of
# a table must reach WIDEST.
TABLES = {9: (HOPPER_FORWARD, HOPPER_BACKWARD, HOPPER_FP8)}
DEFAULT = TABLES[9]


def forward_tile(
    n: int, bias: bool, norm_before_gate: bool, architecture: int = 9, packed: bool = True
) -> Tile:
    """The forward's tile for groups of `n` columns."""
    if n > WIDEST:
        return sums_tile(n)
    return _tile(TABLES.get(architecture, DEFAULT)[0], n, bias, norm_before_gate, packed)


def fp8_tile(
    tile: Tile, bias: bool, norm_before_gate: bool, scaling: str | None, architecture: int = 9
) -> Tile:
    """The same for packed inputs and a result in FP8, `None` for another. Sums must keep the order
    of the tile that is given, for the bits of the forward in 32 bits."""
    if tile.chunks > 1:
        return tile
    key = (bias, scaling, norm_before_gate, tile.block_a + tile.block_b)
    return tile._replace(**TABLES.get(architecture, DEFAULT)[2].get(key, {}))


def backward_tile(
    n: int, bias: bool, norm_before_gate: bool, architecture: int = 9, packed: bool = True
) -> Tile:
    """The backward's tile for groups of `n` columns."""
    if n > WIDEST:
        return sums_tile(n)._replace(workers_per_sm=2)
    return _tile(TABLES.get(architecture, DEFAULT)[1], n, bias, norm_before_gate, packed)


def sums_tile(n: int) -> Tile:
    """The chunks in which the sums of a wide row run, or of a row's part in this process."""
    block = min(CHUNK, _power_of_2_from(n))
    return Tile(1, block, 0, -(-n // block), max(1, min(8, block // 256)))


def _tile(
    table: tuple[Rule, ...], n: int, bias: bool, norm_before_gate: bool, packed: bool
) -> Tile:
    rule = next(
        rule
        for rule in table
        if n <= rule.upto
        and rule.bias in (None, bias)
        and rule.norm_before_gate in (None, norm_before_gate)
        and rule.packed in (None, packed)
    )
    a, b = _pieces(n)
    rows = max(1, min(rule.max_rows, rule.columns // a))
    return Tile(rows, a, b, 1, rule.num_warps, **rule.tile)


def _pieces(n: int) -> tuple[int, int]:
    """Two powers of two that cover `n` columns; the second is 0 where one covers them as well."""
    one = _power_of_2_from(n)
    if n > 12288:  # in one piece some registers spill
        return one // 2, one // 2
    if n == one or n < 512:
        return one, 0
    two = _power_of_2_from(n - one // 2)
    return (one, 0) if two == one // 2 else (one // 2, two)


def reduce_tile(width: int, workers: int) -> tuple[int, int, int]:
    """Workers a step, columns and warps of the kernel that adds up `dw` and `db`."""
    # All workers in one step, where it can be: each step waits for the memory.
    block = 16 if width >= 8192 else 8
    return min(2048, _power_of_2_from(workers)), block, 16 if workers > 512 else 8


def _power_of_2_from(n: int) -> int:
    return 1 << (n - 1).bit_length()

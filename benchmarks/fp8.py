"""FP8: the norm's output and the projection after it, against their ceiling and their peers.

    python -m benchmarks.fp8             # a table, results/fp8.csv and fp8.png; an H100 or H200
    python -m benchmarks.fp8 --draw benchmarks/results/fp8.csv       # the picture alone

"output": GPU time of a forward, 16-bit inputs, five bytes an element. The ceiling is the best
elementwise kernel that reads two such tensors and writes one of FP8 (for `nvfp4` too, which writes
half of that). `apart` is `rms_norm_gated` and `quantize_fp8_ref` compiled by torch.compile, which
writes and reads the result in bf16 between them; `compiled` is torch.compile of the equation and
the quantising as one. Peers of the cases in `PEERS`, while `--seconds` lasts. Groups of 64
channels, heads with one scale a row, and `nvfp4` take a second kernel. "pair": forward and backward
of norm and projection, `apart` and `together` in bf16 against `precision="fp8"`, and
flash-linear-attention where it is installed (benchmarks/linear.py).
"""

import csv
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import linear, report
from gatednorm import gated_norm_ref, quantize_fp8_ref, rms_norm_gated, rms_norm_gated_fp8
from gatednorm.bench.timing import ceiling, graph_time
from gatednorm.kernels.ceilings import forward_ways

WIDTHS = ((16384, 4096), (8192, 8192), (4096, 16384))
SCALINGS = ("1x128", "rowwise", "tensorwise")


class Case(NamedTuple):
    """A forward; `layer_norm` with a bias and a sigmoid, `strided` with z in a wider row."""

    tokens: int
    width: int
    norm_before_gate: bool
    scaling: str = "1x128"
    heads: int = 1
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    layer_norm: bool = False
    strided: bool = False

    def options(self) -> str:
        said = {
            "fp16": self.dtype == torch.float16,
            "layer norm, bias, sigmoid": self.layer_norm,
            "z strided": self.strided,
        }
        return ", ".join(name for name, holds in said.items() if holds)


CASES = (
    *(
        Case(*shape, after, scaling)
        for shape in WIDTHS
        for after in (True, False)
        for scaling in SCALINGS
    ),
    Case(8192, 128, True, heads=32),
    Case(8192, 128, True, "tensorwise", heads=32),
    Case(8192, 128, True, "rowwise", heads=32),
    Case(8192, 8192, False, group_size=1024),
    Case(8192, 8192, False, "rowwise", group_size=1024),
    Case(16384, 5120, False),
    Case(16384, 64, True, heads=64),
    Case(65536, 1024, True),
    Case(32768, 2048, False),
    Case(5461, 12288, True),
    Case(5461, 12288, False, "rowwise"),
    Case(16384, 4096, True, dtype=torch.float16),
    Case(16384, 4096, False, strided=True),
    Case(16384, 4096, True, layer_norm=True),
    Case(8192, 8192, False, "rowwise", layer_norm=True),
    Case(16384, 4096, True, "mxfp8"),
    Case(16384, 4096, False, "mxfp8"),
    Case(16384, 4096, True, "nvfp4"),
)

PEERS = [
    case
    for case in CASES
    if case.scaling in SCALINGS and not case.options()
    if case.heads > 1 or case.group_size or case[:2] == WIDTHS[0]
]


def output(case: Case, peers: bool, device: str = "cuda") -> dict:
    """A row of the table."""
    tokens, width, heads, scaling = case.tokens, case.width, case.heads, case.scaling
    shape = (tokens, heads, width) if heads > 1 else (tokens, width)
    wider = (*shape[:-1], 2 * width + 256 if case.strided else width)
    x, packed = (torch.randn(s, device=device, dtype=case.dtype) for s in (shape, wider))
    z, w = packed[..., :width], torch.randn(width, device=device)
    b = torch.randn(width, device=device) if case.layer_norm else None
    scale = torch.tensor(0.02, device=device) if scaling in ("tensorwise", "nvfp4") else None
    options = {"group_size": case.group_size, "norm_before_gate": case.norm_before_gate}
    if case.layer_norm:
        options |= {"is_rms_norm": False, "activation": "sigmoid"}

    def quantize(y):
        return quantize_fp8_ref(y.view(tokens, -1).float(), scaling, scale)

    def ours():
        return rms_norm_gated_fp8(
            x, w, b, z, **options, scaling=scaling, scale=scale, heads=heads > 1
        )

    y = ours()[0] if scaling != "nvfp4" else torch.empty_like(x, dtype=torch.float8_e4m3fn)
    flat = (t.view(tokens, -1) if t.is_contiguous() else t for t in (x, z, y))
    floor, fp8 = ceiling(forward_ways(*flat)), graph_time(ours)
    row = {
        "what": "output",
        "case": f"{tokens} x {f'{heads} x ' if heads > 1 else ''}{width}",
        "groups": width // (case.group_size or width),
        "gate": "after" if case.norm_before_gate else "before",
        "scaling": scaling,
        "options": case.options(),
        "ceiling_us": round(floor, 1),
        "ours_us": round(fp8, 1),
        "ratio": round(fp8 / floor, 3),
    }
    if not peers:
        return row
    torch.compiler.reset()
    alone = torch.compile(quantize, dynamic=False)
    whole = torch.compile(
        lambda x, z: quantize(gated_norm_ref(x, w, b, z, **options, out_dtype=torch.float32)),
        dynamic=False,
    )
    calls = {
        "apart": lambda: alone(rms_norm_gated(x, w, b, z, **options)),
        "compiled": lambda: whole(x, z),
    }
    times = {name: graph_time(call) for name, call in calls.items()}
    row |= {f"{name}_us": round(us, 1) for name, us in times.items()}
    return row | {"faster": round(min(times.values()) / fp8, 2)}


def pair(*case) -> dict:
    """A row of the table, of one of linear.py."""
    found = linear.measure(*case)
    row = {"what": "pair", **{name: found[name] for name in ("case", "gate")}}
    row |= {"ours_us": found.get("FP8_us", ""), "apart_us": found["apart_us"]}
    row |= {"together_us": found["together_us"], "fla_us": found.get("FLA_us", "")}
    return row | {"faster": found.get("FP8_faster", "")}


def draw(table: Path) -> None:
    """Time over the ceiling of each case in a CSV, as a PNG beside it, and a Markdown table."""
    import matplotlib.pyplot as plt

    with table.open() as file:
        rows = list(csv.DictReader(file))
    columns = [
        *("case", "groups", "gate", "scaling", "options"),
        *("ratio", "apart_us", "ours_us", "faster"),
    ]
    for line in (columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)):
        print("|", " | ".join(line), "|")
    rows = [row for row in rows if row["what"] == "output"][::-1]
    labels = [
        f"{row['case']}, {row['scaling']}, gate {row['gate']}"
        + (f", {row['groups']} groups" if row["groups"] != "1" else "")
        + (f", {row['options']}" if row["options"] else "")
        for row in rows
    ]
    figure, axis = plt.subplots(figsize=(8, 0.25 * len(rows) + 1))
    for name, marker in (("ours", "o"), ("apart", "x"), ("compiled", "+")):
        column = f"{name}_us"
        points = [(i, row) for i, row in enumerate(rows) if row.get(column)]
        over = [float(row[column]) / float(row["ceiling_us"]) for _, row in points]
        axis.plot(over, [i for i, _ in points], marker, label=name)
    axis.axvline(1.1, color="grey", linewidth=0.8, linestyle="--")  # the aim
    axis.set(xlabel="time over that of the ceiling")
    axis.set_yticks(range(len(rows)), labels, size=7)
    axis.legend()
    figure.savefig(table.with_suffix(".png"), dpi=120, bbox_inches="tight")


def main() -> None:
    parser = report.parser(__doc__, "fp8.csv")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=180, help="after which no peer is timed")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="the picture alone, from this one")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw)
        return
    run = report.about(args.device, *linear.PEERS)
    rows, begin = [pair(*case) for case in linear.CASES], time.perf_counter()
    for case in CASES:
        peers = case in PEERS and time.perf_counter() - begin < args.seconds
        rows.append(output(case, peers, args.device))
        print(*rows[-1].values(), flush=True)
        report.write(args.out, rows, run)  # what there is, should the next one fail
    for what in ("output", "pair"):
        some = [row for row in rows if row["what"] == what]
        names = dict.fromkeys(name for row in some for name in row)
        report.show([{name: row.get(name, "") for name in names} for row in some])
    draw(args.out)


if __name__ == "__main__":
    main()

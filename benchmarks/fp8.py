"""FP8: the norm's output and the projection after it, against their ceiling and their peers.

    python -m benchmarks.fp8             # a table, results/fp8.csv and fp8.png; an H100 or H200
    python -m benchmarks.fp8 --draw benchmarks/results/fp8.csv       # the picture alone

"output": GPU time of a forward, bf16 inputs, five bytes an element. The ceiling is the best
elementwise kernel that reads two tensors of bf16 and writes one of FP8. `apart` is `rms_norm_gated`
and `quantize_fp8_ref` compiled by torch.compile, which writes and reads the result in bf16 between
them; `compiled` is torch.compile of the equation and the quantising as one. Peers of the cases in
`PEERS`, while `--seconds` lasts. Groups of 64 channels, and heads with one scale a row, take a
second kernel. "pair": forward and backward of norm and projection, `apart` and `together` in bf16
against `precision="fp8"`, and flash-linear-attention where it is installed (benchmarks/linear.py).
"""

import csv
import time
from pathlib import Path

import torch

from benchmarks import linear, report
from gatednorm import gated_norm_ref, quantize_fp8_ref, rms_norm_gated, rms_norm_gated_fp8
from gatednorm.bench.timing import ceiling, graph_time
from gatednorm.kernels.ceilings import forward_ways

# tokens, heads, width, group_size, norm_before_gate, scaling
CASES = (
    *(
        (tokens, 1, width, None, after, scaling)
        for tokens, width in ((16384, 4096), (8192, 8192), (4096, 16384))
        for after in (True, False)
        for scaling in ("1x128", "rowwise", "tensorwise")
    ),
    (8192, 32, 128, None, True, "1x128"),
    (8192, 32, 128, None, True, "tensorwise"),
    (8192, 32, 128, None, True, "rowwise"),
    (8192, 1, 8192, 1024, False, "1x128"),
    (8192, 1, 8192, 1024, False, "rowwise"),
    (16384, 1, 5120, None, False, "1x128"),
    (16384, 64, 64, None, True, "1x128"),
)


PEERS = [case for case in CASES if case[1] > 1 or case[3] or case[:3] == (16384, 1, 4096)]


def output(
    tokens: int, heads: int, width: int, group_size: int | None, norm_before_gate: bool,
    scaling: str, peers: bool, device: str = "cuda",
) -> dict:  # fmt: skip
    """A row of the table."""
    shape = (tokens, heads, width) if heads > 1 else (tokens, width)
    x, z = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    w = torch.randn(width, device=device)
    scale = torch.tensor(0.02, device=device) if scaling == "tensorwise" else None
    options = {"group_size": group_size, "norm_before_gate": norm_before_gate}

    def quantize(y):
        return quantize_fp8_ref(y.view(tokens, -1).float(), scaling, scale)

    def ours():
        return rms_norm_gated_fp8(
            x, w, None, z, **options, scaling=scaling, scale=scale, heads=heads > 1
        )

    flat = (x.view(tokens, -1), z.view(tokens, -1), ours()[0].view(tokens, -1))
    floor, fp8 = ceiling(forward_ways(*flat)), graph_time(ours)
    row = {
        "what": "output",
        "case": f"{tokens} x {f'{heads} x ' if heads > 1 else ''}{width}",
        "groups": width // (group_size or width),
        "gate": "after" if norm_before_gate else "before",
        "scaling": scaling,
        "ceiling_us": round(floor, 1),
        "ours_us": round(fp8, 1),
        "ratio": round(fp8 / floor, 3),
    }
    if not peers:
        return row
    torch.compiler.reset()
    alone = torch.compile(quantize, dynamic=False)
    whole = torch.compile(
        lambda x, z: quantize(gated_norm_ref(x, w, None, z, **options, out_dtype=torch.float32)),
        dynamic=False,
    )
    calls = {
        "apart": lambda: alone(rms_norm_gated(x, w, None, z, **options)),
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
    columns = ("case", "groups", "gate", "scaling", "ratio", "apart_us", "ours_us", "faster")
    for line in (columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)):
        print("|", " | ".join(line), "|")
    rows = [row for row in rows if row["what"] == "output"][::-1]
    labels = [
        f"{row['case']}, {row['scaling']}, gate {row['gate']}"
        + (f", {row['groups']} groups" if row["groups"] != "1" else "")
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
    run, begin = report.about(args.device, *linear.PEERS), time.perf_counter()
    rows = [pair(*case) for case in linear.CASES]
    for case in CASES:
        peers = case in PEERS and time.perf_counter() - begin < args.seconds
        rows.append(output(*case, peers, args.device))
        print(*rows[-1].values(), flush=True)
        report.write(args.out, rows, run)  # what there is, should the next one fail
    for what in ("output", "pair"):
        some = [row for row in rows if row["what"] == what]
        names = dict.fromkeys(name for row in some for name in row)
        report.show([{name: row.get(name, "") for name in names} for row in some])
    draw(args.out)


if __name__ == "__main__":
    main()

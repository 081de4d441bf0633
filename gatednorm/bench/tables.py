"""What was measured as a Markdown table that also reads well on a terminal."""

import math

from .cases import Case
from .measure import ROUNDS, WRONG_FROM
from .providers import PROVIDERS
from .sheet import Record, Sheet, gigabytes

ON_CPU = (
    f"fp32; medians of {ROUNDS[0]} to {ROUNDS[1]} rounds that time both in turn; the quartiles are "
    "of the ratio within a round."
)
ON_GPU = (
    "bf16, fp32 weights; medians in microseconds on the GPU. The ceiling is the fastest of several "
    "elementwise kernels that move the same bytes; ratio, and the columns after it: time over the "
    "ceiling's."
)
NAMES = {"forward": "forward", "both": "forward + backward"}
TENSORS = {"forward": 3, "both": 8}  # read or written


def report(sheet: Sheet, cases: dict[str, Case], device: str) -> str:
    """What can be pasted into an issue; `cases` by the name of their model."""
    about = dict(sheet.common)
    machine, date = about.pop("device"), about.pop("date")
    lines = [f"{machine}: {', '.join(f'{k} {v}' for k, v in about.items())}; {date}", ""]
    rows = of_gpu(sheet, cases) if device == "cuda" else of_cpu(sheet, cases)
    if rows:
        lines += [markdown(rows), "", ON_GPU if device == "cuda" else ON_CPU]
    errors: dict[str, list[float]] = {}
    peers: dict[str, str] = {}
    for r in sheet.rows:
        if r["quantity"] == "error":
            name = r["provider"]
            errors.setdefault(name, []).append(float(r["value"]))
            peers[name] = f"{name} {r['version']}"
    worst = {n: max(values, key=lambda v: (math.isnan(v), v)) for n, values in errors.items()}
    found = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    lines.append(f"Largest error against float64, in the 2-norm: {found or 'nothing ran'}.")
    if device == "cuda":
        absent = sorted(sheet.missing - peers.keys())
        lines.append(
            f"Versions: {', '.join(peers.values())}."
            + (f" Left out: {', '.join(absent)}." if absent else "")
        )
    return "\n".join(lines)


def markdown(rows: list[Record]) -> str:
    """Columns as wide as their widest cell, all but the first three to the right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if place < 3 else "-" * (w - 1) + ":" for place, w in enumerate(widths)]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def of_gpu(sheet: Sheet, models: dict[str, Case]) -> list[Record]:
    """A row for each model, by its name, and quantity; peers only as ratios to the ceiling."""
    timed = {r["provider"] for r in sheet.rows}
    peers = [name for name in PROVIDERS if name in timed and name != "gatednorm"]
    rows = []
    for model, case in models.items():
        forward, backward = (sheet.get(case, q).get("ceiling") for q in ("forward", "backward"))
        if forward is None or backward is None:  # it did not fit into the memory
            continue
        label = {"model": model, "rows x width": case.name}
        for quantity, floor in (("forward", forward), ("both", forward + backward)):
            times = sheet.get(case, quantity)
            ours = times.get("gatednorm")
            rate = gigabytes(case, TENSORS[quantity]) / ours * 1e6 if ours else 0
            rows.append(
                label
                | {
                    "": NAMES[quantity],
                    "ceiling us": f"{floor:.1f}",
                    "gatednorm us": f"{ours:.1f}" if ours else "-",
                    "GB/s": f"{rate:.0f}" if ours else "-",
                    "ratio": ratio(sheet, case, quantity, "gatednorm", floor),
                    **{name: ratio(sheet, case, quantity, name, floor) for name in peers},
                }
            )
            label = dict.fromkeys(label, "")
    return rows


def ratio(sheet: Sheet, case: Case, quantity: str, name: str, floor: float) -> str:
    """To the ceiling; or why there is none: "-" is what a provider has not."""
    if name in (times := sheet.get(case, quantity)):
        return f"{times[name] / floor:.2f}"
    if name in sheet.find(case, "failed"):
        return "fails"
    right = sheet.get(case, "error").get(name, 0) <= WRONG_FROM[sheet.dtype]
    return "-" if right else "wrong"


def of_cpu(sheet: Sheet, models: dict[str, Case]) -> list[Record]:
    rows = []
    for model, case in models.items():
        label = {"model": model, "rows x width": case.name}
        for quantity in NAMES:
            times, found = sheet.get(case, quantity), sheet.find(case, quantity)
            if times.keys() >= {"eager", "gatednorm"}:
                ours = found["gatednorm"]
                rows.append(
                    label
                    | {
                        "": NAMES[quantity],
                        "plain PyTorch ms": f"{times['eager']:.1f}",
                        "gatednorm ms": f"{times['gatednorm']:.1f}",
                        "times as fast": f"{float(ours['speedup']):.2f}",
                        "quartiles": f"{float(ours['low']):.2f} to {float(ours['high']):.2f}",
                    }
                )
                label = dict.fromkeys(label, "")
    return rows

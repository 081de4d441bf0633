"""What benchmarks/gated_norm.py found: the CSV, the tables and the plots."""

import csv
import datetime
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES, ROWS, WIDTHS
from gatednorm.bench.providers import PROVIDERS
from gatednorm.bench.sheet import Sheet, gigabytes, version


def of_new_run(earlier: list[dict[str, str]]) -> Sheet:
    common = {
        "run": str(1 + max((int(row["run"]) for row in earlier), default=0)),
        "date": datetime.date.today().isoformat(),
        "commit": report.commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    return Sheet(earlier, common)


def read(path: Path) -> Sheet:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Sheet(rows, rows[0])


def show(sheet: Sheet, cases, quantities, names, console: Console) -> None:
    seen, rows = {r["provider"] for r in sheet.rows}, []
    columns = [n for n in ("ceiling", "torch.add", "empty Function", *names) if n in seen]
    for case in cases:
        for quantity in quantities:
            values = sheet.get(case, quantity)
            floor = values.get("ceiling", values.get("torch.add"))
            cells = dict.fromkeys(columns, "")
            for name in values.keys() & cells.keys():
                ratio = f" ({values[name] / floor:.2f})" if floor else ""
                cells[name] = f"{values[name]:.1f}{ratio}"
            if values:
                rows.append({"case": case.name, "": quantity, **cells})
    title = "microseconds; in brackets the ratio to the ceiling, or to torch.add"
    report.show(rows, title, console)


def markdown(sheet: Sheet, names, console: Console) -> None:
    """The table of docs/performance.md."""
    console.print("| rows x width | | ceiling | gatednorm | ratio | best peer | ratio |")
    console.print("|---|---|---|---|---|---|---|")
    for case in CASES:
        label = case.name
        for quantity in ("forward", "backward"):
            values = sheet.get(case, quantity)
            ceiling, ours = values["ceiling"], values["gatednorm"]
            peer, best = min(
                ((n, v) for n, v in values.items() if n in names and n != "gatednorm"),
                key=lambda pair: pair[1],
            )
            console.print(
                f"| {label} | {quantity} | {ceiling:.1f} | {ours:.1f} | {ours / ceiling:.2f} "
                f"| {peer} {best:.1f} | {best / ceiling:.2f} |",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            label = ""


def draw(axis, names, points_of) -> None:
    """One line for each provider that has points, in a colour of its own in every plot."""
    axis.grid(alpha=0.3)
    for name in ("ceiling", *names):
        points = points_of(name)
        if points and name == "ceiling":
            axis.plot(*zip(*points, strict=True), label=name, color="black", ls="--")
        elif points:
            color = f"C{list(PROVIDERS).index(name)}"
            ours = {"lw": 2.5, "zorder": 3} if name == "gatednorm" else {}
            axis.plot(*zip(*points, strict=True), label=name, marker="o", color=color, **ours)


def plot(sheet: Sheet, names, folder: Path) -> None:
    """Bandwidth over width, and forward time over rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gpu = sheet.common["gpu"]
    tensors = {"forward": 3, "backward": 5}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, quantity in zip(axes, tensors, strict=True):

        def bandwidths(name, quantity=quantity):
            times = ((c, sheet.get(c, quantity).get(name)) for c in WIDTHS)
            return [(c.width, gigabytes(c, tensors[quantity]) / t * 1e3) for c, t in times if t]

        draw(axis, names, bandwidths)
        axis.set(xscale="log", xlabel="width", title=f"{quantity}, 33.5M elements, gate after")
        axis.set_xticks([c.width for c in WIDTHS], [str(c.width) for c in WIDTHS])
        axis.minorticks_off()
    axes[0].set(ylabel="TB/s", ylim=(0, None))
    figure.suptitle(f"Gated RMS norm, bf16, {gpu}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(folder / "bandwidth.png", dpi=120)

    figure, axis = plt.subplots(figsize=(6, 4))

    def times(name):
        return [(c.rows, t) for c in ROWS if (t := sheet.get(c, "forward").get(name))]

    draw(axis, names, times)
    axis.set(xscale="log", yscale="log", xlabel="rows of 4096", ylabel="forward, microseconds")
    axis.set_title(f"Gate before, bf16, {gpu}")
    axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "rows.png", dpi=120)

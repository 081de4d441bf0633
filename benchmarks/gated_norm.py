"""Time every gated norm that is installed, and the ceiling, on one CUDA machine.

    python -m benchmarks.gated_norm                    # all: table, CSV and plots under results/
    python -m benchmarks.gated_norm --only gatednorm --cases 4 --append
    python -m benchmarks.gated_norm --replot           # plots and README table from the CSV, no GPU

Each provider is compared with float64 before it is timed. Times on the GPU are medians in
microseconds of `triton.testing.do_bench`, which writes 256 MB between two runs, so that no input
lies in the L2 cache, over the replay of a CUDA graph of one call, so that no provider waits for its
Python. What the Python costs is in the wall times. All providers of a case run in one process, on
the same tensors.
"""

import argparse
import csv
import datetime
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gatednorm
from benchmarks.ceiling_kernels import backward_ceiling, do_bench, forward_ceiling
from benchmarks.providers import EPS, PROVIDERS, Case
from benchmarks.report import RESULTS, commit, version

CASES = (
    Case(262144, 128),
    Case(262144, 128, z_strided=True),
    Case(16384, 2048, norm_before_gate=False, z_strided=True),
    Case(16384, 5120, norm_before_gate=False, z_strided=True),
    Case(8192, 8192, 1024, norm_before_gate=False, z_strided=True),
    Case(16384, 4096),
    Case(4096, 16384),
    Case(4096, 16384, norm_before_gate=False),
    Case(131072, 256),
    Case(30011, 1000, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(20011, 1536, norm_before_gate=False),
    Case(10007, 3072, bias=True),
    Case(16384, 2048, norm_before_gate=False, is_rms_norm=False, bias=True),
)
DECODE = (Case(2048, 128), Case(64, 5120, norm_before_gate=False))
STREAM = torch.cuda.Stream() if torch.cuda.is_available() else None
WIDTHS = tuple(Case(2**25 // width, width) for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192))
# What the plots show: torch.compile would compile anew for every point.
QUICK = [name for name in PROVIDERS if name not in ("eager", "torch.compile")]
ROWS = tuple(Case(2**k, 4096, norm_before_gate=False) for k in range(4, 16, 2))


def median(function) -> float:
    """Microseconds on the GPU."""
    with torch.cuda.stream(STREAM):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=STREAM):
        function()
    return do_bench(graph.replay, warmup=10, rep=60, return_mode="median") * 1e3


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """bf16 `x`, `z`, `dy`, fp32 parameters; a strided z is a slice of a packed projection."""
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=g, device="cuda", dtype=dtype)

    rows, width = case.rows, case.width
    packed = randn(rows, 2 * width + 256) if case.z_strided else randn(rows, width)
    return {
        "x": randn(rows, width).requires_grad_(),
        "w": (1 + 0.1 * randn(width, dtype=torch.float32)).requires_grad_(),
        "b": randn(width, dtype=torch.float32).requires_grad_() if case.bias else None,
        "z": packed[:, :width].requires_grad_(),
        "dy": randn(rows, width),
    }


def gradients(function, t) -> list[torch.Tensor]:
    wanted = [v for k, v in t.items() if k in "xwbz" and v is not None]
    return torch.autograd.grad(function(t["x"], t["w"], t["b"], t["z"]), wanted, t["dy"])


def error(case: Case, functions, t) -> float:
    """Largest relative error (2-norm) of the output and the gradients against float64."""
    training, inference = functions
    wide = {k: None if v is None else v.detach().double() for k, v in t.items()}
    for k in "xwbz":
        if wide[k] is not None:
            wide[k].requires_grad_()

    def reference(x, w, b, z):
        return gatednorm.gated_norm_ref(
            x, w, b, z, EPS, case.group_size, case.norm_before_gate,
            is_rms_norm=case.is_rms_norm, activation=case.activation,
        )  # fmt: skip

    def distance(ours, truth):
        return ((ours.double() - truth).norm() / truth.norm()).item()

    with torch.no_grad():
        args = [t[k] for k in "xwbz"]
        worst = distance(inference(*args), reference(*(wide[k] for k in "xwbz")))
    if training is not None:
        truth = gradients(reference, wide)
        worst = max([worst, *map(distance, gradients(training, t), truth)])
    return worst


def forward_time(inference, t) -> float:
    args = [t[k] for k in "xwbz"]
    with torch.no_grad():
        return median(lambda: inference(*args))


def backward_time(training, t) -> float:
    wanted = [t[k] for k in "xwbz" if t[k] is not None]
    with torch.cuda.stream(STREAM):  # autograd runs the backward on the stream of the forward
        y = training(*(t[k] for k in "xwbz"))
    return median(lambda: torch.autograd.grad(y, wanted, t["dy"], retain_graph=True))


def both_time(training, t) -> float:
    return median(lambda: gradients(training, t))


def peak(training, t) -> float:
    """MiB beyond the inputs while a forward and a backward run."""
    gradients(training, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(training, t)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def wall_time(function, calls: int = 1000) -> float:
    """Microseconds per call of a loop with one synchronisation at its end; best of five."""
    function()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def graph_time(function, calls: int = 100) -> float:
    """Microseconds per call inside a CUDA graph of `calls` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return do_bench(graph.replay, warmup=5, rep=30, return_mode="median") * 1e3 / calls


class EmptyFunction(torch.autograd.Function):
    """What autograd itself costs: outputs of the right sizes, and no kernel."""

    @staticmethod
    def forward(ctx, x, w, z):
        ctx.save_for_backward(x, w, z)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class Sheet:
    """Rows of the CSV, each with what is needed to read it alone; those of a new run after the
    `earlier` ones. Of what was timed twice, the last counts."""

    def __init__(self, earlier: list[dict] | None = None) -> None:
        self.missing: set[str] = set()  # providers that are not installed
        self.rows = list(earlier or [])
        self.common = {
            "run": 1 + max((int(row["run"]) for row in self.rows), default=0),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
        }

    def add(
        self, case: Case, provider: str, quantity: str, value: float, unit: str, **more
    ) -> None:
        shape = {"case": case.name, "rows": case.rows, "width": case.width, "dtype": "bfloat16"}
        self.rows.append(
            self.common | shape
            | {"provider": provider, "quantity": quantity, "value": f"{value:.6g}", "unit": unit}
            | more
        )  # fmt: skip

    def get(self, case: Case, quantity: str) -> dict[str, float]:
        """Provider to value."""
        return {
            r["provider"]: float(r["value"])
            for r in self.rows
            if r["case"] == case.name and r["quantity"] == quantity
        }

    @classmethod
    def read(cls, path: Path) -> "Sheet":
        sheet = cls.__new__(cls)
        with path.open(newline="") as file:
            sheet.rows = list(csv.DictReader(file))
        sheet.common = sheet.rows[0]
        return sheet

    def write(self, path: Path) -> None:
        names = list(dict.fromkeys(k for r in self.rows for k in r))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def gigabytes(case: Case, tensors: int) -> float:
    return tensors * case.rows * case.width * 2 / 1e9


def each_provider(case: Case, names: list[str], sheet: Sheet, t, console: Console, measure) -> None:
    """Call `measure(name, functions)` for each provider that is installed, covers the case and is
    right. One that cannot run a case is reported and stays in the CSV."""
    for name in names:
        distribution, build = PROVIDERS[name]
        try:
            functions = build(case)
        except ImportError:
            if name not in sheet.missing:
                console.print(f"  {name} is not installed, and is left out")
                sheet.missing.add(name)
            continue
        if functions is None:
            continue
        try:
            worst = error(case, functions, t)
            sheet.add(case, name, "error", worst, "relative", version=version(distribution))
            if worst > 2e-2:
                console.print(f"  {name} is wrong: relative error {worst:.2g}; not timed")
                continue
            measure(name, functions)
        except Exception as problem:
            torch.cuda.synchronize()
            reason = f"{type(problem).__name__} {(str(problem).strip().splitlines() or [''])[0]}"
            console.print(f"  {name} fails: {reason[:150]}")
            sheet.add(case, name, "failed", float("nan"), reason[:80])


def throughput(case: Case, names, sheet, console, backward: bool = True) -> None:
    t = inputs(case)
    x, z, dy = (t[k].detach() for k in ("x", "z", "dy"))
    one, two = torch.empty_like(x), torch.empty_like(x)
    ceilings = {"forward": (forward_ceiling(x, z, one, median), 3)}
    if backward:
        ceilings["backward"] = (backward_ceiling(dy, x, z, one, two, median), 5)
    for quantity, (best, tensors) in ceilings.items():
        rate = {"gb_per_s": f"{gigabytes(case, tensors) / best * 1e6:.0f}"}
        sheet.add(case, "ceiling", quantity, best, "us", **rate)

    def measure(name, functions) -> None:
        training, inference = functions
        times = {"forward": forward_time(inference, t)}
        if backward and training is not None:
            times["backward"] = backward_time(training, t)
            sheet.add(case, name, "both", both_time(training, t), "us")
            sheet.add(case, name, "peak memory", peak(training, t), "MiB")
        for quantity, value in times.items():
            best, tensors = ceilings[quantity]
            rate = {"gb_per_s": f"{gigabytes(case, tensors) / value * 1e6:.0f}"}
            sheet.add(case, name, quantity, value, "us", ratio=f"{value / best:.3f}", **rate)

    each_provider(case, names, sheet, t, console, measure)


def decoding(case: Case, names, sheet, console) -> None:
    """Wall time of an eager call, and GPU time of a call inside a CUDA graph."""
    t = inputs(case)
    x, w, b, z = (None if t[k] is None else t[k].detach() for k in "xwbz")
    with torch.no_grad():
        sheet.add(case, "torch.add", "wall forward", wall_time(lambda: torch.add(x, z)), "us")
        sheet.add(case, "torch.add", "graph forward", graph_time(lambda: torch.add(x, z)), "us")
    floor = wall_time(lambda: gradients(lambda x, w, b, z: EmptyFunction.apply(x, w, z), t), 300)
    sheet.add(case, "empty Function", "wall both", floor, "us")

    def measure(name, functions) -> None:
        training, inference = functions
        with torch.no_grad():
            sheet.add(case, name, "wall forward", wall_time(lambda: inference(x, w, b, z)), "us")
            sheet.add(case, name, "graph forward", graph_time(lambda: inference(x, w, b, z)), "us")
        if training is not None:
            both = wall_time(lambda: gradients(training, t), calls=300)
            sheet.add(case, name, "wall both", both, "us")

    each_provider(case, names, sheet, t, console, measure)


def show(sheet: Sheet, cases, quantities, names, console: Console) -> None:
    columns = ["ceiling", "torch.add", "empty Function", *names]
    seen = {r["provider"] for r in sheet.rows}
    table = Table(title="microseconds; in brackets the ratio to the ceiling, or to torch.add")
    table.add_column("case", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in (c for c in columns if c in seen):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        for quantity in quantities:
            values = sheet.get(case, quantity)
            if not values:
                continue
            floor = values.get("ceiling", values.get("torch.add"))
            cells = [
                f"{values[n]:.1f} ({values[n] / floor:.2f})" if n in values and floor
                else f"{values[n]:.1f}" if n in values else ""
                for n in columns if n in seen
            ]  # fmt: skip
            table.add_row(case.name, quantity, *cells)
    console.print(table)


def markdown(sheet: Sheet, names, console: Console) -> None:
    """The README's table."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--skip", nargs="*", default=[], choices=list(PROVIDERS))
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first N cases")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument(
        "--replot", action="store_true", help="draw the CSV again, print the README's table; no GPU"
    )
    parser.add_argument("--append", action="store_true", help="keep the CSV's earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.replot:
        sheet = Sheet.read(args.out / "gated_norm.csv")
        plot(sheet, QUICK, args.out)
        markdown(sheet, list(PROVIDERS), Console())
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here; benchmarks/cpu.py is the benchmark of the CPU path")
    names = [n for n in args.only if n not in args.skip]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gated_norm.csv"
    earlier = Sheet.read(path).rows if args.append and path.exists() else []
    console, sheet = Console(width=240), Sheet(earlier)
    cases = CASES[: args.cases]
    for case in DECODE:
        console.print(case.name)
        decoding(case, names, sheet, console)
    for case in cases:
        console.print(case.name)
        throughput(case, names, sheet, console)
        sheet.write(path)
    show(sheet, cases, ("forward", "backward", "both"), names, console)
    show(sheet, DECODE, ("wall forward", "graph forward", "wall both"), names, console)
    if not args.no_plots:
        quick = [n for n in names if n in QUICK]
        for case in WIDTHS:
            throughput(case, quick, sheet, console)
            sheet.write(path)
        for case in ROWS:
            throughput(case, quick, sheet, console, backward=False)
        plot(sheet, quick, args.out)
    sheet.write(path)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()

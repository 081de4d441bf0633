"""Time every gated norm that is installed, and the ceiling, on one CUDA machine.

    python -m benchmarks.gated_norm                    # all: table, CSV and plots under results/
    python -m benchmarks.gated_norm --only gatednorm --cases 4 --append
    python -m benchmarks.gated_norm --replot           # plots and tables from the CSV, no GPU

Without a GPU torch brings no triton, which `--replot` imports too: `pip install ".[demo,triton]"`.

Each provider is compared with float64 before it is timed. Times on the GPU are medians in
microseconds of `triton.testing.do_bench`, which writes 256 MB between two runs, so that no input
lies in the L2 cache, over the replay of a CUDA graph of one call, so that no provider waits for its
Python. What the Python costs is in the wall times. All providers of a case run in one process, on
the same tensors.
"""

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.ceiling_kernels import backward_ceiling, forward_ceiling
from benchmarks.providers import CASES, DECODE, PROVIDERS, QUICK, ROWS, WIDTHS, Case
from benchmarks.report import version
from benchmarks.sheet import Sheet, gigabytes, markdown, plot, show
from benchmarks.timing import (
    EmptyFunction,
    backward_time,
    error,
    forward_time,
    gradients,
    graph_time,
    inputs,
    peak,
    wall_time,
)


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
    ceilings = {"forward": (forward_ceiling(x, z, one), 3)}
    if backward:
        ceilings["backward"] = (backward_ceiling(dy, x, z, one, two), 5)
    for quantity, (best, tensors) in ceilings.items():
        rate = {"gb_per_s": f"{gigabytes(case, tensors) / best * 1e6:.0f}"}
        sheet.add(case, "ceiling", quantity, best, "us", **rate)

    def measure(name, functions) -> None:
        training, inference = functions
        times = {"forward": forward_time(inference, t)}
        if backward and training is not None:
            times["backward"] = backward_time(training, t)
            both = graph_time(lambda: gradients(training, t))
            sheet.add(case, name, "both", both, "us")
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
        graph = graph_time(lambda: torch.add(x, z), calls=100)
        sheet.add(case, "torch.add", "graph forward", graph, "us")
    floor = wall_time(lambda: gradients(lambda x, w, b, z: EmptyFunction.apply(x, w, z), t), 300)
    sheet.add(case, "empty Function", "wall both", floor, "us")

    def measure(name, functions) -> None:
        training, inference = functions
        with torch.no_grad():
            sheet.add(case, name, "wall forward", wall_time(lambda: inference(x, w, b, z)), "us")
            graph = graph_time(lambda: inference(x, w, b, z), calls=100)
            sheet.add(case, name, "graph forward", graph, "us")
        if training is not None:
            both = wall_time(lambda: gradients(training, t), calls=300)
            sheet.add(case, name, "wall both", both, "us")

    each_provider(case, names, sheet, t, console, measure)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--only", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--skip", nargs="*", default=[], choices=list(PROVIDERS))
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first N cases")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument(
        "--replot", action="store_true", help="plots and a Markdown table from the CSV; no GPU"
    )
    parser.add_argument("--append", action="store_true", help="keep the CSV's earlier runs")
    args = parser.parse_args()
    if args.replot:
        sheet = Sheet.read(args.out / "gated_norm.csv")
        plot(sheet, QUICK, args.out)
        markdown(sheet, list(PROVIDERS), Console())
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here; benchmarks/cpu.py is the benchmark of the CPU path")
    names = [n for n in args.only if n not in args.skip]
    path = args.out / "gated_norm.csv"
    earlier = Sheet.read(path).rows if args.append and path.exists() else []
    console, sheet = Console(width=240), Sheet.of_new_run(earlier)
    cases = CASES[: args.cases]
    for case in DECODE:
        console.print(case.name)
        decoding(case, names, sheet, console)
    for case in cases:
        console.print(case.name)
        throughput(case, names, sheet, console)
        report.write(path, sheet.rows)
    show(sheet, cases, ("forward", "backward", "both"), names, console)
    show(sheet, DECODE, ("wall forward", "graph forward", "wall both"), names, console)
    if not args.no_plots:
        quick = [n for n in names if n in QUICK]
        for case in WIDTHS:
            throughput(case, quick, sheet, console)
            report.write(path, sheet.rows)
        for case in ROWS:
            throughput(case, quick, sheet, console, backward=False)
        plot(sheet, quick, args.out)
    report.write(path, sheet.rows)


if __name__ == "__main__":
    main()

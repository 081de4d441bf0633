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
from benchmarks.cases import CASES, DECODE, QUICK, ROWS, WIDTHS
from benchmarks.sheet import markdown, of_new_run, plot, read, show
from gatednorm.bench.cases import Case
from gatednorm.bench.measure import each_provider, throughput
from gatednorm.bench.providers import PROVIDERS
from gatednorm.bench.sheet import Sheet
from gatednorm.bench.timing import EmptyFunction, gradients, graph_time, inputs, wall_time


def decoding(case: Case, names, sheet: Sheet, say) -> None:
    """Wall time of an eager call, and GPU time of a call inside a CUDA graph."""
    t = inputs(case)
    x, w, b, z = (v if v is None else v.detach() for v in t[:4])
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

    each_provider(case, names, sheet, t, say, measure)


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
        sheet = read(args.out / "gated_norm.csv")
        plot(sheet, QUICK, args.out)
        markdown(sheet, list(PROVIDERS), Console())
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here; benchmarks/cpu.py is the benchmark of the CPU path")
    names = [n for n in args.only if n not in args.skip]
    path = args.out / "gated_norm.csv"
    earlier = read(path).rows if args.append and path.exists() else []
    console, sheet = Console(width=240), of_new_run(earlier)
    cases = CASES[: args.cases]
    for case in DECODE:
        console.print(case.name)
        decoding(case, names, sheet, console.print)
    for case in cases:
        console.print(case.name)
        throughput(case, names, sheet, console.print)
        report.write(path, sheet.rows)
    show(sheet, cases, ("forward", "backward", "both"), names, console)
    show(sheet, DECODE, ("wall forward", "graph forward", "wall both"), names, console)
    if not args.no_plots:
        quick = [n for n in names if n in QUICK]
        for case in WIDTHS:
            throughput(case, quick, sheet, console.print)
            report.write(path, sheet.rows)
        for case in ROWS:
            throughput(case, quick, sheet, console.print, backward=False)
        plot(sheet, quick, args.out)
    report.write(path, sheet.rows)


if __name__ == "__main__":
    main()

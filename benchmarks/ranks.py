"""A norm group over several GPUs beside other ways to compute it: time of a forward and a backward.

    python -m benchmarks.ranks                  # two GPUs; a table, and results/ranks.csv
    python -m benchmarks.ranks --device cpu --rows 64 --width 256

bf16, RMS norm, one group over the columns of all processes, which torchrun starts:

- ours: `rmsnorm_fn` with `process_group`
- gather x, z, dy: `all_gather_into_tensor` of the three, the norm of the full width on every rank,
  and of its results the own columns
- gather x * act(z): the same with one tensor a pass, the gate on the own columns in plain PyTorch
- local + exchange: the norm of the own columns alone, and an all-gather of one number a row in
  each pass, which nothing uses: the least that a norm of such a group could take
- local, exchange: these two apart

`gpu_us` is the time of a call in a CUDA graph of several, `eager_us` the same without a graph; the
median over rounds of the slowest rank. Every round begins with another way, and each measurement
once all GPUs are there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from gatednorm import layernorm_backward, layernorm_forward, rmsnorm_fn
from gatednorm.bench import timing
from gatednorm.bench.cases import Case
from gatednorm.bench.measure import WRONG_FROM, reason
from gatednorm.bench.providers import EPS, reference
from gatednorm.bench.timing import Inputs
from gatednorm.distributed import all_gather

Results = tuple[Tensor, ...]  # y, dx, dw, dz of the own columns
CALLS = 5  # in a graph, and in a row without one
OURS, LEAST = "ours", "local + exchange"
AIMS = {  # of other / ours at least, and of ours / the least at most, by norm_before_gate
    True: {"gather x, z, dy": (3.0, None), LEAST: (None, 1.5)},
    False: {"gather x, z, dy": (3.0, None), LEAST: (None, 1.6)},
}


def main() -> None:
    parser = report.parser(__doc__, "ranks.csv")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=8192, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(args.processes), "-m", "benchmarks.ranks"),
            *(*sys.argv[1:], "--worker", str(result)),
        ]
        subprocess.run(command, cwd=report.RESULTS.parents[1], check=True, stdout=sys.stderr)
        rows = json.loads(result.read_text())
    size = f"{args.rows} rows of {args.width} channels on {args.processes} ranks"
    report.show(rows, f"forward and backward, {size}, microseconds")
    for row in rows:
        least, most = AIMS[row["gate"] == "after"].get(row["way"], (None, None))
        if least:
            print(f"gate {row['gate']}: {row['way']} / ours {row['times_ours']}, aim {least:g}")
        if most:
            ratio = 1 / row["times_ours"]
            print(f"gate {row['gate']}: ours / ({row['way']}) {ratio:.3f}, aim {most:g}")
    about = report.about(args.device)
    run = {"processes": args.processes, "rows": args.rows, "width": args.width}
    report.write(args.out, [run | row for row in rows], about)


def work(args: argparse.Namespace) -> None:
    """Time every way in each of the processes; the first writes the rows of the table."""
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    rows = [row for before in (False, True) for row in measure(before, device, args)]
    if dist.get_rank() == 0:
        args.worker.write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(norm_before_gate: bool, device: torch.device, args: argparse.Namespace) -> list[dict]:
    """The rows of the table of one order of norm and gate."""
    case = Case(args.rows, args.width, norm_before_gate=norm_before_gate)
    whole = timing.inputs(case, device.type)
    calls = ways(case, whole)
    errors = {name: error(case, whole, call()) for name, call in calls.items()}
    eager, gpu = slowest(calls, args.rounds, device), {}
    if device.type == "cuda":
        try:
            graphs = {name: timing.graph_of(call, CALLS).replay for name, call in calls.items()}
            gpu = slowest(graphs, args.rounds, device, 1)
        except RuntimeError as problem:  # what is there is worth its time
            print(f"no CUDA graph, ratios of eager times: {reason(problem)}", file=sys.stderr)
    counted = gpu or eager
    return [
        {
            "gate": "after" if norm_before_gate else "before",
            "way": name,
            "gpu_us": round(gpu[name], 1) if gpu else "",
            "eager_us": round(eager[name], 1),
            "times_ours": round(counted[name] / counted[OURS], 3),
            "error": f"{errors[name]:.1e}" if errors[name] is not None else "",
        }
        for name in calls
    ]


def ways(case: Case, whole: Inputs) -> dict[str, Callable[[], Results]]:
    """By name, calls that return the results of a forward and a backward."""
    rank, size, rows = dist.get_rank(), dist.get_world_size(), case.rows
    width = case.width // size
    own = slice(rank * width, (rank + 1) * width)
    x, w, z = (t.detach()[..., own].clone().requires_grad_() for t in (whole.x, whole.w, whole.z))
    dy, everything = whole.dy[:, own].clone(), whole.w.detach()
    options = {"norm_before_gate": case.norm_before_gate}
    number = torch.zeros(rows, device=x.device)
    numbers = number.new_empty(size * rows)

    def gathered(t: Tensor) -> Tensor:
        t = t.detach().contiguous()
        everyone = t.new_empty(size * t.numel())
        all_gather(everyone, t.view(-1), dist.group.WORLD)
        return everyone.view(size, rows, width).movedim(0, 1).reshape(rows, -1)

    def norm(process_group=None) -> Results:
        y = rmsnorm_fn(x, w, None, z, EPS, process_group=process_group, **options)
        return (y.detach(), *torch.autograd.grad(y, (x, w, z), dy))

    def full(x: Tensor, z: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Results]]:
        """y of the full width, and its gradients for dy."""
        kind = {"is_rms_norm": True, "eps": EPS, **options}
        y, _, rstd = layernorm_forward(x, everything, None, z, **kind)
        return y, lambda dy: layernorm_backward(
            dy, x, everything, None, z, None, rstd, **kind
        )  # fmt: skip

    def gather_three() -> Results:
        y, backward = full(gathered(x), gathered(z))
        dx, dw, _, dz = backward(gathered(dy))
        return y[:, own], dx[:, own], dw[own], dz[:, own]

    def gather_one() -> Results:
        if case.norm_before_gate:
            y, backward = full(gathered(x), None)
            h = y[:, own].detach().requires_grad_()
            out = h * F.silu(z)
            dh, dz = torch.autograd.grad(out, (h, z), dy)
            dx, dw, *_ = backward(gathered(dh))
            return out.detach(), dx[:, own], dw[own], dz
        u = x * F.silu(z)
        y, backward = full(gathered(u), None)
        du, dw, *_ = backward(gathered(dy))
        dx, dz = torch.autograd.grad(u, (x, z), du[:, own])
        return y[:, own], dx, dw[own], dz

    def exchange() -> Results:
        all_gather(numbers, number, dist.group.WORLD)
        return ()

    def least() -> Results:
        y = rmsnorm_fn(x, w, None, z, EPS, **options)
        exchange()
        torch.autograd.grad(y, (x, w, z), dy)
        return exchange()

    def local() -> Results:
        norm()
        return ()

    def twice() -> Results:
        exchange()
        return exchange()

    return {
        OURS: lambda: norm(dist.group.WORLD),
        "gather x, z, dy": gather_three,
        "gather x * act(z)": gather_one,
        LEAST: least,
        "local": local,
        "exchange": twice,
    }


def error(case: Case, whole: Inputs, results: Results) -> float | None:
    """The largest relative one (2-norm) of the results against float64 of the whole rows.

    Raises:
        RuntimeError: where it is too large for what is timed to be a norm.
    """
    if not results:
        return None
    width = case.width // dist.get_world_size()
    own = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    wide = Inputs(*(None if t is None else t.detach().double() for t in whole))
    for t in wide.leaves:
        t.requires_grad_()
    y = reference(case)(*wide[:4])
    truth = (y.detach(), *torch.autograd.grad(y, wide.leaves, wide.dy))
    pairs = zip(results, truth, strict=True)
    worst = max(timing.relative_error(ours, true[..., own]) for ours, true in pairs)
    if not worst <= WRONG_FROM["bfloat16"]:
        raise RuntimeError(f"relative error {worst:.2g} of {case.name}")
    return worst


def slowest(
    calls: dict[str, Callable], rounds: int, device: torch.device, repeats: int = CALLS
) -> dict[str, float]:
    """Microseconds of one of CALLS calls, of which a function makes CALLS / `repeats`: the median
    over rounds of the slowest rank. The rounds are as many on every rank, which wait for each
    other."""
    if device.type == "cpu":
        found = timing.wall_times(calls, rounds)
        times = torch.tensor(list(found.values())) * 1e3
    else:
        flag = torch.zeros(1, device=device)
        events = {name: [] for name in calls}
        for number in range(-2, rounds):
            for name in timing.rotated(calls, number):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                dist.all_reduce(flag)
                start.record()
                for _ in range(repeats):
                    calls[name]()
                end.record()
                if number >= 0:
                    events[name].append((start, end))
            torch.cuda.synchronize()
        milliseconds = [[a.elapsed_time(b) for a, b in pairs] for pairs in events.values()]
        times = torch.tensor(milliseconds, device=device) * 1e3 / CALLS
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return {name: statistics.median(own) for name, own in zip(calls, times.tolist(), strict=True)}


if __name__ == "__main__":
    main()

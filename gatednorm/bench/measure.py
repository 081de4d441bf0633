"""Providers compared with float64 and then timed, on a GPU and on a CPU."""

import statistics
from collections.abc import Callable, Iterable
from functools import partial

import torch

from . import timing
from .cases import Case
from .providers import PROVIDERS, Functions, Norm
from .sheet import Sheet, gigabytes, version
from .timing import Inputs, gradients

WRONG_FROM = {"bfloat16": 2e-2, "float32": 1e-5}  # relative error, 2-norm
ROUNDS = 3, 15  # at least, and at most: as many as take BUDGET
BUDGET = 2000  # milliseconds for a quantity on a CPU, so that all models take under a minute
Say = Callable[[str], object]
Measure = Callable[[str, Functions], object]


def reason(problem: Exception) -> str:
    """In one line."""
    return f"{type(problem).__name__} {(str(problem).strip().splitlines() or [''])[0]}"


def each_provider(
    case: Case, names: Iterable[str], sheet: Sheet, t: Inputs, say: Say, measure: Measure
) -> None:
    """Call `measure(name, functions)` for each provider that is installed, covers the case and is
    right. One that cannot run a case is reported and stays in the sheet."""
    for name in names:
        distribution, build = PROVIDERS[name]
        try:
            functions = build(case)
            if functions is None:
                continue
            worst = timing.error(case, functions, t)
            sheet.add(case, name, "error", worst, "relative", version=version(distribution))
            if worst <= WRONG_FROM[sheet.dtype]:
                measure(name, functions)
            else:
                say(f"  {name} is wrong: relative error {worst:.2g}; not timed")
        except ImportError as problem:
            if name not in sheet.missing:
                say(f"  {name} is left out: {problem}")
                sheet.missing.add(name)
        except Exception as problem:
            timing.synchronize(t.x.device.type)
            say(f"  {name} fails: {reason(problem)[:150]}")
            sheet.add(case, name, "failed", float("nan"), reason(problem)[:80])


def throughput(
    case: Case, names: Iterable[str], sheet: Sheet, say: Say, backward: bool = True,
    device: str = "cuda",
) -> None:  # fmt: skip
    """Microseconds on the GPU of the ceiling and of each provider: "forward", "backward", and
    "both" in one CUDA graph."""
    from ..kernels import ceilings

    t = timing.inputs(case, device)
    dy, x, z = (v.detach() for v in (t.dy, t.x, t.z))
    one, two = torch.empty_like(x), torch.empty_like(x)
    best = {"forward": (timing.ceiling(ceilings.forward_ways(x, z, one)), 3)}
    if backward:
        best["backward"] = (timing.ceiling(ceilings.backward_ways(dy, x, z, one, two)), 5)
    for quantity, (floor, tensors) in best.items():
        rate = f"{gigabytes(case, tensors) / floor * 1e6:.0f}"
        sheet.add(case, "ceiling", quantity, floor, "us", gb_per_s=rate)

    def measure(name: str, functions: Functions) -> None:
        training, inference = functions
        times = {"forward": timing.forward_time(inference, t)}
        if backward and training is not None:
            times["backward"] = timing.backward_time(training, t)
            both = timing.graph_time(lambda: gradients(training, t))
            sheet.add(case, name, "both", both, "us")
            sheet.add(case, name, "peak memory", timing.peak(training, t), "MiB")
        for quantity, value in times.items():
            floor, tensors = best[quantity]
            rate = f"{gigabytes(case, tensors) / value * 1e6:.0f}"
            ratio = f"{value / floor:.3f}"
            sheet.add(case, name, quantity, value, "us", ratio=ratio, gb_per_s=rate)

    each_provider(case, names, sheet, t, say, measure)


def on_cpu(case: Case, sheet: Sheet, say: Say) -> None:
    """Wall milliseconds of the plain expression and of this norm, "forward" and "both", and the
    quartiles of the speed-up over rounds that time the two in turn."""
    t = timing.inputs(case, "cpu", torch.float32)
    found: dict[str, Functions] = {}
    each_provider(case, ("eager", "gatednorm"), sheet, t, say, found.__setitem__)
    if "eager" not in found:
        return

    def forward(inference: Norm) -> None:
        with torch.no_grad():
            inference(*t[:4])

    steps: dict[str, dict[str, timing.Call]] = {
        "forward": {name: partial(forward, f[1]) for name, f in found.items()},
        "both": {name: partial(gradients, f[0], t) for name, f in found.items() if f[0]},
    }
    for quantity, ways in steps.items():
        once = sum(first for first, *_ in timing.wall_times(ways, 1).values())
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(BUDGET / once)))
        times = timing.wall_times(ways, rounds)
        for name, own in times.items():
            low, ratio, high = timing.speed_up(times["eager"], own)
            more = {"low": f"{low:.3g}", "speedup": f"{ratio:.3g}", "high": f"{high:.3g}"}
            sheet.add(case, name, quantity, statistics.median(own), "ms", **more)

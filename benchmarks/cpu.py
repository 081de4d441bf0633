"""The closed-form CPU path against the plain PyTorch expression and torch.compile of it.

    python -m benchmarks.cpu

Forward plus backward in fp32, and the peak memory beyond the inputs and gradients that every way
must hold. The speed-up is the median over rounds of the ratio within a round, so that a machine
which is slow for a while is slow for both; `low` and `high` are its quartiles.
"""

import csv
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import gatednorm

SHAPES = ((8192, 512), (32768, 64))
ROUNDS = 40
RESULTS = Path(__file__).parent / "results" / "cpu.csv"


def peak(function) -> float:
    """MiB that live at once while `function` runs, from the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def main() -> None:
    console = Console()
    table = Table(title=f"forward + backward, fp32, {torch.get_num_threads()} threads")
    for column in ("shape", "", "ms", "speed-up over plain", "quartiles", "peak MiB"):
        table.add_column(column, justify="right")
    rows = []
    for shape in SHAPES:
        x, z = (torch.randn(shape, requires_grad=True) for _ in "xz")
        w = torch.randn(shape[1], requires_grad=True)
        dy = torch.randn(shape)
        ways = {
            "plain PyTorch": gatednorm.rms_norm_ref,
            "gatednorm": gatednorm.rmsnorm_fn,
            "torch.compile": torch.compile(gatednorm.rms_norm_ref, dynamic=False),
        }

        def step(norm, x=x, w=w, z=z, dy=dy):
            return torch.autograd.grad(norm(x, w, None, z), (x, w, z), dy)

        times = {name: [] for name in ways}
        for norm in ways.values():
            step(norm), step(norm)
        for _ in range(ROUNDS):
            for name, norm in ways.items():
                start = time.perf_counter()
                step(norm)
                times[name].append((time.perf_counter() - start) * 1e3)
        plain = times["plain PyTorch"]
        for name, norm in ways.items():
            ms, memory = statistics.median(times[name]), peak(lambda norm=norm: step(norm))
            ratios = [one / other for one, other in zip(plain, times[name], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            table.add_row(
                f"{shape[0]} x {shape[1]}", name, f"{ms:.1f}", f"{ratio:.2f}",
                f"{low:.2f} to {high:.2f}", f"{memory:.1f}",
            )  # fmt: skip
            rows.append(
                {
                    "date": datetime.date.today().isoformat(), "torch": torch.__version__,
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                    "rows": shape[0], "width": shape[1], "way": name,
                    "ms": f"{ms:.2f}", "speedup": f"{ratio:.2f}", "low": f"{low:.2f}",
                    "high": f"{high:.2f}", "peak_mib": f"{memory:.1f}",
                }
            )  # fmt: skip
    console.print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

"""The closed-form CPU path against the plain PyTorch expression and torch.compile of it.

    python -m benchmarks.cpu

Forward plus backward in fp32, and the peak memory beyond the inputs and gradients that every way
must hold. The speed-up is the median over rounds of the ratio within a round, so that a machine
which is slow for a while is slow for both; `low` and `high` are its quartiles.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import gatednorm
from benchmarks import report
from gatednorm.bench.timing import speed_up, wall_times

SHAPES = ((8192, 512), (32768, 64))
ROUNDS = 40


def main() -> None:
    args = report.parser(__doc__, "cpu.csv").parse_args()
    rows = []
    for shape in SHAPES:
        x, z = (torch.randn(shape, requires_grad=True) for _ in "xz")
        w = torch.randn(shape[1], requires_grad=True)
        dy = torch.randn(shape)

        def step(norm, x=x, w=w, z=z, dy=dy):
            return lambda: torch.autograd.grad(norm(x, w, None, z), (x, w, z), dy)

        ways = {
            "plain PyTorch": step(gatednorm.rms_norm_ref),
            "gatednorm": step(gatednorm.rmsnorm_fn),
            "torch.compile": step(torch.compile(gatednorm.rms_norm_ref, dynamic=False)),
        }
        times = wall_times(ways, ROUNDS, warm_up=2)
        plain = times["plain PyTorch"]
        for name, way in ways.items():
            low, ratio, high = speed_up(plain, times[name])
            rows.append(
                {
                    "rows": shape[0],
                    "width": shape[1],
                    "way": name,
                    "ms": f"{statistics.median(times[name]):.2f}",
                    "speedup": f"{ratio:.2f}",
                    "low": f"{low:.2f}",
                    "high": f"{high:.2f}",
                    "peak_mib": f"{peak_memory(way) / 2**20:.1f}",
                }
            )
    report.show(rows, f"forward + backward, fp32, {torch.get_num_threads()} threads")
    report.write(args.out, rows, report.about("cpu"))


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes that `run` held at once on the CPU, beyond those held before, by the memory
    events in the trace of torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its start is logged to standard error
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()

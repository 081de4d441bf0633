"""The closed-form CPU path against the plain PyTorch expression and torch.compile of it.

    python -m benchmarks.cpu

Forward plus backward in fp32, and the peak memory beyond the inputs and gradients that every way
must hold. The speed-up is the median over rounds of the ratio within a round, so that a machine
which is slow for a while is slow for both; `low` and `high` are its quartiles.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import gatednorm
from benchmarks import report
from demo.inference.measure import peak_memory

SHAPES = ((8192, 512), (32768, 64))
ROUNDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=report.RESULTS / "cpu.csv")
    args = parser.parse_args()
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
            memory = peak_memory(lambda norm=norm: step(norm), x.device)
            ratios = [one / other for one, other in zip(plain, times[name], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "rows": shape[0],
                    "width": shape[1],
                    "way": name,
                    "ms": f"{statistics.median(times[name]):.2f}",
                    "speedup": f"{ratio:.2f}",
                    "low": f"{low:.2f}",
                    "high": f"{high:.2f}",
                    "peak_mib": f"{memory / 2**20:.1f}",
                }
            )
    report.show(rows, f"forward + backward, fp32, {torch.get_num_threads()} threads")
    report.write(args.out, rows, report.about("cpu"))


if __name__ == "__main__":
    main()

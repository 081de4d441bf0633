"""Both scans on the CPU against transformers' plain-torch functions, in one run.

    python -m benchmarks.scans                   # a table, and results/scans_cpu.csv

Forward plus backward at batch 8, 4 heads of 64, 1024 tokens, fp32; for SSD one group, state 64,
and transformers at whichever of three chunk sizes is its fastest. Rounds alternate between the
two, and the fastest round of each counts: on a shared machine noise only adds. Where other programs
use the cores, `--threads 1` is steadier: threads wait for each other at every operator.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks import report
from models.gated_delta_rule import chunk_gated_delta_rule
from models.ssd import chunk_ssd

BATCH, TOKENS, HEADS, DIM = 8, 1024, 4, 64


def gated_delta_rule_inputs() -> list[torch.Tensor]:
    q, k, v = (torch.randn(BATCH, TOKENS, HEADS, DIM) for _ in range(3))
    g, beta = -0.1 * torch.rand(BATCH, TOKENS, HEADS), torch.rand(BATCH, TOKENS, HEADS)
    return [q, F.normalize(k, dim=-1), v, g, beta]


def ssd_inputs() -> list[torch.Tensor]:
    x, dt = torch.randn(BATCH, TOKENS, HEADS, DIM), torch.rand(BATCH, TOKENS, HEADS)
    b, c = (torch.randn(BATCH, TOKENS, 1, DIM) for _ in range(2))
    return [x, dt, -torch.rand(HEADS), b, c, torch.randn(HEADS)]


def theirs_ssd(chunk_size):
    return lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D)


CASES = {
    "gated delta rule": (
        gated_delta_rule_inputs,
        {
            "ours": lambda *args: chunk_gated_delta_rule(*args)[0],
            "transformers": lambda *args: torch_chunk_gated_delta_rule(*args)[0],
        },
    ),
    "SSD": (
        ssd_inputs,
        {
            "ours": lambda x, dt, A, B, C, D: chunk_ssd(x, dt, A, B, C, D=D)[0],
            **{f"transformers chunk {size}": theirs_ssd(size) for size in (32, 64, 128)},
        },
    ),
}


def measure(make_inputs, functions, rounds: int) -> dict[str, float]:
    """Milliseconds of one forward plus backward, by function."""
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in make_inputs()]
    cotangent = torch.randn(BATCH, TOKENS, HEADS, DIM)
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            torch.autograd.grad(function(*inputs), inputs, cotangent)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of torch; by default all cores")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "scans_cpu.csv")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = []
    for scan, (make_inputs, functions) in CASES.items():
        times = measure(make_inputs, functions, args.rounds)
        ours = times.pop("ours")
        peer = min(times, key=times.get)
        rows.append(
            {
                "scan": scan,
                "ours_ms": round(ours, 1),
                "peer_ms": round(times[peer], 1),
                "times_as_fast": round(times[peer] / ours, 2),
                "peer": peer,
            }
        )
    report.show(rows)
    report.write(args.out, rows, report.about("cpu", "transformers"))


if __name__ == "__main__":
    main()

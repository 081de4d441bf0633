"""Both scans on the CPU against transformers' plain-torch functions, in one run.

    python -m benchmarks.scans                   # a table, and results/scans_cpu.csv

Forward plus backward at batch 8, 4 heads of 64, 1024 tokens, fp32; for SSD one group, state 64,
and transformers at whichever of three chunk sizes is its fastest. Rounds alternate between the
two, and the fastest round of each counts: on a shared machine noise only adds. Where other programs
use the cores, `--threads 1` is steadier: threads wait for each other at every operator.
"""

import torch
import torch.nn.functional as F

from benchmarks import report
from gatednorm.bench.timing import wall_times
from models.gated_delta_rule import chunk_gated_delta_rule
from models.ssd import chunk_ssd

BATCH, TOKENS, HEADS, DIM = 8, 1024, 4, 64


def delta_inputs(batch, tokens, heads, dim_k, dim_v, **kind) -> list[torch.Tensor]:
    """q, k, v, g, beta of a gated delta rule; `kind` is the dtype and device of the first three."""
    q, k = (torch.randn(batch, tokens, heads, dim_k, **kind) for _ in range(2))
    v = torch.randn(batch, tokens, heads, dim_v, **kind)
    g, beta = torch.rand(2, batch, tokens, heads, device=v.device).unbind()
    inputs = (q, F.normalize(k, dim=-1), v, -0.1 * g, beta)
    return [x.detach().requires_grad_() for x in inputs]


def ssd_inputs(batch, tokens, heads, dim, state, **kind) -> list[torch.Tensor]:
    """x, dt, A, B, C, D of SSD with one group; `kind` is the dtype and device of x, B and C."""
    x = torch.randn(batch, tokens, heads, dim, **kind)
    b, c = torch.randn(2, batch, tokens, 1, state, **kind).unbind()
    dt = torch.rand(batch, tokens, heads, device=x.device)
    a, d = torch.rand(2, heads, device=x.device).unbind()
    return [x.detach().requires_grad_() for x in (x, dt, -a, b, c, d)]


def cases() -> dict:
    """By scan: its inputs, and ours and transformers' function of them."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def theirs(size):
        return lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, size, D=D)

    delta = {
        "ours": lambda *args: chunk_gated_delta_rule(*args)[0],
        "transformers": lambda *args: torch_chunk_gated_delta_rule(*args)[0],
    }
    ssd = {
        "ours": lambda x, dt, A, B, C, D: chunk_ssd(x, dt, A, B, C, D=D)[0],
        **{f"transformers chunk {size}": theirs(size) for size in (32, 64, 128)},
    }
    sizes = (BATCH, TOKENS, HEADS, DIM, DIM)
    return {"gated delta rule": (delta_inputs(*sizes), delta), "SSD": (ssd_inputs(*sizes), ssd)}


def main() -> None:
    parser = report.parser(__doc__, "scans_cpu.csv")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of torch; by default all cores")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for scan, (inputs, functions) in cases().items():
        cotangent = torch.randn(BATCH, TOKENS, HEADS, DIM)

        def step(function, inputs=inputs, cotangent=cotangent):
            return lambda: torch.autograd.grad(function(*inputs), inputs, cotangent)

        steps = {name: step(function) for name, function in functions.items()}
        times = {name: min(ms) for name, ms in wall_times(steps, args.rounds).items()}
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

"""The gated norm and the projection after it, together and apart: GPU time and memory held.

    python -m benchmarks.linear               # a table, and results/linear.csv; needs a CUDA GPU

bf16, forward and backward in one CUDA graph. `apart` is `rmsnorm_fn` and `F.linear`, `together` is
`gated_norm_linear`, which keeps no output of the norm; `FP8` is that with `precision="fp8"`; `FLA`
is flash-linear-attention's `rms_norm_swish_gate_linear` where it is installed (gate after the norm
alone).
"""

import importlib.util
import statistics

import torch
import torch.nn.functional as F

from benchmarks import report
from gatednorm import gated_norm_linear, rmsnorm_fn
from gatednorm.bench.timing import graph_time, rotated

# tokens, heads, width of a norm row, columns of the result, norm_before_gate
CASES = (
    (16384, 1, 4096, 4096, True),
    (16384, 1, 4096, 4096, False),
    (16384, 1, 5120, 2560, False),
    (8192, 32, 128, 2048, True),
    (16384, 1, 2048, 1024, True),
    (4096, 1, 8192, 4096, False),
)

PEERS = ("flash-linear-attention",) if importlib.util.find_spec("fla") else ()


def functions(heads: int, norm_before_gate: bool) -> dict:
    options = {"norm_before_gate": norm_before_gate}

    def apart(x, z, w, linear):
        y = rmsnorm_fn(x, w, None, z, **options)
        return F.linear(y.flatten(-2) if heads > 1 else y, linear)

    found = {
        "apart": apart,
        "together": lambda x, z, w, linear: gated_norm_linear(x, z, w, linear, **options),
    }
    if hasattr(F, "scaled_mm") and torch.cuda.get_device_capability()[0] == 9:
        found["FP8"] = lambda x, z, w, linear: gated_norm_linear(
            x, z, w, linear, precision="fp8", **options
        )
    if norm_before_gate and heads == 1 and PEERS:
        from fla.modules.fused_norm_gate import rms_norm_swish_gate_linear

        found["FLA"] = lambda x, z, w, linear: rms_norm_swish_gate_linear(
            x, z, w, None, linear, None
        )
    return found


def held(function, leaves) -> float:
    """MiB that the graph holds between forward and backward, without inputs and output."""
    function(*leaves)  # the first call of a product allocates a workspace
    before = torch.cuda.memory_allocated()
    out = function(*leaves)
    return (torch.cuda.memory_allocated() - before - out.numel() * out.element_size()) / 2**20


def measure(tokens: int, heads: int, width: int, columns: int, norm_before_gate: bool) -> dict:
    """One row of the table."""

    def randn(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    shape = (tokens, heads, width) if heads > 1 else (tokens, width)
    leaves = (randn(*shape), randn(*shape), randn(width), randn(columns, heads * width))
    dout = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    row = {
        "case": f"{tokens} x {f'{heads} x ' if heads > 1 else ''}{width} -> {columns}",
        "gate": "after" if norm_before_gate else "before",
    }
    calls = functions(heads, norm_before_gate)
    times = {name: [] for name in calls}
    # In turns that begin with another each time: products heat a GPU, which slows what comes next.
    for number in range(2 * len(calls)):
        for name in rotated(calls, number):
            call = calls[name]
            step = graph_time(lambda call=call: torch.autograd.grad(call(*leaves), leaves, dout))
            times[name].append(step)
    for name, call in calls.items():
        row[f"{name}_us"] = round(statistics.median(times[name]), 1)
        row[f"{name}_held_mib"] = round(held(call, leaves), 1)
    row["ratio"] = round(row["together_us"] / row["apart_us"], 3)
    if "FP8" in calls:
        row["FP8_faster"] = round(row["apart_us"] / row["FP8_us"], 2)
    return row


def main() -> None:
    parser = report.parser(__doc__, "linear.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here, and this benchmark has no other way to run")
    rows = [measure(*case) for case in CASES]
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    report.show(rows)
    report.write(args.out, rows, report.about("cuda", *PEERS))


if __name__ == "__main__":
    main()

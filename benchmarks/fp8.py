"""FP8 output of the norm: GPU time against the ceiling of its own traffic, and against the norm and
a separate kernel that quantises.

    python -m benchmarks.fp8                  # a table, and results/fp8.csv; needs an H100 or H200

bf16 inputs, five bytes an element. `apart` is `rms_norm_gated` and `quantize_fp8_ref` compiled by
torch.compile, which writes and reads the result in bf16 between them. The ceiling is the best
elementwise kernel that reads two tensors of bf16 and writes one of FP8. Groups of 64 channels, and
heads with one scale a row, take a second kernel.
"""

import torch

from benchmarks import report
from gatednorm import quantize_fp8_ref, rms_norm_gated, rms_norm_gated_fp8
from gatednorm.bench.timing import ceiling, graph_time
from gatednorm.kernels.ceilings import forward_ways

# tokens, heads, width, group_size, norm_before_gate, scaling
CASES = (
    *(
        (tokens, 1, width, None, after, scaling)
        for tokens, width in ((16384, 4096), (8192, 8192), (4096, 16384))
        for after in (True, False)
        for scaling in ("1x128", "rowwise", "tensorwise")
    ),
    (8192, 32, 128, None, True, "1x128"),
    (8192, 32, 128, None, True, "tensorwise"),
    (8192, 32, 128, None, True, "rowwise"),
    (8192, 1, 8192, 1024, False, "1x128"),
    (8192, 1, 8192, 1024, False, "rowwise"),
    (16384, 1, 5120, None, False, "1x128"),
    (16384, 64, 64, None, True, "1x128"),
)


def measure(
    tokens: int, heads: int, width: int, group_size: int | None, norm_before_gate: bool,
    scaling: str,
) -> dict:  # fmt: skip
    """One row of the table."""
    torch.compiler.reset()
    quantize = torch.compile(lambda y: quantize_fp8_ref(y.float(), scaling, scale), dynamic=False)
    shape = (tokens, heads, width) if heads > 1 else (tokens, width)
    x, z = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w = torch.randn(width, device="cuda")
    scale = torch.tensor(0.02, device="cuda") if scaling == "tensorwise" else None
    options = {"group_size": group_size, "norm_before_gate": norm_before_gate}

    def ours():
        return rms_norm_gated_fp8(
            x, w, None, z, **options, scaling=scaling, scale=scale, heads=heads > 1
        )

    def apart():
        y = rms_norm_gated(x, w, None, z, **options)
        return quantize(y.view(tokens, -1))

    flat = (x.view(tokens, -1), z.view(tokens, -1), ours()[0].view(tokens, -1))
    floor, fp8, two = ceiling(forward_ways(*flat)), graph_time(ours), graph_time(apart)
    return {
        "case": f"{tokens} x {f'{heads} x ' if heads > 1 else ''}{width}",
        "groups": width // (group_size or width),
        "gate": "after" if norm_before_gate else "before",
        "scaling": scaling,
        "ceiling_us": round(floor, 1),
        "ours_us": round(fp8, 1),
        "ratio": round(fp8 / floor, 3),
        "apart_us": round(two, 1),
        "faster": round(two / fp8, 2),
    }


def main() -> None:
    args = report.parser(__doc__, "fp8.csv").parse_args()
    rows = [measure(*case) for case in CASES]
    report.show(rows)
    report.write(args.out, rows, report.about("cuda"))


if __name__ == "__main__":
    main()

"""How the exact mode's product and the gated delta rule multiply fp32: as three products of tf32,
which NVIDIA's tensor cores take, faster than fused multiply-adds. Why SSD does not is in
benchmarks/NOTES.md."""

import torch
import triton.language as tl

PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

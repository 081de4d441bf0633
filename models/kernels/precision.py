"""How the exact mode's product and the gated delta rule multiply fp32: as three products of tf32,
which NVIDIA's tensor cores take, faster than fused multiply-adds and as close to float64."""

import torch
import triton.language as tl

PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

"""Every schedule of the kernels once: `compute-sanitizer python tests/helpers/sanitized.py`, or
those of the `SHAPES` that are named after it, so that several processes can share them.

The caller turns PyTorch's caching allocator off (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that each
tensor is an allocation of its own and a read one element too far is seen.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gatednorm
from gatednorm import fp8
from gatednorm.options import make_options

# rows, group_size, groups: tiles of many rows, two pieces, registers, reload, chunks; odd sizes.
SHAPES = {
    "many_rows_a_tile": (37, 64, 1),
    "odd_width": (19, 129, 1),
    "groups": (9, 64, 3),
    "row_a_tile": (5, 2048, 1),
    "two_pieces": (5, 5120, 1),
    "two_odd_pieces": (3, 1537, 1),
    "reload": (3, 16_384, 1),
    "chunks": (3, 17_001, 1),
}


def run(rows: int, group_size: int, groups: int, *, layer_norm: bool, gate_after: bool) -> None:
    """Forward, backward and inference with weight and bias; dense, and as odd slices of more."""
    width = group_size * groups
    options = {
        "eps": 1e-5, "group_size": group_size, "norm_before_gate": gate_after,
        "is_rms_norm": not layer_norm,
    }  # fmt: skip
    weight, bias = (torch.randn(width, device="cuda") for _ in range(2))
    bias = bias if layer_norm else None
    dense = [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(3)]
    sliced = [torch.randn(rows, width + 3, device="cuda").bfloat16()[:, 1:-2] for _ in range(3)]
    for x, z, dy in (dense, sliced):
        y, mean, rstd = gatednorm.layernorm_forward(x, weight, bias, z, **options)
        gatednorm.layernorm_backward(dy, x, weight, bias, z, mean, rstd, **options)
        if not layer_norm:
            again = gatednorm.rms_norm_gated(x, weight, None, z, 1e-5, group_size, gate_after)
            assert torch.equal(again, y)
        assert y.isfinite().all()
        given = (x, weight, bias, z)
        # An odd number of columns, since racecheck sees races in the kernels that cuBLAS has for 8.
        linear = torch.randn(7, width, device="cuda").bfloat16().requires_grad_()
        out = gatednorm.gated_norm_linear(x, z, weight, linear, bias=bias, **options)
        out.backward(torch.ones_like(out))  # the backward kernel writes y once more
        fits = width % 128 == 0
        for scaling in ("tensorwise", "rowwise", "1x128")[: 2 + fits]:
            scale = torch.tensor(0.02, device="cuda") if scaling == "tensorwise" else None
            y, _ = gatednorm.rms_norm_gated_fp8(*given, **options, scaling=scaling, scale=scale)
            assert y.float().isfinite().all()
        if width % 32 == 0:
            tokens = [t.unflatten(-1, (2, -1)) for t in (x, z)]
            gatednorm.rms_norm_gated_fp8(tokens[0], z=tokens[1], scaling="rowwise", heads=True)
        if fits:
            made = make_options(*options.values(), "silu", False, "fp32", None, None)
            y, _ = fp8.norm_columns(*given, mean, rstd, made, False)
            assert y.float().isfinite().all()
            fp8.quantize(x.contiguous(), rows=True, columns=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or SHAPES:
        for layer_norm in (False, True):
            for gate_after in (True, False):
                run(*SHAPES[name], layer_norm=layer_norm, gate_after=gate_after)
        print(name, flush=True)
    torch.cuda.synchronize()

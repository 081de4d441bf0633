"""torchtitan's override: its own Qwen3.5 with and without it."""

import pytest
import torch
import torch.nn.functional as F

import gatednorm
from installed import install, run

# What torchtitan.models.qwen3_5 imports, and no more of what torchtitan asks for.
PACKAGES = (
    "torchtitan==0.3.0", "spmd_types==0.2.3", "tyro==1.0.17", "docstring_parser==0.18.0",
    "typeguard==4.6.1", "fla-core==0.6.0", "flash-linear-attention==0.6.0",
)  # fmt: skip


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=["w_fp32", "w_bf16"])
def test_the_rounding_of_torchtitan(w_dtype):
    """Its class in plain PyTorch: rounded after the weight, and again after the gate."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(500, 96, generator=generator).bfloat16() for _ in range(2))
    w = torch.randn(96, generator=generator).to(w_dtype)
    h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    want = ((w.float() * h).bfloat16() * F.silu(z.float())).bfloat16()
    for function in (gatednorm.rmsnorm_fn, gatednorm.rms_norm_ref):
        assert torch.equal(function(x, w, None, z, numerics="torchtitan"), want)
        assert not torch.equal(function(x, w, None, z), want)


@pytest.mark.slow
def test_a_model_with_and_without_the_override(tmp_path):
    """torchtitan_models.py says what stands in for what a CPU lacks."""
    out = run(install(tmp_path, *PACKAGES), "torchtitan_models.py")
    assert out.splitlines() == [
        "6 norms replaced; a layer's bits are the same in fp32",
        "a norm's bits are the same in nine mixes of dtypes; compiled in one graph",
        "two ranks: the result and the gradients of one",
    ]

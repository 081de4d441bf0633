"""vLLM's names: its `mamba/ops/layernorm_gated.py` and its `fla/ops/layernorm_guard.py`.

    from gatednorm.compat.vllm import RMSNormGated, layernorm_fn, rms_norm_gated, rmsnorm_fn

vLLM has a second function called `rms_norm_gated`, with the gate as its second argument, in its
`fused_norm_gate.py`: that one is in :mod:`gatednorm.compat.fla`. Signatures of vLLM 0.33
(github.com/vllm-project/vllm).
"""

from torch import Tensor

from ..reference import rms_norm_ref
from .common import LayerNormFn, layer_norm_fwd
from .common import layernorm as layernorm_fn
from .common import rmsnorm as rmsnorm_fn
from .fla import LayerNormGated, RMSNormGated

__all__ = [
    "LayerNormFn",
    "LayerNormGated",
    "RMSNormGated",
    "layer_norm_fwd",
    "layernorm_fn",
    "rms_norm_gated",
    "rms_norm_ref",
    "rmsnorm_fn",
]


def rms_norm_gated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`rmsnorm_fn` as vLLM's Mamba2 mixer calls it."""
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)

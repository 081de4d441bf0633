"""vLLM's names: its `mamba/ops/layernorm_gated.py` and its `fla/ops/layernorm_guard.py`.

    from gatednorm.compat.vllm import RMSNormGated, layernorm_fn, rms_norm_gated, rmsnorm_fn

vLLM has a second function called `rms_norm_gated`, with the gate as its second argument, in its
`fused_norm_gate.py`: that one is in :mod:`gatednorm.compat.fla`. Signatures of vLLM 0.33
(github.com/vllm-project/vllm).
"""

import torch

from ..reference import rms_norm_ref
from . import common
from .common import LayerNormFn, layer_norm_fwd
from .common import layernorm as layernorm_fn
from .mamba import LayerNorm as LayerNormGated

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


def rmsnorm_fn(
    x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, activation="swish"
):
    """:func:`layernorm_fn` with RMS norm."""
    return common.gated_norm(
        x, weight, bias, z, eps, group_size, norm_before_gate, True, activation
    )


def rms_norm_gated(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """:func:`rmsnorm_fn` as vLLM's Mamba2 mixer calls it."""
    return common.gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class RMSNormGated(common.GatedNorm):
    """Gated RMS norm, with the gate BEFORE the norm by default, as in vLLM."""

    is_rms_norm = True

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "swish",
    ):
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype, activation)

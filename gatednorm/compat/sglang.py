"""SGLang's names: its `fla/layernorm_gated.py`, which its Mamba2 mixer and its Qwen models import.

    from gatednorm.compat.sglang import RMSNorm as RMSNormGated, layernorm_fn, rms_norm_gated

SGLang has a second function called `rms_norm_gated`, with a residual, in its `fused_norm_gate.py`:
that one is in :mod:`gatednorm.compat.fla`. Signatures of SGLang 0.5.23
(github.com/sgl-project/sglang).
"""

from torch import Tensor

from ..reference import rms_norm_ref
from .common import LayerNormFn
from .common import layernorm as layernorm_fn
from .mamba import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "LayerNormFn", "RMSNorm", "layernorm_fn", "rms_norm_gated", "rms_norm_ref"]


def rms_norm_gated(
    *,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> Tensor:
    """:func:`layernorm_fn` by keyword; LAYER norm unless `is_rms_norm` is set, as in SGLang."""
    return layernorm_fn(
        x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation
    )

"""mamba_ssm's names: `mamba_ssm.ops.triton.layernorm_gated`.

    from gatednorm.compat.mamba import RMSNorm as RMSNormGated, rmsnorm_fn

`_layer_norm_fwd` and `_layer_norm_bwd` are private there, but mamba_ssm's combined scan imports
them. Signatures of github.com/state-spaces/mamba at e9594ce.
"""

from ..reference import rms_norm_ref
from . import common
from .common import LayerNormFn
from .common import layer_norm_bwd as _layer_norm_bwd
from .common import layer_norm_fwd as _layer_norm_fwd
from .common import layernorm as layernorm_fn
from .common import rmsnorm as rmsnorm_fn

__all__ = [
    "LayerNorm",
    "LayerNormFn",
    "RMSNorm",
    "_layer_norm_bwd",
    "_layer_norm_fwd",
    "layernorm_fn",
    "rms_norm_ref",
    "rmsnorm_fn",
]


class LayerNorm(common.GatedNorm):
    """Gated layer norm; arguments as :class:`gatednorm.LayerNorm`."""


class RMSNorm(common.GatedNorm):
    """Gated RMS norm, with the gate after the norm by default; arguments as
    :class:`gatednorm.RMSNorm`."""

    is_rms_norm = True

"""gatednorm: `norm(x) * act(z)` and `norm(x * act(z))`, forward and backward, one pair of kernels.

Training: `RMSNorm`, `LayerNorm`, `rmsnorm_fn`, `layernorm_fn`, `LayerNormFn`.
Inference: `rms_norm_gated`; in FP8 `rms_norm_gated_fp8`.
With the projection after it: `gated_norm_linear`, `GatedNormLinear`; for two modules that are there
`norm_then_linear`, where the projection's class is a `NotesHooks`.
Models and packages that exist: `patch`.
For your own autograd Function: `layernorm_forward`, `layernorm_backward`.
The equation in plain PyTorch: `rms_norm_ref`, `gated_norm_ref`; how it becomes
FP8: `quantize_fp8_ref`.
"""

from .autograd import LayerNormFn
from .fp8 import rms_norm_gated_fp8
from .functional import (
    NORM_PATHS,
    layernorm_backward,
    layernorm_fn,
    layernorm_forward,
    rms_norm_gated,
    rmsnorm_fn,
)
from .linear import GatedNormLinear, gated_norm_linear, norm_then_linear
from .modules import LayerNorm, NotesHooks, RMSNorm
from .patching import patch
from .reference import gated_norm_ref, quantize_fp8_ref, rms_norm_ref

__version__ = "0.2.0"

__all__ = [
    "NORM_PATHS",
    "GatedNormLinear",
    "LayerNorm",
    "LayerNormFn",
    "NotesHooks",
    "RMSNorm",
    "gated_norm_linear",
    "gated_norm_ref",
    "layernorm_backward",
    "layernorm_fn",
    "layernorm_forward",
    "norm_then_linear",
    "patch",
    "quantize_fp8_ref",
    "rms_norm_gated",
    "rms_norm_gated_fp8",
    "rms_norm_ref",
    "rmsnorm_fn",
]

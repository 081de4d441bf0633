"""flash-linear-attention's names: `fla.modules.fused_norm_gate` and `fla.modules.layernorm_gated`.

    from gatednorm.compat.fla import FusedRMSNormGated   # was: from fla.modules import ...

SGLang's and vLLM's copies of the first file have the same names and arguments. Signatures and
defaults of flash-linear-attention 0.6.0 (github.com/fla-org/flash-linear-attention).
"""

import torch
from torch import Tensor

from ..options import make_options
from ..reference import rms_norm_ref
from . import common
from .common import LayerNormFn, layer_norm_bwd, layer_norm_fwd
from .common import layernorm as layernorm_fn
from .common import rmsnorm as rmsnorm_fn

__all__ = [
    "FusedLayerNormGated",
    "FusedLayerNormGatedLinear",
    "FusedLayerNormSwishGate",
    "FusedLayerNormSwishGateLinear",
    "FusedRMSNormGated",
    "FusedRMSNormGatedLinear",
    "FusedRMSNormSwishGate",
    "FusedRMSNormSwishGateLinear",
    "LayerNormFn",
    "LayerNormGated",
    "RMSNormGated",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "layer_norm_gated",
    "layer_norm_swish_gate_linear",
    "layernorm_fn",
    "rms_norm_gated",
    "rms_norm_ref",
    "rms_norm_swish_gate_linear",
    "rmsnorm_fn",
]


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm(x + residual) * w * act(g)`; see :func:`gatednorm.compat.common.fused_gated_norm`.

    Args:
        x, residual: `[..., D]`.
        g: the gate, `[..., D]`, of as many rows as `x`.
        weight, bias: `[D]` or None.
        prenorm: also return the sum `x + residual`.
    """
    return common.fused_gated_norm(
        x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps, True
    )


def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rms_norm_gated` with layer norm."""
    return common.fused_gated_norm(
        x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps, False
    )


def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rms_norm_gated` with SiLU, then `y @ linear_weight^T + linear_bias`.

    Args:
        linear_weight: `[N, D]`.
        linear_bias: `[N]` or None.
    """
    return common.fused_gated_norm_linear(
        x, g, norm_weight, norm_bias, linear_weight, linear_bias, residual, prenorm,
        residual_in_fp32, eps, True,
    )  # fmt: skip


def layer_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rms_norm_swish_gate_linear` with layer norm."""
    return common.fused_gated_norm_linear(
        x, g, norm_weight, norm_bias, linear_weight, linear_bias, residual, prenorm,
        residual_in_fp32, eps, False,
    )  # fmt: skip


class _Fused(common.Affine):
    """What the eight fused modules share: parameters, and how they print."""

    is_rms_norm = True
    activation: str

    def _set_up(
        self,
        hidden_size: int,
        elementwise_affine: bool,
        bias: bool,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        make_options(eps, None, True, self.is_rms_norm, self.activation, False, "fp32", None)
        self.hidden_size = hidden_size
        self.elementwise_affine = elementwise_affine
        self.eps = eps
        bias = elementwise_affine and bias
        self._add_parameters(hidden_size, elementwise_affine, bias, device, dtype)

    def extra_repr(self) -> str:
        affine = "" if self.elementwise_affine else ", elementwise_affine=False"
        return f"{self.hidden_size}{affine}, eps={self.eps}, activation={self.activation}"


class FusedRMSNormGated(_Fused):
    """`rms_norm(x + residual) * w * act(g)` over the last dimension.

    Args:
        hidden_size: `D`, the channels of the last dimension.
        elementwise_affine: whether there is a weight.
        eps: added to the mean square inside the root.
        activation: `swish`, `silu` or `sigmoid`.
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = activation
        self._set_up(hidden_size, elementwise_affine, False, eps, device, dtype)

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`x`, `residual` `[..., D]`, `g` of as many rows, to `[..., D]`; with `prenorm` also the
        sum of `x` and `residual`."""
        return common.fused_gated_norm(
            x, g, self.weight, self.bias, self.activation, residual, prenorm, residual_in_fp32,
            self.eps, self.is_rms_norm,
        )  # fmt: skip


class FusedRMSNormSwishGate(FusedRMSNormGated):
    """:class:`FusedRMSNormGated` without a choice of the activation."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, eps, device=device, dtype=dtype)


class FusedLayerNormGated(_Fused):
    """:class:`FusedRMSNormGated` with layer norm, and a bias where asked for."""

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = activation
        self._set_up(hidden_size, elementwise_affine, bias, eps, device, dtype)

    forward = FusedRMSNormGated.forward


class FusedLayerNormSwishGate(FusedLayerNormGated):
    """:class:`FusedLayerNormGated` without a choice of the activation."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, elementwise_affine, bias, "swish", eps, device, dtype)


class FusedRMSNormGatedLinear(_Fused):
    """The RMS norm with SiLU and a projection whose weight is passed to `forward`."""

    activation = "swish"

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._set_up(hidden_size, elementwise_affine, False, eps, device, dtype)

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`x`, `residual` `[..., D]`, `g` of as many rows, `weight` `[N, D]`, `bias` `[N]`, to
        `[..., N]`; with `prenorm` also the sum of `x` and `residual`."""
        return common.fused_gated_norm_linear(
            x, g, self.weight, self.bias,
            weight,  # type: ignore[arg-type]  # optional by its signature alone: None is an error
            bias, residual, prenorm, residual_in_fp32, self.eps, self.is_rms_norm,
        )  # fmt: skip


class FusedRMSNormSwishGateLinear(FusedRMSNormGatedLinear):
    """Another name of :class:`FusedRMSNormGatedLinear`."""


class FusedLayerNormGatedLinear(FusedRMSNormGatedLinear):
    """:class:`FusedRMSNormGatedLinear` with layer norm."""

    is_rms_norm = False


class FusedLayerNormSwishGateLinear(FusedLayerNormGatedLinear):
    """Another name of :class:`FusedLayerNormGatedLinear`."""


# ---- fla.modules.layernorm_gated ----


class LayerNormGated(common.GatedNorm):
    """Gated layer norm over groups of the last dimension, with the gate after the norm by default.

    Arguments as :class:`gatednorm.LayerNorm`.
    """


class RMSNormGated(common.GatedNorm):
    """Gated RMS norm over groups of the last dimension, with the gate BEFORE the norm by default,
    as in flash-linear-attention and vLLM; mamba_ssm's class has it after."""

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

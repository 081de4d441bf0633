"""transformers' classes of gated norms: what each computes, as data, and a `forward` for each kind.

Read in transformers 4.57 to 5.24. Nothing is imported from there; docs/numerics.md explains
`numerics`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compat.common import gated_norm


class Family(NamedTuple):
    """What every instance of a class computes, unless the instance itself has a setting for it.

    `forward(self, hidden_states, gate=None)` takes the place of the class's own. Of the instance it
    reads `weight` `[D]`, `variance_epsilon` and the settings that its family has: `group_size`, or
    `activation`, or `n_groups` and `norm_before_gate`.
    """

    numerics: str
    activation: str
    norm_before_gate: bool
    forward: Callable[..., Tensor]


def _mamba2(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """`norm(x * silu(gate))` in the dtype of x, times the weight in the wider dtype of the two."""
    weight = self.weight
    return gated_norm(
        hidden_states, weight, None, gate, self.variance_epsilon,
        getattr(self, "group_size", None),  # Mamba, Bamba and Granite have groups from 5.23 on
        norm_before_gate=False, is_rms_norm=True, activation="silu", numerics="mamba2",
        out_dtype=torch.promote_types(hidden_states.dtype, weight.dtype),
    )  # fmt: skip


def _per_head(numerics: str) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """`norm(x) * w * act(gate)` over the last dimension."""
        return gated_norm(
            hidden_states, self.weight, None, gate, self.variance_epsilon, None,
            norm_before_gate=True, is_rms_norm=True, numerics=numerics,
            activation=getattr(self, "activation", "silu"),  # older releases had no choice
        )  # fmt: skip

    return forward


def _falcon_h1(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """`norm(x) * w * silu(gate)`, or `norm(x * silu(gate)) * w`, in `n_groups` groups."""
    return gated_norm(
        hidden_states, self.weight, None, gate, self.variance_epsilon,
        hidden_states.shape[-1] // self.n_groups, self.norm_before_gate, is_rms_norm=True,
        activation="silu",
    )  # fmt: skip


_MAMBA2 = Family("mamba2", "silu", False, _mamba2)
_QWEN3_NEXT = Family("qwen3_next", "silu", True, _per_head("qwen3_next"))
_KIMI_LINEAR = Family("fp32", "sigmoid", True, _per_head("fp32"))

# By module and name: other code has classes of the same name that compute something else.
FAMILIES: dict[tuple[str, str], Family] = {
    (f"transformers.models.{model}.modeling_{model}", f"{prefix}RMSNormGated"): family
    for model, prefix, family in (
        ("mamba2", "Mamba", _MAMBA2),
        ("bamba", "Bamba", _MAMBA2),
        ("zamba2", "Zamba2", _MAMBA2),
        ("nemotron_h", "NemotronH", _MAMBA2),
        ("granitemoehybrid", "GraniteMoeHybrid", _MAMBA2),
        ("qwen3_next", "Qwen3Next", _QWEN3_NEXT),
        ("qwen3_5", "Qwen3_5", _QWEN3_NEXT),
        ("qwen3_5_moe", "Qwen3_5Moe", _QWEN3_NEXT),
        ("olmo_hybrid", "OlmoHybrid", _QWEN3_NEXT),
        ("qwen4_exp", "Qwen4ExpText", _QWEN3_NEXT),
        ("kimi_linear", "KimiLinear", _KIMI_LINEAR),
        ("bailing_hybrid", "BailingHybrid", _KIMI_LINEAR),
        ("glm5_next", "Glm5NextText", _KIMI_LINEAR),
        ("lara_mini", "LaraMini", _KIMI_LINEAR._replace(activation="silu")),
        ("falcon_h1", "FalconH1", Family("fp32", "silu", True, _falcon_h1)),
    )
}

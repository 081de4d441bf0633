"""torchtitan's override: the gated norm of its Qwen3.5, with the same parameter and checkpoints.

    torchrun ... -m torchtitan.train --module qwen3_5 --config qwen35_debugmodel \\
        --override.imports gatednorm.compat.torchtitan.gated_norm

Written for torchtitan 0.3.0 (github.com/pytorch/torchtitan, `torchtitan/config/override.py`).
"""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.qwen3_5.model import RMSNormGated

from ..functional import rmsnorm_fn


class GatedNorm(RMSNormGated):
    """torchtitan's class with another `forward`; it keeps `weight` `[D]`, `eps` and the names of
    the arguments, which a model's sharding refers to."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNormGated.Config):
        pass

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`x`, `gate` `[..., D]`, plain or DTensors that are sharded in any dimension but the last,
        to `[..., D]` with the dtype and placements of `x`."""
        return rmsnorm_fn(x, self.weight, None, gate, self.eps, numerics="torchtitan")


@override(target=RMSNormGated.Config, exact=True, description="gated RMS norm in one kernel")
def gated_norm(config: RMSNormGated.Config) -> GatedNorm.Config:
    """The config of a norm as one of ours, with everything that it says."""
    return derive(config, GatedNorm.Config)

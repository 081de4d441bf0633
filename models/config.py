"""What describes a language model: one dataclass for each mixer. A model is made from it and keeps
it; the YAML files, a run's config.yaml and published checkpoints all become one of these.

Imports nothing heavy, so that a command can check its arguments at once.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from models.ranges import as_written, check_ranges, number, one_of


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What both language models have.

    Attributes:
        vocab_size: 256 for bytes.
        hidden_size, num_layers: width of the residual stream, and the number of blocks.
        mlp_ratio: 0 for no MLP; else its inner size is ``2 / 3 * mlp_ratio * hidden_size``,
            rounded up to a multiple of 256.
        mlp_size: the inner size itself, instead of ``mlp_ratio``.
        tie_embeddings: whether the head is the embedding.
        norm_eps: inside the root of every norm.
    Raises:
        ValueError: for a value out of its range; names value, rule and remedy.
    """

    vocab_size: int = number(256, at_least=1)
    hidden_size: int = number(at_least=1)
    num_layers: int = number(at_least=1)
    mlp_ratio: float = number(0.0, at_least=0)
    mlp_size: int | None = number(None, at_least=1)
    tie_embeddings: bool = True
    norm_eps: float = number(1e-5, above=0)

    def __post_init__(self) -> None:
        check_ranges(self)

    def mixer_args(self) -> dict[str, Any]:
        """The arguments of the mixer itself: the fields that only the subclass has."""
        shared = {f.name for f in fields(ModelConfig)}
        return {name: value for name, value in asdict(self).items() if name not in shared}


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(ModelConfig):
    """A language model of `models.gated_deltanet.GatedDeltaNet`, which explains the fields."""

    num_heads: int = number(at_least=1)
    head_dim: int = number(at_least=1)
    expand_v: float = number(2.0, above=0)
    num_v_heads: int | None = number(None, at_least=1)
    conv_size: int = number(4, at_least=1)
    conv_bias: bool = False
    use_gate: bool = True
    gate_activation: str = one_of("silu", "sigmoid", default="silu")
    allow_neg_eigval: bool = False


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(ModelConfig):
    """A language model of `models.mamba2.Mamba2`, which explains the fields."""

    d_state: int = number(at_least=1)
    head_dim: int = number(at_least=1)
    expand: int = number(2, at_least=1)
    n_groups: int = number(1, at_least=1)
    norm_groups: int | None = number(None, at_least=1)
    conv_size: int = number(4, at_least=1)
    conv_bias: bool = True
    bias: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = self.dt_limit
        numbers = isinstance(limits, list | tuple) and len(limits) == 2
        if not numbers or not 0 <= limits[0] < limits[1]:
            raise ValueError(
                "dt_limit must be two numbers from 0, the second above the first, got "
                f"{as_written(limits)}; use for example [0,.inf]"
            )
        object.__setattr__(self, "dt_limit", tuple(limits))  # a list, as YAML reads it

"""One way to make a small language model."""

import torch

from models.config import GatedDeltaNetConfig, Mamba2Config
from models.language_model import LanguageModel

CONFIGS = {"gated_deltanet": GatedDeltaNetConfig, "mamba2": Mamba2Config}
MIXERS = tuple(CONFIGS)
SMALL = {
    "gated_deltanet": {"num_heads": 2, "head_dim": 8},
    "mamba2": {"d_state": 8, "head_dim": 8},
}


def small_model(mixer: str, *, norm_path: str = "training", **options) -> LanguageModel:
    """The same weights at each call; `options` are fields of the mixer's config."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "num_layers": 2, **SMALL[mixer]}
    return LanguageModel(CONFIGS[mixer](**{**sizes, **options}), norm_path=norm_path)

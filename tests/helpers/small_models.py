"""One way to make a small language model."""

import torch
import torch.nn.functional as F

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


def learn(model: LanguageModel, steps: int) -> tuple[float, torch.Tensor]:
    """The last step's loss and tokens, each of which follows from the two before it: that takes the
    convolution or the state. Guessing one of eight is a loss of log(8) = 2.08."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        text = torch.randint(0, 8, (8, 24), generator=generator)
        for t in range(2, 24):
            text[:, t] = (3 * text[:, t - 1] + text[:, t - 2] + 1) % 8
        loss = F.cross_entropy(model(text)[0][:, 1:-1].flatten(0, 1), text[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), text

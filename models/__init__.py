"""Two blocks around the gated norm, Gated DeltaNet and Mamba-2: their scans, a language model, and
its generation. What train.py and infer.py need around them is in demo/."""

from importlib import import_module

__all__ = ["token_log_probs"]


def __getattr__(name: str):
    # Imported on first use: models.config must not need torch.
    if name in __all__:
        return getattr(import_module("models.log_probs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

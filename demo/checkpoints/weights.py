"""The tensors of a checkpoint, read without running code of the file, and the model that they
should fit, made without allocating it."""

import math
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from demo.config.errors import first_line
from models.config import ModelConfig
from models.language_model import LanguageModel


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and the metadata. Raises ValueError."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        raise ValueError(
            f"{str(file)!r} cannot be read ({reason}); name another checkpoint, "
            "download it again, or train again"
        ) from error


def read_pickle(file: Path) -> dict[str, Tensor]:
    """What torch.save wrote. Raises ValueError; torch's own reasons are left out, since they advise
    to read the file again and run its code."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(file)!r} must be a pickle of nothing but tensors, and is damaged or holds other "
            "objects, whose code was not run; use a checkpoint in safetensors, or download it again"
        ) from error
    except Exception as error:  # of any kind: it depends on which bytes are wrong
        raise ValueError(f"{str(file)!r} is cut short or damaged; download it again") from error
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise ValueError(
            f"{str(file)!r} must hold tensors by their names, and nothing else; take the weights "
            "of the model alone, not the state of its training"
        )
    return weights


def model_on_meta(config: ModelConfig, tensors: float = math.inf) -> LanguageModel:
    """The model of `config` on the meta device, where no size needs memory. Raises ValueError for
    sizes that do not fit each other, or that no model with this number of tensors can have."""
    try:
        if config.num_layers > tensors:  # a billion of them would take hours even there
            raise ValueError(
                f"num_layers must be at most the number of tensors, {tensors}, got "
                f"{config.num_layers}"
            )
        with torch.device("meta"):
            return LanguageModel(config)
    except (RuntimeError, ArithmeticError, TypeError) as error:
        raise ValueError(
            f"it has sizes that no tensors can have, such as {largest_sizes(config)}; use "
            "smaller ones"
        ) from error


def largest_sizes(config: ModelConfig) -> str:
    """The three largest: the one that was mistyped is among them."""
    sizes = {name: value for name, value in vars(config).items() if type(value) in (int, float)}
    names = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return ", ".join(f"model.{name}={sizes[name]}" for name in names)

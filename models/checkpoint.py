"""Checkpoints that infer.py reads: a folder with `model.safetensors` and `config.yaml`.

Reading one runs no code of it. The tensors carry a crc32, so that a damaged file is an error and
not a worse model. Files are written beside their place and moved there: they are whole or absent.
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from configs.schema import MIXERS, MODELS, ConfigError, ModelConfig
from models.language_model import LanguageModel

# The files of a run; the first two are the checkpoint.
WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
LAST, METRICS, PICTURE = "last.ckpt", "metrics.csv", "loss.png"

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"


def build_model(config: ModelConfig, norm_path: str) -> LanguageModel:
    """The language model that `config` describes. Raises ConfigError for sizes that do not fit."""
    try:
        return LanguageModel(
            MIXERS[config.name],
            vocab_size=256,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            mlp_ratio=config.mlp_ratio,
            tie_embeddings=config.tie_embeddings,
            norm_eps=config.norm_eps,
            norm_path=norm_path,
            mixer_args=config.mixer_args(),
        )
    except ValueError as error:
        raise ConfigError(f"model={config.name}: {error}") from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a name beside `path`, then move what it wrote to `path` in one step."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_config(folder: Path, config: Any) -> None:
    """Write a dataclass of configs/schema.py as `config.yaml`."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    write_whole(folder / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


def save_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of a state dict, tied ones once, as `model.safetensors`."""
    tensors, seen = {}, set()
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {"crc32": _checksum(tensors)}  # one entry: safetensors writes several in any order
    write_whole(folder / WEIGHTS, lambda part: part.write_bytes(save(tensors, metadata)))


def find_checkpoint(model: str | None, checkpoint: str | None, runs_dir: str) -> Path:
    """The folder of the checkpoint to use. Raises ConfigError.

    Args:
        model: "fla", "mamba2" or None for whichever `checkpoint` holds (fla without one).
        checkpoint: A run folder or the model.safetensors in it; None for the newest run of
            `model` under `runs_dir`, or the checkpoint that ships where there is none.
        runs_dir: Where train.py puts its runs.
    """
    if checkpoint is None:
        model = model or "fla"
        runs = [path for path in Path(runs_dir).glob(f"*/{WEIGHTS}") if is_of(path.parent, model)]
        return max(runs, key=lambda path: path.stat().st_mtime).parent if runs else SHIPPED / model
    path = Path(checkpoint)
    folder = path.parent if path.name in (WEIGHTS, CONFIG) else path
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise ConfigError(
                f"checkpoint must be a run folder with {WEIGHTS} and {CONFIG}, got {checkpoint!r} "
                f"without {needed}; name a folder under {runs_dir}/, or leave checkpoint out"
            )
    found = read_model_config(folder).name
    if model not in (None, found):
        raise ConfigError(
            f"checkpoint must be of model={model}, got {checkpoint!r} of model={found}; "
            f"use model={found}, or another checkpoint"
        )
    return folder


def load_model(folder: Path, norm_path: str = "inference") -> LanguageModel:
    """The model of a checkpoint, on the CPU, in eval mode, its weights without gradients. Raises
    ConfigError."""
    config = read_model_config(folder)
    model = build_model(config, norm_path)
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            checksum = (weights.metadata() or {}).get("crc32")
    except (SafetensorError, OSError) as error:
        raise ConfigError(damaged(file, str(error).splitlines()[0])) from error
    if checksum != _checksum(tensors):
        raise ConfigError(damaged(file, "its checksum is wrong"))
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ConfigError(damaged(file, f"its tensors are not those of the {CONFIG} beside it"))
    model.load_state_dict(tensors, strict=not tied)
    return model.eval().requires_grad_(False)


def read_model_config(folder: Path) -> ModelConfig:
    """The `model` section of a checkpoint's config.yaml. Raises ConfigError."""
    file = folder / CONFIG
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        schema = OmegaConf.structured(MODELS[values["name"]])
        return OmegaConf.to_object(OmegaConf.merge(schema, values))
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(damaged(file, f"{type(error).__name__} while reading it")) from error
    except OmegaConfBaseException as error:
        raise ConfigError(damaged(file, str(error).splitlines()[0])) from error


def is_of(folder: Path, model: str) -> bool:
    """Whether the folder holds a run of this model."""
    try:
        return read_model_config(folder).name == model
    except ConfigError:
        return False


def damaged(file: Path, why: str) -> str:
    """The words of an error about a file that is not as train.py wrote it."""
    return (
        f"checkpoint file {str(file)!r} must be whole and as train.py wrote it, but {why}; "
        "name another checkpoint, or train again"
    )


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"

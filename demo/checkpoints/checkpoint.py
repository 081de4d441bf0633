"""Checkpoints: what a run leaves behind, what ships, and published ones.

A run's is a folder with `model.safetensors` and `config.yaml`, and `tokenizer.json` unless it is a
model of bytes. Reading one runs no code of it. The tensors carry a crc32, so that a damaged file is
an error and not a worse model. Files are written beside their place and moved there: they are whole
or absent. Published checkpoints have a `config.json` instead: demo/checkpoints/published.py.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from demo.checkpoints.files import unreadable, write_whole
from demo.checkpoints.hub import is_hub_id
from demo.checkpoints.published import (
    download_published,
    load_published,
    published_name,
    published_tokenizer,
)
from demo.checkpoints.tokenizer import Tokenizer, tokenizer_of
from demo.config.schema import (
    MODELS,
    NORM_PATHS,
    ConfigError,
    about,
    first_line,
    model_config,
    model_name,
)
from models.config import ModelConfig
from models.language_model import LanguageModel

# The files of a checkpoint; what else a run has is in demo/training/run.py.
WEIGHTS, CONFIG = "model.safetensors", "config.yaml"

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as `load` found it.

    Attributes:
        model: On the CPU; with norm_path="inference" in eval mode and without gradients, with
            "training" in training mode.
        tokenizer: The one it was trained with.
        folder: Where its files lie.
        name: "fla" or "mamba2".
    """

    model: LanguageModel
    tokenizer: Tokenizer
    folder: Path
    name: str


def load(
    checkpoint: str | Path | None = None,
    model: str | None = None,
    *,
    norm_path: str = "inference",
    runs_dir: str | Path = "runs",
) -> Loaded:
    """A model with its weights and its tokenizer.

    Args:
        checkpoint: A run's folder or a file in it; a folder with a published checkpoint of
            transformers' Mamba2, state-spaces or flash-linear-attention's GatedDeltaNet; the hub
            id of one; None for the newest run of `model` under `runs_dir`, or the checkpoint that
            ships where there is none.
        model: "fla", "mamba2", or None for whichever `checkpoint` holds (fla without one).
        norm_path: "inference" or "training".
        runs_dir: Where train.py puts its runs.
    Raises:
        ConfigError: for what is not there, damaged, or of another model than `model`.
    """
    for key, value, choices in (
        ("model", model, (*MODELS, None)),
        ("norm_path", norm_path, NORM_PATHS),
    ):
        if value not in choices:
            names = ", ".join(choice for choice in choices if choice)
            raise ConfigError(f"{key} must be one of {names}, got {value!r}; use one of them")
    folder = find_checkpoint(model, checkpoint, str(runs_dir))
    with about("checkpoint"):
        if _is_run(folder):
            language_model, tokenizer = load_model(folder, norm_path), tokenizer_of(folder)
        else:
            language_model = load_published(folder, norm_path=norm_path)
            tokenizer = published_tokenizer(folder)
    if tokenizer.vocab_size > language_model.config.vocab_size:
        raise ConfigError(
            f"checkpoint: the tokenizer in {str(folder)!r} must have at most the model's "
            f"{language_model.config.vocab_size} tokens, got {tokenizer.vocab_size}; put the "
            "model's own tokenizer.json there"
        )
    training = norm_path == "training"
    language_model.train(training).requires_grad_(training)
    return Loaded(language_model, tokenizer, folder, model_name(language_model.config))


def build_model(config: ModelConfig, norm_path: str) -> LanguageModel:
    """The language model that `config` describes. Raises ConfigError for sizes that do not fit."""
    with about(f"model={model_name(config)}"):
        return LanguageModel(config, norm_path=norm_path)


def save_config(folder: Path, config: Any) -> None:
    """Write a dataclass of demo/config/schema.py as `config.yaml`."""
    values = dataclasses.asdict(config)
    values["model"] = {"name": model_name(config.model), **values["model"]}
    if "dt_limit" in values["model"]:
        values["model"]["dt_limit"] = list(values["model"]["dt_limit"])
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
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


def find_checkpoint(model: str | None, checkpoint: str | Path | None, runs_dir: str) -> Path:
    """The folder of the checkpoint that `load` reads, from the hub if need be; its arguments.
    Raises ConfigError."""
    if checkpoint is None:
        model = model or "fla"
        runs = sorted(Path(runs_dir).glob(f"*/{WEIGHTS}"), key=lambda path: -path.stat().st_mtime)
        return next((run.parent for run in runs if is_of(run.parent, model)), SHIPPED / model)
    path = Path(checkpoint)
    with about("checkpoint"):
        if _on_hub(path):
            path = download_published(path.as_posix())
        folder = path.parent if path.is_file() or path.name in (WEIGHTS, CONFIG) else path
        if not _is_run(folder) and (folder / "config.json").is_file():
            _check_name(checkpoint, model, published_name(folder))
            return folder
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            if not path.exists():
                why = ", which does not exist"
            elif folder == path:
                why = f" without {needed}"
            elif path.name in (WEIGHTS, CONFIG):
                why = f" without {needed} beside it"
            else:
                why = ", a file that lies in no such folder"
            raise ConfigError(
                f"checkpoint must be a run folder with {WEIGHTS} and {CONFIG}, a file in one, a "
                "published model's folder with config.json, or a hub id, got "
                f"{str(checkpoint)!r}{why}; name a folder under {runs_dir}/, or leave checkpoint "
                "out"
            )
    _check_name(checkpoint, model, model_name(read_model_config(folder)))
    return folder


def load_model(folder: Path, norm_path: str = "inference") -> LanguageModel:
    """The model of a checkpoint, on the CPU, in eval mode, its weights without gradients. Raises
    ConfigError."""
    config = read_model_config(folder)
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            shapes = {name: weights.get_slice(name).get_shape() for name in names}
            try:
                why = misfit(config, shapes)
            except ConfigError as error:
                why = str(error).removeprefix(f"model={model_name(config)}: ")
                why = f"its model section is wrong: {why}"
                raise ConfigError(damaged(folder / CONFIG, why)) from error
            if why is not None:
                why = f"its tensors are not those of the {CONFIG} beside it: {why}"
                raise ConfigError(damaged(file, why))
            tensors = {name: weights.get_tensor(name) for name in names}
            checksum = (weights.metadata() or {}).get("crc32")
    except (SafetensorError, OSError) as error:
        raise ConfigError(damaged(file, f"it cannot be read ({unreadable(error)})")) from error
    if checksum != _checksum(tensors):
        raise ConfigError(damaged(file, "its checksum is wrong"))
    model = build_model(config, norm_path)
    model.load_state_dict(tensors, strict=not config.tie_embeddings)
    return model.eval().requires_grad_(False)


def misfit(config: ModelConfig, shapes: dict[str, list[int]]) -> str | None:
    """Why tensors of these names and shapes are not those of a model of `config`, or None. Nothing
    is allocated to find out: a damaged config.yaml may ask for more than the machine has. Raises
    ConfigError."""
    if config.num_layers > len(shapes):
        return f"it has too few tensors ({len(shapes)}) for num_layers={config.num_layers}"
    try:
        with torch.device("meta"):
            model = build_model(config, "inference")
    except (RuntimeError, ArithmeticError, TypeError):  # numbers too large even to count with
        return "no tensors have sizes as large as those asked for"
    wanted = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    for name, shape in wanted.items():
        if name not in shapes:
            return f"it has no {name}"
        if shape != shapes[name]:
            return f"its {name} has shape {shapes[name]} and not {shape}"
    left = next((name for name in shapes if name not in wanted), None)
    return left and f"the {left} that it has is not asked for"


def read_model_config(folder: Path) -> ModelConfig:
    """The `model` section of a checkpoint's config.yaml. Raises ConfigError."""
    file = folder / CONFIG
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        return model_config(values)
    except (
        OSError,
        yaml.YAMLError,
        OmegaConfBaseException,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:
        raise ConfigError(damaged(file, _in_words(error))) from error


def _in_words(error: Exception) -> str:
    """What is wrong with a config.yaml, without the names of Python's classes."""
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    if isinstance(error, UnicodeError):
        return "it is not text in UTF-8"
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = "it" if mark is None else f"its line {mark.line + 1}"
        if isinstance(error, yaml.constructor.ConstructorError):
            return f"{where} asks for more than plain values, which are all that is read"
        return f"{where} is not YAML, or what it begins has no end"
    if isinstance(error, MissingMandatoryValue):
        return f"it lacks model.{error.full_key or error.key}"
    if isinstance(error, ConfigKeyError):
        return f"there is no key 'model.{error.full_key or error.key}'"
    if isinstance(error, OmegaConfBaseException):
        reason = first_line(error)
        return f"its model{'.' * bool(error.full_key)}{error.full_key or ''} is wrong: {reason}"
    return f"it has no model section whose name is one of {', '.join(MODELS)}"


def is_of(folder: Path, model: str) -> bool:
    """Whether the folder holds a run of this model."""
    try:
        return model_name(read_model_config(folder)) == model
    except ConfigError:
        return False


def damaged(file: Path, why: str) -> str:
    """The words of an error about a file that is not as train.py wrote it."""
    return (
        f"checkpoint file {str(file)!r} must be whole and as train.py wrote it, but {why}; "
        "name another checkpoint, or train again"
    )


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _on_hub(path: Path) -> bool:
    """Whether it reads as ``owner/name`` and no folder here has the owner's name."""
    name = path.as_posix()
    return "/" in name and is_hub_id(name) and not path.parent.is_dir()


def _check_name(checkpoint: str | Path | None, asked: str | None, found: str) -> None:
    if asked not in (None, found):
        raise ConfigError(
            f"checkpoint must be of model={asked}, got {str(checkpoint)!r} of model={found}; "
            f"use model={found}, or another checkpoint"
        )


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"

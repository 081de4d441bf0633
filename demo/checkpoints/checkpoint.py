"""Checkpoints: what a run leaves behind, what ships, and published ones.

A run's is a folder with `model.safetensors` and `config.yaml`, and `tokenizer.json` unless it is a
model of bytes. Reading one runs no code of it. The tensors carry a crc32, so that a damaged file is
an error and not a worse model. Published checkpoints have a `config.json` instead:
demo/checkpoints/published.py.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor, uint8

from demo.checkpoints.atomic import write_atomically
from demo.checkpoints.hub import is_hub_id
from demo.checkpoints.published import (
    PUBLISHED_CONFIG,
    download_published,
    published_config,
    published_tokenizer,
    published_weights,
)
from demo.checkpoints.tokenizer import Tokenizer, tokenizer_of
from demo.checkpoints.weights import model_on_meta, read_safetensors
from demo.config.errors import ConfigError, about
from demo.config.schema import MODELS, NORM_PATHS, model_config, model_name
from models.config import ModelConfig
from models.language_model import LanguageModel
from models.ranges import check_choice

# The files of a checkpoint; what else a run has is in demo/training/run.py.
WEIGHTS, BEST, CONFIG = "model.safetensors", "best.safetensors", "config.yaml"

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as `load` found it.

    Attributes:
        model: In fp32 on the CPU; with norm_path="inference" in eval mode and without gradients,
            with "training" in training mode.
        tokenizer: The one it was trained with.
        folder: Where its files lie.
        name: "fla" or "mamba2".
        weights: The file in `folder` that was read, None for a published checkpoint.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    folder: Path
    name: str
    weights: str | None = None


def load(
    checkpoint: str | Path | None = None,
    model: str | None = None,
    *,
    norm_path: str = "inference",
    exact: bool = False,
    runs_dir: str | Path = "runs",
) -> Loaded:
    """A model with its weights and its tokenizer.

    Args:
        checkpoint: A run's folder, for the best of its weights if it has any such, else the last;
            a file in it, for those of that file; a folder with a published checkpoint of
            transformers' Mamba2, state-spaces or flash-linear-attention's GatedDeltaNet; the hub
            id of one; None for the newest run of `model` under `runs_dir`, or the checkpoint that
            ships where there is none.
        model: "fla", "mamba2", or None for whichever `checkpoint` holds (fla without one).
        norm_path: "inference" or "training".
        exact: The attribute of `LanguageModel`: the same bits in training, prefill and decoding.
        runs_dir: Where train.py puts its runs.
    Raises:
        ConfigError: when it is not there, is damaged, or is of another model than `model`.
    """
    with about():
        check_choice("model", model or "fla", MODELS)
        check_choice("norm_path", norm_path, NORM_PATHS)
    folder = find_checkpoint(checkpoint, model, runs_dir)
    of_a_run = (folder / CONFIG).is_file()
    with about("checkpoint"):
        config = read_model_config(folder) if of_a_run else published_config(folder)
        name = model_name(config)
        if model not in (None, name):
            raise ConfigError(
                f"checkpoint must be of model={model}, got {str(checkpoint)!r} of model={name}; "
                f"use model={name}, or another checkpoint"
            )
        file = _weights_of(folder, Path(checkpoint or folder).name) if of_a_run else None
        read_weights = _read_weights if of_a_run else published_weights
        weights = read_weights(folder / file if file else folder, config)
        tokenizer = (tokenizer_of if of_a_run else published_tokenizer)(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer in {str(folder)!r} must have at most the model's "
                f"{config.vocab_size} tokens, got {tokenizer.vocab_size}; put the model's own "
                "tokenizer.json there"
            )
    language_model = LanguageModel(config, norm_path=norm_path, exact=exact)
    language_model.load_state_dict(weights, strict=not config.tie_embeddings)
    training = norm_path == "training"
    language_model.train(training).requires_grad_(training)
    return Loaded(language_model, tokenizer, folder, name, file)


def save_config(folder: Path, config: Any) -> None:
    """Write a dataclass of demo/config/schema.py as `config.yaml`."""
    text = yaml.safe_dump(as_values(config), sort_keys=False, allow_unicode=True)
    write_atomically(folder / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


def as_values(config: Any) -> dict[str, Any]:
    """The nested plain values of a dataclass of demo/config/schema.py that has a model."""
    values = dataclasses.asdict(config)
    return values | {"model": {"name": model_name(config.model), **values["model"]}}


def save_weights(folder: Path, weights: Mapping[str, Tensor], file: str = WEIGHTS) -> None:
    """Write the tensors of a state dict, tied ones once, as this file of a run."""
    tensors, seen = {}, set()
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {"crc32": _checksum(tensors)}  # one entry: safetensors writes several in any order
    write_atomically(folder / file, lambda part: part.write_bytes(save(tensors, metadata)))


def find_checkpoint(checkpoint: str | Path | None, model: str | None, runs_dir: str | Path) -> Path:
    """The folder of the checkpoint that `load` reads, whose arguments these are; downloaded where
    it is on the hub. Raises ConfigError."""
    if checkpoint is None:
        model = model or "fla"
        return next(newest_runs(runs_dir, model, WEIGHTS), SHIPPED / model)
    path = Path(checkpoint)
    if "/" in path.as_posix() and is_hub_id(path.as_posix()) and not path.parent.is_dir():
        with about("checkpoint"):
            return download_published(path.as_posix())
    folder = path.parent if path.is_file() or path.name in (WEIGHTS, BEST, CONFIG) else path
    if (folder / PUBLISHED_CONFIG).is_file() and not (folder / CONFIG).is_file():
        return folder
    missing = next((name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()), None)
    if missing is not None:
        where = "in it" if folder == path else "beside it"
        why = f"with no {missing} {where}" if path.exists() else "which does not exist"
        raise ConfigError(
            f"checkpoint must be a run folder with {WEIGHTS} and {CONFIG}, a file in one, a "
            f"published model's folder with {PUBLISHED_CONFIG}, or a hub id, got "
            f"{str(checkpoint)!r}, {why}; name a folder under {runs_dir}/, or leave checkpoint out"
        )
    return folder


def check_weights(file: Path, config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check the tensors in `file`, by their names and shapes, against the model of the config.yaml
    beside it. Allocates nothing: a damaged config may ask for more than the machine has. Raises
    ConfigError."""
    try:
        model = model_on_meta(config, len(shapes))
    except ValueError as error:
        why = f"its model section is wrong: {error}".partition(";")[0]
        raise damaged(file.parent / CONFIG, why) from error
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    given = {name: list(shape) for name, shape in shapes.items()}
    for name in (*expected, *given):
        wanted, got = expected.get(name, "none"), given.get(name, "none")
        if wanted != got:
            why = (
                f"its tensors are not those of the {CONFIG} beside it: the shape of {name} must be "
                f"{wanted}, got {got}"
            )
            raise damaged(file, why)


def _weights_of(folder: Path, named: str) -> str:
    """The file of weights in a run's folder that somebody means who names the file `named` in it,
    or none."""
    of_the_run = named == CONFIG or not (folder / named).is_file()
    return BEST if named == BEST or (of_the_run and (folder / BEST).is_file()) else WEIGHTS


def _read_weights(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    weights, metadata = read_safetensors(file)
    check_weights(file, config, {name: tensor.shape for name, tensor in weights.items()})
    if metadata.get("crc32") != _checksum(weights):
        raise damaged(file, "its checksum is wrong")
    return weights


def read_model_config(folder: Path) -> ModelConfig:
    """The `model` section of a checkpoint's config.yaml. Raises ConfigError."""
    return read_config(folder, lambda values: model_config(values["model"]))


def read_config(folder: Path, check: Callable[[dict[str, Any]], Any]) -> Any:
    """What `check` makes of the values in a checkpoint's config.yaml. Raises ConfigError."""
    try:
        values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ConfigError(f"it has no model section whose name is one of {', '.join(MODELS)}")
        return check(values)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise damaged(folder / CONFIG, _reason(error)) from error


def _reason(error: Exception) -> str:
    """What is wrong with a config.yaml, without the names of Python's classes."""
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    if isinstance(error, UnicodeError):
        return "it is not text in UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"its line {error.problem_mark.line + 1} is not YAML of plain values"
    if isinstance(error, (yaml.YAMLError, RecursionError)):
        return "it is not YAML"
    if isinstance(error, ConfigError):
        return str(error).partition(";")[0]
    return f"it holds a value that cannot be read: {error}"  # a date of a 99th month, say


def newest_runs(runs_dir: str | Path, model: str, name: str) -> Iterator[Path]:
    """The folders of this model's runs, the one whose file `name` is newest first."""
    files = sorted(Path(runs_dir).glob(f"*/{name}"), key=lambda file: -file.stat().st_mtime)
    return (file.parent for file in files if is_run_of(file.parent, model))


def is_run_of(folder: Path, model: str) -> bool:
    """Whether the folder holds a run of this model."""
    try:
        return model_name(read_model_config(folder)) == model
    except ConfigError:
        return False


def damaged(file: Path, why: str) -> ConfigError:
    """The error for a file that is not as train.py wrote it."""
    return ConfigError(
        f"checkpoint file {str(file)!r} must be whole and as train.py wrote it, but {why}; "
        "name another checkpoint, or train again"
    )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(uint8).numpy(), crc)
    return f"{crc:08x}"

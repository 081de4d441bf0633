"""Go on with a run that was stopped: which run, with which config, from which checkpoint."""

import csv
import random
import zipfile
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from yaml import YAMLError

from configs.command import compose
from configs.schema import ConfigError, TrainConfig, train_config
from models.checkpoints.checkpoint import CONFIG, LAST, METRICS, PICTURE, damaged, is_of

# What somebody chose who chose a file of a group.
CHOICES = {
    "model": ["model.name"],
    "data": ["data.source"],
    "trainer": ["trainer.accelerator", "trainer.strategy"],
}

# What a run may go on with another value of: it is computed elsewhere or in another way, but it is
# the same numbers up to rounding.
FREE = {
    "resume",
    "runs_dir",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.strategy",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.tensorboard",
    "trainer.checkpoint_every",
}


@dataclass(frozen=True)
class Stopped:
    """A run to go on with.

    Attributes:
        run: Its folder.
        config: What it was started with.
        checkpoint: Its last.ckpt, or None when it was stopped before the first was written.
        rows: Of its metrics.csv, those of the steps that the checkpoint has behind it.
    """

    run: Path
    config: TrainConfig
    checkpoint: Path | None
    rows: list[dict[str, str]]


def find_stopped(asked: TrainConfig) -> Stopped | None:
    """The run that `asked.resume` names, or for `auto` the newest run of the model that was not
    finished, if there is one. Raises ConfigError."""
    if asked.resume is None:
        return None
    if asked.resume == "auto":
        run = _newest_stopped(Path(asked.runs_dir), asked.model.name)
        if run is None:
            return None
    else:
        run = Path(asked.resume)
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"resume must be auto or the folder of a run, got {str(run)!r} without {CONFIG}; "
            f"name a folder under {asked.runs_dir}/"
        )
    if (run / PICTURE).exists():
        raise ConfigError(
            f"resume must name a run that was stopped, got {str(run)!r}, which is finished; "
            "start another one without resume"
        )
    config = stopped_config(run, asked)
    step = checkpoint_step(run)
    return Stopped(run, config, run / LAST if step else None, read_metrics(run, step))


def _newest_stopped(runs_dir: Path, model: str) -> Path | None:
    stopped = [
        path
        for path in runs_dir.glob(f"*/{CONFIG}")
        if not (path.parent / PICTURE).exists() and is_of(path.parent, model)
    ]
    return max(stopped, key=lambda path: path.stat().st_mtime).parent if stopped else None


def stopped_config(run: Path, asked: TrainConfig) -> TrainConfig:
    """The config that `run` was started with, on the devices that `asked` wants. Raises ConfigError
    when it wants anything else to be different: that would not be the same run."""
    try:
        saved = train_config(OmegaConf.create((run / CONFIG).read_text(encoding="utf-8")))
    except (OSError, UnicodeError, YAMLError, ConfigError) as error:
        raise ConfigError(damaged(run / CONFIG, str(error).splitlines()[0])) from error
    was = _flat(saved)
    for key, value in asked_for(asked).items():
        section, _, name = key.partition(".")
        if key in FREE:
            if section == "trainer":
                setattr(saved.trainer, name, value)
        elif value != was.get(key):
            raise ConfigError(
                f"{key} must be as in the run that is resumed, {was.get(key)}, got {value}; "
                "leave it out, or start another run"
            )
    return saved


def asked_for(config: TrainConfig) -> dict[str, Any]:
    """The values, by dotted key, that somebody chose: those that are not the default, and those
    that stand on the command line."""
    typed = set()
    if HydraConfig.initialized():
        typed = {override.partition("=")[0] for override in HydraConfig.get().overrides.task}
        typed |= {key for group, keys in CHOICES.items() if group in typed for key in keys}
    default = _flat(compose("train", [f"model={config.model.name}"]))
    values = _flat(config)
    return {key: v for key, v in values.items() if key in typed or v != default.get(key)}


def checkpoint_step(run: Path) -> int:
    """The step that the run's last.ckpt was written after, 0 where there is none yet. Raises
    ConfigError when it is damaged."""
    file = run / LAST
    if not file.exists():
        return 0
    try:
        with zipfile.ZipFile(file) as records:  # torch.load does not look at their checksums
            if (name := records.testzip()) is not None:
                raise zipfile.BadZipFile(name)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except zipfile.BadZipFile as error:
        raise ConfigError(damaged(file, "it is cut short, or a part of it has changed")) from error
    except Exception as error:  # of any kind: it depends on what is wrong
        raise ConfigError(damaged(file, "it does not hold the state of a run")) from error


def continue_metrics(logger: CSVLogger, rows: list[dict[str, str]]) -> dict[str, float]:
    """Start the logger's file with these rows, where Lightning would start with none. Returns the
    values of the first validation."""
    before: dict[str, float] = {}
    for row in rows:
        values = {name: float(text) for name, text in row.items() if text and name != "step"}
        logger.log_metrics(values, int(row["step"]))
        before = before or ({"val_bpb": values["val_bpb"]} if "val_bpb" in values else {})
    logger.save()
    return before or {"val_bpb": float("nan")}


def read_metrics(run: Path, before_step: int) -> list[dict[str, str]]:
    """The rows of metrics.csv that belong to the steps before `before_step`."""
    if before_step == 0 or not (run / METRICS).exists():
        return []
    with (run / METRICS).open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) < before_step]


class RandomState(Callback):
    """Keeps the state of all random generators in the checkpoint, as tensors and plain numbers."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        state = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (state := self.restored) is None:
            return
        torch.set_rng_state(state["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            values |= _flat(value, f"{prefix}{f.name}.")
        else:
            values[prefix + f.name] = value
    return values

"""Go on with a run that was stopped: which run, with which config, from which checkpoint.

All of it is read and checked before the run's folder is written to.
"""

import csv
import functools
import io
import os
import zipfile
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from demo.checkpoints.checkpoint import (
    CONFIG,
    LAST,
    METRICS,
    PICTURE,
    WEIGHTS,
    check_weights,
    damaged,
    is_run_of,
    read_model_config,
)
from demo.config.command import compose
from demo.config.errors import ConfigError, first_line
from demo.config.schema import TrainConfig, model_name, train_config
from demo.training.lock import lock
from models.config import ModelConfig
from models.ranges import as_written

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

# What last.ckpt must hold for all of a run to go on.
LOADER = "loops.fit_loop.state_dict.combined_loader"
STATE = (
    *("global_step", "state_dict", "optimizer_states", "lr_schedulers", LOADER),
    *("callbacks.RandomState", "callbacks.Throughput"),
)


@dataclass(frozen=True)
class Stopped:
    """A run to go on with.

    Attributes:
        run: Its folder.
        config: What it was started with.
        checkpoint: Its last.ckpt, or None when it was stopped before the first was written.
        rows: Of its metrics.csv, those of the steps that the checkpoint has behind it: the step,
            and the values by name.
        data: What the loader of its training data left in the checkpoint.
    """

    run: Path
    config: TrainConfig
    checkpoint: Path | None = None
    rows: tuple[tuple[int, dict[str, float]], ...] = ()
    data: dict[str, Any] | None = None


def find_stopped(asked: TrainConfig) -> Stopped | None:
    """The run that `asked.resume` names, or for `auto` the newest run of the model that was not
    finished, if there is one. Raises ConfigError."""
    if asked.resume is None:
        return None
    if asked.resume == "auto":
        run = _newest_stopped(asked)
        if run is None:
            return None
    else:
        run = Path(asked.resume)
        if run.name == LAST:
            run = run.parent
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"resume must be auto or the folder of a run, got {str(run)!r} without {CONFIG}; "
            f"name a folder under {asked.runs_dir}/"
        )
    if (run / WEIGHTS).exists() and not ((run / LAST).exists() or (run / METRICS).exists()):
        raise ConfigError(
            f"resume must name a run that was stopped, got {str(run)!r}, which has weights alone; "
            f"start a new run from them with checkpoint={run}"
        )
    if (run / PICTURE).exists():
        raise ConfigError(
            f"resume must name a run that was stopped, got {str(run)!r}, which is finished; "
            "start another one without resume"
        )
    if _is_running(run):
        raise ConfigError(still_running(run))
    if not os.access(run, os.W_OK | os.X_OK):
        raise ConfigError(
            f"resume must name a run that can be written to, got {str(run)!r}, which cannot; "
            "change its permissions, or resume a copy of it"
        )
    config = stopped_config(run, asked)
    state = read_state(run, config.model)
    if state is None:
        return Stopped(run, config)
    rows = read_metrics(run, state["global_step"])
    return Stopped(run, config, run / LAST, rows, _part(state, LOADER)[0])


def still_running(run: Path) -> str:
    return (
        f"resume must name a run that was stopped, got {str(run)!r}, which another process works "
        "on; wait for its end, or stop it"
    )


def _is_running(run: Path) -> bool:
    """Whether a process trains in this folder. The first of several processes asks for all: it
    may have the folder itself by the time that another one looks."""
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))):
        return False
    with (run / CONFIG).open("rb") as file:
        return not lock(file)


def _newest_stopped(asked: TrainConfig) -> Path | None:
    stopped = [
        path.parent
        for path in Path(asked.runs_dir).glob(f"*/{CONFIG}")
        if not (path.parent / PICTURE).exists() and is_run_of(path.parent, model_name(asked.model))
    ]
    stopped.sort(key=lambda run: -(run / CONFIG).stat().st_mtime)
    # Several processes must all find the same one, and only the first sees who is at work.
    alone = asked.trainer.devices == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1
    return next((run for run in stopped if not (alone and _is_running(run))), None)


def stopped_config(run: Path, asked: TrainConfig) -> TrainConfig:
    """The config that `run` was started with, on the devices that `asked` wants. Raises ConfigError
    when it wants anything else to be different: that would not be the same run."""
    read_model_config(run)  # says in words what is wrong with a file that is no config at all
    try:
        saved = train_config(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")))
    except ConfigError as error:
        raise ConfigError(damaged(run / CONFIG, first_line(error))) from error
    was = _flat(saved)
    for key, value in asked_for(asked).items():
        section, _, name = key.partition(".")
        if key in FREE:
            if section == "trainer":
                setattr(saved.trainer, name, value)
        elif value != was.get(key):
            raise ConfigError(
                f"{key} must be as in the run that is resumed, {as_written(was.get(key))}, got "
                f"{as_written(value)}; leave it out, or start another run"
            )
    return saved


def asked_for(config: TrainConfig) -> dict[str, Any]:
    """The values, by dotted key, that somebody chose: those that are not the default, and those
    that stand on the command line."""
    chosen = {key for group, keys in CHOICES.items() if group in config.typed for key in keys}
    typed = chosen | config.typed
    default = _flat(compose("train", [f"model={model_name(config.model)}"]))
    values = _flat(config)
    return {key: v for key, v in values.items() if key in typed or v != default.get(key)}


def read_state(run: Path, model: ModelConfig | None = None) -> dict[str, Any] | None:
    """What the run's last.ckpt holds, its tensors not yet read; None where there is no last.ckpt.
    Raises ConfigError when it is damaged, lacks something, or is not of `model`."""
    file = run / LAST
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as records:  # torch.load does not look at their checksums
            if (name := records.testzip()) is not None:
                raise zipfile.BadZipFile(name)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise ConfigError(damaged(file, "it is cut short, or a part of it has changed")) from error
    except Exception as error:  # of any kind: it depends on what is wrong
        raise ConfigError(damaged(file, "it does not hold the state of a run")) from error
    missing = next((name for name in STATE if not _part(state, name)), None)
    if missing is not None:
        why = f"it has no {missing}, perhaps because another version of it wrote the file"
        raise ConfigError(damaged(file, why))
    if model is not None:
        weights = {name.removeprefix("model."): t for name, t in state["state_dict"].items()}
        if model.tie_embeddings:  # they are there twice
            weights.pop("head.weight", None)
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        check_weights(file, model, shapes)
    return state


def _part(state: Any, name: str) -> Any:
    """The value of a dotted key, or None."""
    return functools.reduce(
        lambda part, key: part.get(key) if isinstance(part, dict) else None, name.split("."), state
    )


def read_metrics(run: Path, before_step: int) -> tuple[tuple[int, dict[str, float]], ...]:
    """The rows of metrics.csv that belong to the steps before `before_step`: the step, and the
    values by name. Raises ConfigError when it is damaged."""
    file = run / METRICS
    if not file.exists():
        return ()
    try:
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill can leave the beginning of a row
        return tuple(
            (step, {name: float(value) for name, value in row.items() if value})
            for row in csv.DictReader(io.StringIO(whole))
            if (step := int(row.pop("step"))) < before_step
        )
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        why = "it is not a table of numbers with the column step"
        raise ConfigError(damaged(file, why)) from error


def continue_metrics(
    logger: CSVLogger, rows: tuple[tuple[int, dict[str, float]], ...]
) -> dict[str, float]:
    """Start the logger's file with these rows, where Lightning would start with none. Returns the
    values of the first validation."""
    for step, values in rows:
        logger.log_metrics(values, step)
    logger.save()
    first = next((values["val_bpb"] for _, values in rows if "val_bpb" in values), float("nan"))
    return {"val_bpb": first}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values = {f"{prefix}name": model_name(config)} if isinstance(config, ModelConfig) else {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            values |= _flat(value, f"{prefix}{f.name}.")
        else:
            values[prefix + f.name] = value
    return values

"""Where a run begins: with new weights, with those of a checkpoint, or after the last step that a
stopped run has saved. Everything is read and checked before a folder is made or changed."""

import os
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from demo.checkpoints.checkpoint import CONFIG, WEIGHTS, load, newest_runs
from demo.checkpoints.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from demo.config.errors import ConfigError, about
from demo.config.overrides import compose
from demo.config.schema import TrainConfig, check_together, model_name
from demo.training.processes import Processes, check_memory
from demo.training.run import AT_WORK, LAST, LOADER, METRICS, Rows, Run, part_of
from demo.training.schedule import (
    learning_rate_factor,
    steps_between_validations,
    warmup_steps,
)
from models.config import ModelConfig
from models.language_model import LanguageModel
from models.ranges import as_written

# What may differ in a resumed run: the same numbers, up to rounding, are computed elsewhere or in
# another way.
FREE = {
    *("exact", "resume", "runs_dir", "trainer.accelerator", "trainer.devices", "trainer.strategy"),
    "trainer.tensor_parallel",
    *("trainer.compile", "trainer.activation_checkpointing", "trainer.loggers"),
    *("trainer.checkpoint_every", "trainer.fuse_norm_linear", "trainer.norm_linear_precision"),
}

# What somebody chose who chose a file of a group.
CHOICES = {
    "model": ["model.name"],
    "data": ["data.source"],
    "trainer": ["trainer.accelerator", "trainer.strategy", "trainer.tensor_parallel"],
}


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        config: What the run was, or is to be, started with.
        run: The stopped run, None for a new one.
        checkpoint: Its last.ckpt, None where there is none yet.
        rows: Its metrics.csv, as far as the checkpoint reaches.
        position: The state in the checkpoint of the loader of training data.
        saved: What the run's config.yaml has to say from now on, None where it stays as it is.
    """

    config: TrainConfig
    run: Run | None = None
    checkpoint: Path | None = None
    rows: Rows = ()
    position: dict[str, Any] | None = None
    saved: TrainConfig | None = None

    @property
    def val_bpb(self) -> float:
        """Of the validation before the first step, NaN where metrics.csv has lost it."""
        return next((row["val_bpb"] for _, row in self.rows if "val_bpb" in row), float("nan"))


def find_start(asked: TrainConfig) -> Start:
    """Where a run of the config `asked` begins: after the last checkpoint of the run that
    `asked.resume` names, or of the newest stopped one of that model for `auto`, if there is one;
    else at step 0. Raises ConfigError."""
    if asked.resume is None:
        return Start(asked)
    if asked.resume == "auto":
        run = _newest_stopped(asked)
        if run is None:
            return Start(asked)
    else:
        path = Path(asked.resume)
        run = Run(path.parent if path.name == LAST else path)
    _check_resumable(run, asked.runs_dir)
    values = asked_for(asked)
    config = run.read_config()
    steps = values.pop("optim.steps", config.optim.steps)
    config = _resumed_config(config, values)
    state = run.read_state(config.model)
    reached = 0 if state is None else state["global_step"]
    saved = None
    if steps != config.optim.steps:
        saved, config = (_with_steps(c, steps, reached, run) for c in (run.read_config(), config))
    elif run.is_finished:
        raise run.not_stopped(
            "is finished; give it more steps with optim.steps=, where its schedule allows that, or "
            "start another one without resume"
        )
    if state is None:
        return Start(config, run, saved=saved)
    (position,) = part_of(state, LOADER)
    return Start(config, run, run.folder / LAST, run.read_metrics(reached), position, saved)


def _newest_stopped(asked: TrainConfig) -> Run | None:
    # Several processes must all find the same one, and only the first sees who is at work.
    alone = asked.trainer.devices == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1
    runs = map(Run, newest_runs(asked.runs_dir, model_name(asked.model), CONFIG))
    stopped = (run for run in runs if not run.is_finished)
    return next((run for run in stopped if not (alone and run.is_at_work())), None)


def _check_resumable(run: Run, runs_dir: str) -> None:
    """Raises ConfigError for a folder that holds no run, or one that cannot be resumed."""
    folder = run.folder
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"resume must be auto or the folder of a run, got {str(folder)!r} without {CONFIG}; "
            f"name a folder under {runs_dir}/"
        )
    if (folder / WEIGHTS).exists() and not any((folder / f).exists() for f in (LAST, METRICS)):
        start_anew = f"start a new run from them with checkpoint={folder}"
        raise run.not_stopped(f"has weights alone; {start_anew}")
    if run.is_at_work():
        raise run.not_stopped(AT_WORK)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"resume must name a run that can be written to, got {str(folder)!r}, which cannot; "
            "change its permissions, or resume a copy of it"
        )


def _resumed_config(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """The config that a run was started with, with those of `values`, by dotted key, that may be
    different. Raises ConfigError when any others are: that would not be the same run."""
    fixed = {key: value for key, value in values.items() if key not in FREE}
    _check_same(fixed, config, "the run that is resumed", "start another run")
    for key in values.keys() & FREE:
        section, _, name = key.partition(".")
        if section == "trainer":
            setattr(config.trainer, name, values[key])
        elif key == "exact":
            config.exact = values[key]
    check_together(config)
    return config


def _with_steps(config: TrainConfig, steps: int, reached: int, run: Run) -> TrainConfig:
    """The config of a run that goes on until another step than it was started for, as if it had
    been started for that one. Raises ConfigError where its learning rates up to now would have been
    others."""
    old, trainer = config.optim, config.trainer
    new = replace(old, steps=steps, warmup_steps=warmup_steps(old))
    before, after = learning_rate_factor(old), learning_rate_factor(new)
    if steps < reached or any(before(step) != after(step) for step in range(reached + 1)):
        raise ConfigError(
            f"optim.steps must be as in the run that is resumed, {old.steps}, got {steps}, with "
            f"which optim.schedule={old.schedule} has other learning rates before step {reached}; "
            f"leave it out, or start another run from its weights with checkpoint={run.folder}"
        )
    trainer = replace(trainer, validate_every=steps_between_validations(config))
    return replace(config, optim=new, trainer=trainer)


def start_model(start: Start, processes: Processes) -> tuple[TrainConfig, LanguageModel, Tokenizer]:
    """The model and the tokenizer to train with, and the config with the sizes that they have. The
    weights of a resumed run come later, with the optimiser. Raises ConfigError."""
    config = start.config
    if config.checkpoint is not None and start.checkpoint is None:
        return _model_of_checkpoint(config)
    with about("tokenizer"):
        if start.run and start.checkpoint:
            tokenizer = tokenizer_of(start.run.folder)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
    vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    check_memory(config, processes)
    return config, LanguageModel(config.model, exact=config.exact), tokenizer


def _model_of_checkpoint(config: TrainConfig) -> tuple[TrainConfig, LanguageModel, Tokenizer]:
    name = config.checkpoint
    asked = {key: v for key, v in asked_for(config).items() if key.startswith("model.")}
    if config.tokenizer != "bytes":
        raise ConfigError(
            f"tokenizer must be left out with checkpoint={name}, which brings its own, got "
            f"{config.tokenizer!r}; leave out one of them"
        )
    kind = asked.pop("model.name", None)
    options = {"norm_path": "training", "exact": config.exact, "runs_dir": config.runs_dir}
    loaded = load(name, kind, **options)
    config = replace(config, model=loaded.model.config)
    _check_same(asked, config, "the checkpoint", f"leave out checkpoint={name}")
    return config, loaded.model, loaded.tokenizer


def _check_same(asked: dict[str, Any], config: TrainConfig, whose: str, remedy: str) -> None:
    """Raises ConfigError for a value by dotted key that is not the one in `config`."""
    values = _flat(config)
    for key, value in asked.items():
        if value != values.get(key):
            raise ConfigError(
                f"{key} must be as in {whose}, {as_written(values.get(key))}, got "
                f"{as_written(value)}; leave it out, or {remedy}"
            )


def asked_for(config: TrainConfig) -> dict[str, Any]:
    """The values, by dotted key, that somebody chose: those that are not the default, and those
    that stand on the command line."""
    chosen = {key for group, keys in CHOICES.items() if group in config.typed for key in keys}
    typed = chosen | config.typed
    default = _flat(compose("train", [f"model={model_name(config.model)}"]))
    values = _flat(config)
    return {key: v for key, v in values.items() if key in typed or v != default.get(key)}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values = {f"{prefix}name": model_name(config)} if isinstance(config, ModelConfig) else {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            values |= _flat(value, f"{prefix}{f.name}.")
        else:
            values[prefix + f.name] = value
    return values

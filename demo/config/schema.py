"""Types and ranges of everything that configs/*.yaml can say.

The YAML files hold the defaults and say what a value means; the dataclasses here give its type and
its range. `train_config` and `infer_config` turn the values of composed files, of a command line or
of a run's config.yaml into dataclasses, or raise a ConfigError. Imports nothing heavy.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from demo.config.errors import ConfigError, about
from models.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from models.ranges import as_written, check_choice, check_ranges, nearest, number, one_of

NORM_PATHS = ("training", "inference")
LOGGERS = ("tensorboard", "wandb", "mlflow")

# What the command line and a config.yaml call a model, and the class of its config.
MODELS = {"fla": GatedDeltaNetConfig, "mamba2": Mamba2Config}


def model_name(config: ModelConfig) -> str:
    """What the command line calls a model of this config."""
    return next(name for name, kind in MODELS.items() if type(config) is kind)


@dataclass(kw_only=True)
class NormConfig:
    path: str = one_of(*NORM_PATHS)


@dataclass(kw_only=True)
class DataConfig:
    source: str = one_of("stdlib", "text", "hub")
    path: str | list[str] | None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: dict | None = None
    name: str | None
    config: str | None
    split: str
    streaming: bool
    column: str
    hold_out: int = number(at_least=2)
    val_tokens: int | None = number(at_least=1)
    sequence_length: int = number(at_least=1)
    reset_state: bool


@dataclass(kw_only=True)
class OptimConfig:
    steps: int = number(at_least=1, below=2**31)
    batch_size: int = number(at_least=1)
    learning_rate: float = number(above=0)
    schedule: str = one_of("cosine", "constant", "wsd", default="cosine")
    min_learning_rate_ratio: float = number(0.1, at_least=0, at_most=1)
    min_learning_rate: float | None = number(at_least=0)
    warmup_steps: int | None = number(at_least=0)
    decay_steps: int | None = number(None, at_least=0)
    weight_decay: float = number(at_least=0)
    betas: tuple[float, float]
    gradient_clip: float = number(at_least=0)


@dataclass(kw_only=True)
class TrainerConfig:
    accelerator: str = one_of("auto", "cpu", "gpu")
    devices: int = number(at_least=1)
    strategy: str = one_of("auto", "ddp", "fsdp")
    tensor_parallel: int = number(1, at_least=1)
    precision: str = one_of("auto", "32-true", "bf16-mixed", "16-mixed")
    accumulate: int = number(at_least=1, below=2**31)
    compile: bool
    activation_checkpointing: bool
    fuse_norm_linear: bool = False
    norm_linear_precision: str | None = one_of("fp8", "fp8_emulated", default=None)
    loggers: list[str] = field(metadata={"choices": LOGGERS})
    checkpoint_every: int = number(at_least=1)
    validate_every: int | None = number(None, at_least=0)
    validate_tokens: int | None = number(8192, at_least=1)


@dataclass(kw_only=True)
class TrainConfig:
    model: ModelConfig
    norm: NormConfig
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    seed: int = number(at_least=0, below=2**32)
    runs_dir: str
    resume: str | None
    exact: bool = False
    checkpoint: str | None = None
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        # The keys and groups that were typed for this one command. Not a field: a run's config.yaml
        # does not hold it.
        self.typed: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class InferConfig:
    norm: NormConfig
    model: str | None = one_of(*MODELS)
    checkpoint: str | None
    runs_dir: str
    prompt: str | None
    prompt_file: str | None
    prompts_file: str | None
    batch_size: int = number(at_least=1)
    output: str = one_of("text", "json")
    max_new_tokens: int = number(at_least=0)
    temperature: float = number(at_least=0)
    top_k: int | None = number(at_least=1)
    top_p: float | None = number(above=0, at_most=1)
    repetition_penalty: float = number(above=0)
    stop: list[str]
    seed: int = number(at_least=0, below=2**63)
    device: str = one_of("auto", "cpu", "cuda")
    exact: bool
    compare: bool
    bench: bool
    bench_runs: int = number(at_least=1)


LISTS = (str | list[str] | None, tuple[str, ...])  # which the command line has in brackets


def _text_keys(kind: type, prefix: str = "") -> set[str]:
    nested = [_text_keys(f.type, f"{f.name}.") for f in fields(kind) if is_dataclass(f.type)]
    texts = (str, str | None, list[str], *LISTS)
    own = {f.name for f in fields(kind) if f.type in texts and "choices" not in f.metadata}
    return {prefix + key for key in own.union(*nested)}


# The dotted keys whose values are free text: prompts, paths and names.
TEXT_KEYS = _text_keys(TrainConfig) | _text_keys(InferConfig)

# What a data source cannot do without, and what that is.
NEEDED = {
    "stdlib": {},
    "text": {"path": "a file, a folder or a glob"},
    "hub": {"name": "a set such as owner/name"},
}
# What a data source does not read, and the value that it then has.
NO_HUB = {"name": None, "config": None, "streaming": False, "split": "train"}
NO_FILES = {"include": (), "exclude": (), "options": None}
UNUSED = {
    "stdlib": {**NO_HUB, **NO_FILES, "column": "text"},
    "text": NO_HUB,
    "hub": {"path": None, **NO_FILES},
}
# What infer.py does not read, with its default: when it measures, greedily and on one prompt, or
# scores, and when it does not measure.
SAMPLING = {"temperature": 0.9, "top_k": 50, "top_p": None, "repetition_penalty": 1.0, "seed": 1}
UNMEASURED, MEASURES = {**SAMPLING, "stop": [], "batch_size": 1}, {"bench_runs": 5}


def train_config(values: Mapping[str, Any], typed: frozenset[str] = frozenset()) -> TrainConfig:
    """The typed and checked form of a composed train.yaml, for which the keys in `typed` stand on
    the command line, or of a run's config.yaml. Raises ConfigError."""
    trainer = values.get("trainer")
    if isinstance(trainer, Mapping) and "tensorboard" in trainer:  # as 0.1.0 wrote it
        trainer = dict(trainer)
        trainer["loggers"] = ["tensorboard"] if trainer.pop("tensorboard") else []
        values = {**values, "trainer": trainer}
    config = _section(TrainConfig, values)
    config.typed = typed
    data, optim = config.data, config.optim
    _require(
        config.norm.path == "training",
        f"train.py needs norm=training, got norm={config.norm.path}: the inference path keeps "
        "nothing for a backward pass; train with norm=training, then use it in infer.py",
    )
    lowest = optim.min_learning_rate
    _require(
        lowest is None or lowest <= optim.learning_rate,
        f"optim.min_learning_rate must be at most optim.learning_rate={optim.learning_rate}, got "
        f"{lowest}; lower it, or raise the other",
    )
    for key, schedules in {"min_learning_rate": ["cosine", "wsd"], "decay_steps": ["wsd"]}.items():
        _require(
            (value := getattr(optim, key)) is None or optim.schedule in schedules,
            f"optim.{key} must be left out with optim.schedule={optim.schedule}, got {value}; "
            f"leave it out, or use {' or '.join(schedules)}",
        )
    _require(
        optim.decay_steps is None or optim.decay_steps <= optim.steps,
        f"optim.decay_steps must be at most optim.steps={optim.steps}, got {optim.decay_steps}; "
        f"lower it, for example to {optim.steps // 5}",
    )
    _require(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        f"optim.betas must be two numbers from 0 to below 1, got {list(optim.betas)}; use for "
        "example [0.9,0.95]",
    )
    _require(
        # Those of a preset are for its own steps: demo/training/schedule.py has them fit others.
        "optim.warmup_steps" not in typed or (optim.warmup_steps or 0) <= optim.steps,
        f"optim.warmup_steps must be at most optim.steps={optim.steps}, got {optim.warmup_steps}; "
        f"lower it, for example to {optim.steps // 10}",
    )
    check_together(config)
    for key, usual in UNUSED[data.source].items():
        _require(
            (value := getattr(data, key)) == usual,
            f"data.{key} must be left out with data={data.source}, got {as_written(value)}; leave "
            f"it out, or use data={'hub' if key in NO_HUB else 'text'}",
        )
    for key, what in NEEDED[data.source].items():
        _require(
            getattr(data, key),
            f"data={data.source} needs data.{key}, got none; name {what}",
        )
    return config


def check_together(config: TrainConfig) -> None:
    """Raises ConfigError for values that may each be changed when a run goes on, and that do not go
    together."""
    ranks = config.trainer.tensor_parallel
    _require(
        not (config.exact and config.trainer.compile),
        "exact=true needs trainer.compile=false, got true: what the compiler makes of a block "
        "rounds otherwise than the same block in infer.py; leave out one of them",
    )
    _require(
        ranks == 1 or config.trainer.strategy != "fsdp",
        f"trainer.tensor_parallel must be 1 with trainer.strategy=fsdp, got {ranks}; leave out one "
        "of them",
    )
    _require(
        not (config.exact and ranks > 1),
        f"exact=true needs trainer.tensor_parallel=1, got {ranks}: sums over processes round "
        "otherwise than the products of one; leave out one of them",
    )


def infer_config(values: Mapping[str, Any], _: frozenset[str] = frozenset()) -> InferConfig:
    """As `train_config`, for a composed infer.yaml."""
    if isinstance(values.get("stop"), str):  # as it stands on the command line
        values = {**values, "stop": _stop_strings(values["stop"])}
    config = _section(InferConfig, values)
    measure = "compare=true" if config.compare else "bench=true" if config.bench else None
    _require(
        not (config.compare and config.bench),
        "compare and bench cannot both be true; leave one out",
    )
    _require(
        measure is None or config.prompts_file is None,
        f"{measure} takes one prompt, got prompts_file={config.prompts_file!r}; use prompt or "
        "prompt_file",
    )
    scores = config.max_new_tokens == 0
    _require(
        not (measure and scores),
        f"max_new_tokens must be at least 1 with {measure}, got 0; leave out one of them",
    )
    unread = []
    if instead := "max_new_tokens=0" if scores else measure:
        unread += [(UNMEASURED, f"with {instead}", f"leave out {instead}")]
    if not measure:
        unread += [(MEASURES, "without compare or bench", "add bench=true")]
    for defaults, when, remedy in unread:
        for key, usual in defaults.items():
            _require(
                (value := getattr(config, key)) == usual,
                f"{key} must be left out {when}, got {as_written(value)}; leave it out, or "
                f"{remedy}",
            )
    return config


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The typed and checked form of a `model` section. Raises ConfigError."""
    values = dict(values)
    name = values.pop("name", None)
    with about():
        check_choice("model.name", name, MODELS)
    return _section(MODELS[name], values, "model.")


def unknown_key(key: str, keys: Iterable[str]) -> ConfigError:
    """The error for a key that is none of `keys`, with what was probably meant: within a section,
    something of that section."""
    section, _, name = key.rpartition(".")
    names = [k.rpartition(".")[2] for k in keys if section and k.rpartition(".")[0] == section]
    if names:
        hint = nearest(name, names, f"{section}.") or f"; {section} has {', '.join(names)}"
    else:
        hint = nearest(key, keys) or "; --help lists them all"
    return ConfigError(f"there is no key {key!r}{hint}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _listed(text: str) -> str | list[str]:
    """A text as it stands, or those between brackets and commas, in double quotes where one holds a
    comma."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    return next(csv.reader([text[1:-1]], skipinitialspace=True), [])


def _stop_strings(text: str) -> list[str]:
    """A JSON list where the text begins with a bracket, else the text as it stands."""
    if not text.startswith("["):
        return [text]
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    raise ConfigError(
        "stop must be text, or a JSON list of strings if it begins with a bracket, got "
        f'{text!r}; write for example stop=\'["[", "def "]\''
    )


def _section(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The values of a section as a dataclass of this kind; its keys begin with `prefix`."""
    keys = [prefix + f.name for f in fields(kind)]
    for name in values:
        if f"{prefix}{name}" not in keys:
            raise unknown_key(f"{prefix}{name}", keys)
    made = {}
    for f in fields(kind):
        if f.name in values:
            made[f.name] = _converted(prefix + f.name, f.type, values[f.name])
        else:
            _require(f.default is not MISSING, f"{prefix}{f.name} must have a value, got none")
    try:
        section = kind(**made)
        check_ranges(section)
    except ValueError as error:  # which names the field alone
        raise ConfigError(f"{prefix}{error}") from error
    return section


KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text of at least one character",
    dict: "values by name, such as {encoding: latin-1}",
}


def _converted(key: str, kind: Any, value: Any) -> Any:
    """A value as YAML or Hydra's grammar reads it, as a value of a field of this type."""
    if is_dataclass(kind):
        given = as_written(value)
        _require(isinstance(value, Mapping), f"{key} must have keys of its own, got {given}")
        return model_config(value) if kind is ModelConfig else _section(kind, value, f"{key}.")
    if kind in LISTS and isinstance(value, str):
        value = _listed(value)
    if NoneType in (kinds := get_args(kind)):
        if value is None:
            return None
        kind = kinds[-2 if isinstance(value, list | tuple) else 0]
    if many := get_origin(kind):  # list[str] or tuple[float, float]
        kind = get_args(kind)[0]
        if kind is str and isinstance(value, str):  # a single one
            value = [value]
        if isinstance(value, list | tuple):
            return many(_converted(key, kind, item) for item in value)
    elif kind is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is bool:
        if (word := str(value).lower()) in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return word in ("true", "yes", "on", "1")
    elif isinstance(value, int | str if kind is int else int | float | str):
        with suppress(ValueError, OverflowError):  # not a number, or above what a float can be
            if value != "" and not isinstance(value, bool):
                return kind(value)
    what = f"a list, each {KINDS[kind]}" if many else KINDS[kind]
    raise ConfigError(f"{key} must be {what}, got {as_written(value)}; give one, or leave it out")

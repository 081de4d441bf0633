"""Types and ranges of everything that configs/*.yaml can say.

The YAML files hold the defaults and say what a value means; the dataclasses here give its type
and its range. `train_config` and `infer_config` turn a composed Hydra config into dataclasses, or
raise `ConfigError`: one line that names the value, the rule and the remedy. Imports nothing heavy.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from demo.config.errors import ConfigError, RunError, about, first_line  # noqa: F401
from models.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from models.ranges import as_written, check_choice, check_ranges, nearest, number, one_of

NORM_PATHS = ("training", "inference")

# The name of a model on the command line and in a config.yaml, and what it is.
MODELS = {"fla": GatedDeltaNetConfig, "mamba2": Mamba2Config}


def model_name(config: ModelConfig) -> str:
    """What the command line calls a model of this config."""
    return next(name for name, kind in MODELS.items() if type(config) is kind)


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """A config's or a file's `model` section as a dataclass. Raises ValueError, KeyError and what
    OmegaConf raises."""
    values = dict(values)
    name = values.pop("name")
    check_choice("model.name", name, MODELS)
    merged = OmegaConf.merge(_model_schema(name), values)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _model_schema(name: str) -> DictConfig:
    schema = OmegaConf.structured(MODELS[name])
    OmegaConf.set_readonly(schema, False)  # which it is for a frozen dataclass
    return schema


@dataclass
class NormConfig:
    path: str = one_of(*NORM_PATHS, default=MISSING)


@dataclass
class DataConfig:
    source: str = one_of("stdlib", "text", "hub", default=MISSING)
    path: str | None = MISSING
    name: str | None = MISSING
    config: str | None = MISSING
    split: str = MISSING
    streaming: bool = MISSING
    column: str = MISSING
    hold_out: int = number(MISSING, at_least=2)
    val_tokens: int | None = number(MISSING, at_least=1)
    sequence_length: int = number(MISSING, at_least=1)
    reset_state: bool = MISSING


@dataclass
class OptimConfig:
    steps: int = number(MISSING, at_least=1, below=2**31)
    batch_size: int = number(MISSING, at_least=1)
    learning_rate: float = number(MISSING, above=0)
    min_learning_rate: float = number(MISSING, at_least=0)
    warmup_steps: int | None = number(MISSING, at_least=0)
    weight_decay: float = number(MISSING, at_least=0)
    betas: tuple[float, float] = MISSING
    gradient_clip: float = number(MISSING, at_least=0)


@dataclass
class TrainerConfig:
    accelerator: str = one_of("auto", "cpu", "gpu", default=MISSING)
    devices: int = number(MISSING, at_least=1)
    strategy: str = one_of("auto", "ddp", "fsdp", default=MISSING)
    precision: str = one_of("auto", "32-true", "bf16-mixed", "16-mixed", default=MISSING)
    accumulate: int = number(MISSING, at_least=1, below=2**31)
    compile: bool = MISSING
    activation_checkpointing: bool = MISSING
    tensorboard: bool = MISSING
    checkpoint_every: int = number(MISSING, at_least=1)


@dataclass
class TrainConfig:
    model: Any = MISSING
    norm: NormConfig = field(default_factory=NormConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = number(MISSING, at_least=0, below=2**32)
    runs_dir: str = MISSING
    resume: str | None = MISSING
    checkpoint: str | None = None
    tokenizer: str = "bytes"


@dataclass
class InferConfig:
    norm: NormConfig = field(default_factory=NormConfig)
    model: str | None = one_of(*MODELS, default=MISSING)
    checkpoint: str | None = MISSING
    runs_dir: str = MISSING
    prompt: str | None = MISSING
    prompt_file: str | None = MISSING
    prompts_file: str | None = MISSING
    batch_size: int = number(MISSING, at_least=1)
    output: str = one_of("text", "json", default=MISSING)
    max_new_tokens: int = number(MISSING, at_least=1)
    temperature: float = number(MISSING, at_least=0)
    top_k: int | None = number(MISSING, at_least=1)
    top_p: float | None = number(MISSING, above=0, at_most=1)
    repetition_penalty: float = number(MISSING, above=0)
    stop: list[str] = MISSING
    seed: int = number(MISSING, at_least=0, below=2**63)
    device: str = one_of("auto", "cpu", "cuda", default=MISSING)
    compare: bool = MISSING
    bench: bool = MISSING
    bench_runs: int = number(MISSING, at_least=1)


# What a data source cannot do without, and what that is.
NEEDED = {
    "stdlib": {},
    "text": {"path": "a file, a folder or a glob"},
    "hub": {"name": "a set such as owner/name"},
}
# What a data source does not read, and the value that it then has.
NO_HUB = {"name": None, "config": None, "streaming": False, "split": "train"}
UNUSED = {"stdlib": {**NO_HUB, "column": "text"}, "text": NO_HUB, "hub": {"path": None}}
# The same of infer.py: when it measures, greedily and on one prompt, and when it does not.
SAMPLING = {"temperature": 0.9, "top_k": 50, "top_p": None, "repetition_penalty": 1.0, "seed": 1}
UNMEASURED, MEASURES = {**SAMPLING, "stop": [], "batch_size": 1}, {"bench_runs": 5}


def train_config(composed: DictConfig, verbatim: Mapping[str, Any] | None = None) -> TrainConfig:
    """The typed and checked form of a composed train.yaml, with the values of the dotted keys in
    `verbatim` instead of the composed ones. Raises ConfigError."""
    config = _typed(TrainConfig, composed, verbatim)
    if config.norm.path != "training":
        raise ConfigError(
            f"train.py needs norm=training, got norm={config.norm.path}: the inference path keeps "
            "nothing for a backward pass; train with norm=training, then use it in infer.py"
        )
    optim = config.optim
    if optim.min_learning_rate > optim.learning_rate:
        raise ConfigError(
            f"optim.min_learning_rate must be at most optim.learning_rate={optim.learning_rate}, "
            f"got {optim.min_learning_rate}; lower it, or raise the other"
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(
            f"optim.betas must be two numbers from 0 to below 1, got {list(optim.betas)}; "
            "use for example [0.9,0.95]"
        )
    if optim.warmup_steps is not None and optim.warmup_steps > optim.steps:
        raise ConfigError(
            f"optim.warmup_steps must be at most optim.steps={optim.steps}, got "
            f"{optim.warmup_steps}; lower it, for example to {optim.steps // 10}"
        )
    data = config.data
    if data.path == "":  # of a shell variable that is not set
        raise ConfigError(
            "data.path must be a file, a folder or a glob, got ''; name one, or leave it out for "
            "the standard library"
        )
    for key, usual in UNUSED[data.source].items():
        if getattr(data, key) == usual:
            continue
        given = as_written(getattr(data, key))
        raise ConfigError(
            f"data.{key} must be left out with data={data.source}, got {given}; "
            f"leave it out, or use data={'text' if key in ('path', 'column') else 'hub'}"
        )
    for key, what in NEEDED[data.source].items():
        if getattr(data, key) is None:
            raise ConfigError(f"data={data.source} needs data.{key}, got none; name {what}")
    return config


def infer_config(composed: DictConfig, verbatim: Mapping[str, Any] | None = None) -> InferConfig:
    """As `train_config`, for a composed infer.yaml."""
    config = _typed(InferConfig, composed, verbatim)
    if isinstance(config.stop, str):  # as it stood on the command line
        config.stop = _stop_strings(config.stop)
    if not all(config.stop):
        raise ConfigError(
            f"stop must be strings of at least one character, got {config.stop!r}; leave it out "
            "for none"
        )
    for name, value in (("compare", config.compare), ("bench", config.bench)):
        if value and config.prompts_file is not None:
            raise ConfigError(
                f"{name}=true takes one prompt, got prompts_file={config.prompts_file!r}; use "
                "prompt or prompt_file"
            )
    if config.compare and config.bench:
        raise ConfigError("compare and bench cannot both be true; leave one out")
    measure = "compare" if config.compare else "bench"
    if config.compare or config.bench:
        unread, when, remedy = UNMEASURED, f"with {measure}=true", f"leave out {measure}"
    else:
        unread, when, remedy = MEASURES, "without compare or bench", "add bench=true"
    for key, usual in unread.items():
        if (value := getattr(config, key)) != usual:
            given = as_written(value)
            raise ConfigError(
                f"{key} must be left out {when}, got {given}; leave it out, or {remedy}"
            )
    return config


def _stop_strings(text: str) -> list[str]:
    """A JSON list where the text begins with a bracket, else the text as it stands."""
    if not text.startswith("["):
        return [text]
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(
            "stop must be text, or a JSON list of strings if it begins with a bracket, got "
            f'{text!r}; write for example stop=\'["[", "def "]\''
        )
    return value


HELP_LISTS_THEM = "; --help lists them all"


def all_keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of a nested mapping, sections included."""
    keys = []
    for name, value in config.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += all_keys(value, f"{prefix}{name}.")
    return keys


EMPTY = ("prompt", "stop", "data.path")  # have errors of their own


def _typed(schema: Any, composed: DictConfig, verbatim: Mapping[str, Any] | None) -> Any:
    node, values = OmegaConf.structured(schema), OmegaConf.to_container(composed, resolve=True)
    if schema is TrainConfig:  # which keys a model has depends on its name
        name = values["model"].pop("name", None)
        try:
            check_choice("model.name", name, MODELS)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        node.model = _model_schema(name)
    keys = all_keys(OmegaConf.to_container(node))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(node, values))
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = error.full_key or str(error.key)
        hint = nearest(key, keys) or HELP_LISTS_THEM
        raise ConfigError(f"there is no key {key!r}{hint}") from error
    except MissingMandatoryValue as error:
        key = _dotted(keys, error.full_key)
        raise ConfigError(f"{key} must have a value, got none; give one") from error
    except OmegaConfBaseException as error:
        rule = first_line(error).rstrip(".").replace("'None'", "null")
        key = _dotted(keys, error.full_key)
        raise ConfigError(f"{key}: {rule}; give another value") from error
    except ValueError as error:  # of a model's config, about one of its fields
        raise ConfigError(f"model.{error}") from error
    for key, value in (verbatim or {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(getattr, sections, config)
        kind = section.__dataclass_fields__[name].type
        if (value is None and NoneType not in get_args(kind)) or (value == "" and key not in EMPTY):
            given = "null" if value is None else "''"
            raise ConfigError(f"{key} must have a value, got {given}; give one, or leave it out")
        setattr(section, name, value)
    try:
        check_ranges(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config


def _dotted(keys: list[str], key: str | None) -> str:
    """OmegaConf drops the outer sections of a key that fails while merging: find them again."""
    full = [k for k in keys if k == key or k.endswith(f".{key}")]
    return full[0] if len(full) == 1 else str(key)

"""Types and ranges of everything that configs/*.yaml can say.

The YAML files hold the defaults and say what a value means; the dataclasses here give its type
and its range. `train_config` and `infer_config` turn a composed Hydra config into dataclasses, or
raise `ConfigError`: one line that names the value, the rule and the remedy. Imports nothing heavy.
"""

import difflib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

NORM_PATHS = ("training", "inference")


class ConfigError(ValueError):
    """Something that the user can put right; the message is one line."""


class RunError(ConfigError):
    """A run that had to stop; the message says what is left and how to go on."""


@contextmanager
def about(key: str) -> Iterator[None]:
    """A ValueError that comes out of it becomes a ConfigError about `key`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def as_written(value: Any) -> str:
    """A value as somebody wrote it who writes YAML: null and true, not None and True."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def one_of(*choices: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"choices": choices})


def number(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    default: Any = MISSING,
) -> Any:
    """A field for a finite number in a range, or for None where its type allows that. A default
    here is for the config.yaml of checkpoints that are older than the field."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"bounds": bounds})


@dataclass
class ModelConfig:
    """What both language models have."""

    name: str = one_of("fla", "mamba2")
    vocab_size: int = number(at_least=1, default=256)
    hidden_size: int = number(at_least=1)
    num_layers: int = number(at_least=1)
    mlp_ratio: float = number(at_least=0)
    tie_embeddings: bool = MISSING
    norm_eps: float = number(above=0)

    def mixer_args(self) -> dict[str, Any]:
        """The arguments of the mixer itself: the fields that only the subclass has."""
        shared = {f.name for f in fields(ModelConfig)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}


@dataclass
class FlaConfig(ModelConfig):
    num_heads: int = number(at_least=1)
    head_dim: int = number(at_least=1)
    expand_v: float = number(above=0)
    num_v_heads: int | None = number(at_least=1)
    conv_size: int = number(at_least=1)
    conv_bias: bool = False
    use_gate: bool = True
    gate_activation: str = one_of("silu", "sigmoid", default="silu")
    allow_neg_eigval: bool = False


@dataclass
class Mamba2Config(ModelConfig):
    d_state: int = number(at_least=1)
    head_dim: int = number(at_least=1)
    expand: int = number(at_least=1)
    n_groups: int = number(at_least=1)
    norm_groups: int | None = number(at_least=1)
    conv_size: int = number(at_least=1)
    conv_bias: bool = True
    bias: bool = False
    dt_limit: list[float] = field(default_factory=lambda: [0.0, math.inf])


MODELS = {"fla": FlaConfig, "mamba2": Mamba2Config}
MIXER_NAMES = {"fla": "gated_deltanet", "mamba2": "mamba2"}


@dataclass
class NormConfig:
    path: str = one_of(*NORM_PATHS)


@dataclass
class DataConfig:
    source: str = one_of("stdlib", "text", "hub")
    path: str | None = MISSING
    name: str | None = MISSING
    config: str | None = MISSING
    split: str = MISSING
    streaming: bool = MISSING
    column: str = MISSING
    hold_out: int = number(at_least=2)
    val_tokens: int | None = number(at_least=1)
    sequence_length: int = number(at_least=1)
    reset_state: bool = MISSING


@dataclass
class OptimConfig:
    steps: int = number(at_least=1, below=2**31)
    batch_size: int = number(at_least=1)
    learning_rate: float = number(above=0)
    min_learning_rate: float = number(at_least=0)
    warmup_steps: int | None = number(at_least=0)
    weight_decay: float = number(at_least=0)
    betas: tuple[float, float] = MISSING
    gradient_clip: float = number(at_least=0)


@dataclass
class TrainerConfig:
    accelerator: str = one_of("auto", "cpu", "gpu")
    devices: int = number(at_least=1)
    strategy: str = one_of("auto", "ddp", "fsdp")
    precision: str = one_of("auto", "32-true", "bf16-mixed", "16-mixed")
    accumulate: int = number(at_least=1, below=2**31)
    compile: bool = MISSING
    activation_checkpointing: bool = MISSING
    tensorboard: bool = MISSING
    checkpoint_every: int = number(at_least=1)


@dataclass
class TrainConfig:
    model: Any = MISSING
    norm: NormConfig = field(default_factory=NormConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = number(at_least=0, below=2**32)
    runs_dir: str = MISSING
    resume: str | None = MISSING
    checkpoint: str | None = None
    tokenizer: str = "bytes"


@dataclass
class InferConfig:
    norm: NormConfig = field(default_factory=NormConfig)
    model: str | None = one_of(*MODELS)
    checkpoint: str | None = MISSING
    runs_dir: str = MISSING
    prompt: str | None = MISSING
    prompt_file: str | None = MISSING
    prompts_file: str | None = MISSING
    batch_size: int = number(at_least=1)
    output: str = one_of("text", "json")
    max_new_tokens: int = number(at_least=1)
    temperature: float = number(at_least=0)
    top_k: int | None = number(at_least=1)
    top_p: float | None = number(above=0, at_most=1)
    repetition_penalty: float = number(above=0)
    stop: list[str] = MISSING
    seed: int = number(at_least=0, below=2**63)
    device: str = one_of("auto", "cpu", "cuda")
    compare: bool = MISSING
    bench: bool = MISSING
    bench_runs: int = number(at_least=1)


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
    name = OmegaConf.select(composed, "model.name")
    _check_choice("model.name", name, tuple(MODELS))
    config = _typed(TrainConfig(model=MODELS[name]()), composed, verbatim)
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
    limits = getattr(config.model, "dt_limit", [0.0, 1.0])
    if len(limits) != 2 or not 0 <= limits[0] < limits[1]:
        raise ConfigError(
            f"model.dt_limit must be two numbers from 0, the second above the first, got "
            f"{list(limits)}; use for example [0,.inf]"
        )
    return config


def infer_config(composed: DictConfig, verbatim: Mapping[str, Any] | None = None) -> InferConfig:
    """As `train_config`, for a composed infer.yaml."""
    config = _typed(InferConfig(), composed, verbatim)
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


def nearest(word: str, choices: Any, prefix: str = "") -> str:
    """'; did you mean ...?' for the choice that is spelt most like `word`, said with `prefix`, or
    nothing."""
    names = {str(choice).lower(): str(choice) for choice in choices}
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{names[close[0]]}?" if close else ""


def all_keys(config: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a nested mapping or dataclass, sections included."""
    if is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in fields(config)}
    keys = []
    for name, value in config.items():
        keys.append(f"{prefix}{name}")
        if is_dataclass(value) or isinstance(value, dict):
            keys += all_keys(value, f"{prefix}{name}.")
    return keys


EMPTY = ("prompt", "stop", "data.path")  # have errors of their own


def _typed(schema: Any, composed: DictConfig, verbatim: Mapping[str, Any] | None) -> Any:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = error.full_key or str(error.key)
        hint = nearest(key, all_keys(schema)) or HELP_LISTS_THEM
        raise ConfigError(f"there is no key {key!r}{hint}") from error
    except MissingMandatoryValue as error:
        key = _dotted(schema, error.full_key)
        raise ConfigError(f"{key} must have a value, got none; give one") from error
    except OmegaConfBaseException as error:
        rule = first_line(error).rstrip(".").replace("'None'", "null")
        key = _dotted(schema, error.full_key)
        raise ConfigError(f"{key}: {rule}; give another value") from error
    for key, value in (verbatim or {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(getattr, sections, config)
        kind = section.__dataclass_fields__[name].type
        if (value is None and NoneType not in get_args(kind)) or (value == "" and key not in EMPTY):
            given = "null" if value is None else "''"
            raise ConfigError(f"{key} must have a value, got {given}; give one, or leave it out")
        setattr(section, name, value)
    _check_ranges(config)
    return config


def _dotted(schema: Any, key: str | None) -> str:
    """OmegaConf drops the outer sections of a key that fails while merging: find them again."""
    full = [k for k in all_keys(schema) if k == key or k.endswith(f".{key}")]
    return full[0] if len(full) == 1 else str(key)


def _check_ranges(config: Any, prefix: str = "") -> None:
    for f in fields(config):
        key, value = prefix + f.name, getattr(config, f.name)
        if is_dataclass(value):
            _check_ranges(value, key + ".")
        elif value is not None and "choices" in f.metadata:
            _check_choice(key, value, f.metadata["choices"])
        elif value is not None and "bounds" in f.metadata:
            _check_bounds(key, value, f.metadata["bounds"])


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ConfigError(
            f"{key} must be one of {', '.join(choices)}, got {as_written(value)}{hint}"
        )


def _check_bounds(key: str, value: float, bounds: dict[str, float]) -> None:
    holds = {
        "at least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    finite = math.isfinite(value)
    if not finite or not all(holds[word](bound) for word, bound in bounds.items()):
        rule = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
        rule = rule if finite else f"a finite number {rule}"
        raise ConfigError(f"{key} must be {rule}, got {value}; use a value in that range")

"""What stands on a command line, `key=value` in Hydra's grammar, and the config that comes of it.

Hydra composes the files that the groups choose. The other values are set afterwards, each by its
key: a mistake is one line about that key, and text is taken as it stands.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from demo.config.errors import ConfigError, about
from demo.config.schema import MODELS, TEXT_KEYS, infer_config, train_config, unknown_key
from models.ranges import as_written, check_choice

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
CHECKS = {"train": train_config, "infer": infer_config}
# What to use instead of Hydra's own values, by a part of the key, and of its own options.
INSTEAD_OF_VALUES = {
    "chdir": "a command stays in the folder that it is started in",
    "searchpath": "files in configs/ are chosen by their group, as in experiment=smoke",
    "dir": "runs_dir says where runs are written to, each in a folder of its own",
    "launcher": "-m runs its jobs one after the other, and several commands run at once",
    "sweep": "-m tries all combinations, as in -m seed=1,2 model=fla,mamba2",
    "mode": "-m tries all combinations, as in -m seed=1,2 model=fla,mamba2",
    "logging": "metrics.csv has a run's numbers, and trainer.loggers sends them elsewhere",
    "job.name": "a run's folder is named by its time and its model",
}
INSTEAD_OF_OPTIONS = {
    **dict.fromkeys(
        ("--config-dir", "--config-name", "--config-path", "-cd", "-cn", "-cp"),
        INSTEAD_OF_VALUES["searchpath"],
    ),
    **dict.fromkeys(("--info", "-i", "--resolve", "--package", "-p"), "--cfg job shows the values"),
    "--experimental-rerun": "resume goes on with a run",
    "--run": "leave it out",
    "-r": "leave it out",
}
LITERAL = ("prompt", "stop")  # `null` is text for these, and commas are never several values


@dataclass(frozen=True)
class Composed:
    """A config before it is checked: its nested values, the option of each group, the keys and
    groups that the overrides name, and the template of the help text."""

    values: dict[str, Any]
    choices: dict[str, Any]
    typed: frozenset[str]
    help: str


def compose(name: str, overrides: Sequence[str] = ()) -> Any:
    """The checked config of `name`.py with these overrides. Raises ConfigError."""
    composed = compose_values(name, overrides)
    model, size = composed.choices.get("model"), composed.choices.get("size")
    other = str(size).partition("_")[0]
    if other in MODELS and other != model:
        raise ConfigError(
            f"size must be one of model={model}, got {size}; use one that begins with {model}_, or "
            f"model={other}"
        )
    return CHECKS[name](composed.values, composed.typed)


def compose_values(name: str, overrides: Iterable[str]) -> Composed:
    """What `compose` checks. Raises ConfigError for what cannot be read, or is not there at all."""
    options = groups(name)
    given = dict(_read(name, argument) for argument in overrides)
    chosen = {key: value for key, value in given.items() if key in options}
    for group, value in chosen.items():
        _check_options(group, value, options[group])
    of_groups = [f"{group}={value}" for group, value in chosen.items()]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        composed = hydra.compose(name, of_groups, return_hydra_config=True)
    job = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    values = OmegaConf.to_container(job, resolve=True)
    keys = [*all_keys(values), *options]
    for key, value in given.items():
        if key not in keys:
            raise unknown_key(key, keys)
        if key not in chosen:
            section, *sections, last = [values, *key.split(".")]
            for inner in sections:
                section = section[inner]
            section[last] = value
    choices = {group: composed.hydra.runtime.choices.get(group) for group in options}
    return Composed(values, choices, frozenset(given), composed.hydra.help.template)


def jobs(name: str, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a multirun: one for each combination of values. Raises
    ConfigError where there is none."""
    values = {argument.partition("=")[0]: _swept(name, argument) for argument in overrides}
    found = [list(job) for job in itertools.product(*values.values())]
    if not found:
        raise ConfigError(
            f"-m must have at least one job, got none from {' '.join(overrides)}; give each key "
            "one value or more, as in seed=1,2"
        )
    return found


@functools.cache
def groups(name: str) -> dict[str, list[str]]:
    """The config groups of `name`.py and the options of each, which are its files."""
    config = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    names = sorted(group for entry in config["defaults"] if entry != "_self_" for group in entry)
    return {g: sorted(file.stem for file in (CONFIG_DIR / g).glob("*.yaml")) for g in names}


def all_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of nested values, sections included."""
    keys = []
    for name, value in values.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += all_keys(value, f"{prefix}{name}.")
    return keys


def _check_options(group: str, value: Any, options: list[str]) -> None:
    # Experiments are changes, which can be combined.
    several = group == "experiment" and isinstance(value, list)
    for option in value if several else [value]:
        if not isinstance(option, str):
            raise ConfigError(
                f"{group} must be one of {', '.join(options)}, got {as_written(option)}; choose "
                f"one, and set values by their keys, as in {group}.<name>=<value>"
            )
        with about():
            check_choice(group, option, options)


def _read(name: str, argument: str) -> tuple[str, Any]:
    """The key of an override and its value. Raises ConfigError."""
    prefixed, equals, text = argument.partition("=")
    key = prefixed.lstrip("+~")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        remedy = next(
            (use for part, use in INSTEAD_OF_VALUES.items() if part in key), "leave it out"
        )
        raise ConfigError(f"Hydra's own values have no effect here, got {argument!r}; {remedy}")
    if not equals or prefixed.startswith("~"):
        options = {"model": list(MODELS), **groups(name)}
        found = next((f"{group}={key}" for group in options if key in options[group]), None)
        meant = found or f"{key}=<value>" + f" or prompt={key}" * (name == "infer")
        raise ConfigError(f"cannot read {argument!r} as key=value; write {meant}")
    if key in TEXT_KEYS:
        return key, None if text == "null" and key not in LITERAL else _unquoted(text)
    override = _parsed(argument)
    if override.is_sweep_override():
        raise ConfigError(f"{argument!r} has several values; give one, or add -m to try them all")
    return key, override.value()


def _swept(name: str, argument: str) -> list[str]:
    """The overrides that one with several values stands for, one for each."""
    key = argument.partition("=")[0].lstrip("+")
    try:
        override = _parsed(argument)
    except ConfigError:  # text, or a mistake that composing it names
        return [argument]
    if key in LITERAL or not override.is_sweep_override():
        return [argument]
    value = override.value()
    if isinstance(value, Glob):
        found = value.filter(groups(name).get(key, []))
    elif override.is_discrete_sweep():
        found = override.sweep_string_iterator()
    else:
        raise ConfigError(f"-m cannot try all values of {argument!r}; name them, as in seed=1,2")
    return [f"{key}={value}" for value in found]


def _parsed(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ConfigError(
            f"cannot read {argument!r} as key=value; write a number, a word, or a list such as "
            "[1,2]"
        ) from error


def _unquoted(text: str) -> str:
    """Without one pair of Hydra's quotes, if they stand around all of it."""
    if text.startswith(("'", '"')):
        with suppress(ConfigError):
            value = _parsed(f"text={text}").value()
            return value if isinstance(value, str) else text
    return text

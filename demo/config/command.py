"""A script's `main` as a Hydra command whose every error is one line.

Hydra composes, sweeps, completes and prints help; what is added here: the composed config arrives
as a checked dataclass, text such as a prompt is taken as it stands, and a mistake of the user's is
answered with one line on standard error and exit code 2, before any work.
"""

import errno
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict

from demo.config.manual import CONFIG_DIR, manual
from demo.config.schema import (
    HELP_LISTS_THEM,
    MODELS,
    ConfigError,
    all_keys,
    as_written,
    first_line,
    infer_config,
    nearest,
    train_config,
)

CHECKS = {"train": train_config, "infer": infer_config}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def command(
    name: str,
    *,
    texts: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
    compare: str | None = None,
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorate `main(config)` of `name`.py; `main` may raise ConfigError.

    Keys in `texts` and `names` take whatever stands after their `=`, which Hydra's grammar would
    refuse or change (spaces at the end, commas, parentheses); for a name, `null` is still None.
    In a multirun (`-m`) the values of all jobs are checked before the first begins, and a job that
    fails stops no other; then the function of the dotted name `compare` gets its folder, and what
    each job has of its own and its result.
    """

    def decorate(main: Callable[[Any], Any]) -> Callable[[], None]:
        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to us
            for stream in ("stdout", "stderr"):
                if getattr(sys, stream) is None:  # closed by the shell, as with `>&-`
                    setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
            several = bool({"-m", "--multirun"} & set(sys.argv))
            # argparse wants all overrides together, so options come first wherever they stood.
            sys.argv[1:] = sorted(sys.argv[1:], key=lambda a: a not in ("-m", "--multirun"))
            arguments = list(sys.argv)
            verbatim = _take_verbatim(texts, () if several else names)
            results, folders, failed = [], [], []

            def task(values: DictConfig) -> None:
                sys.argv = arguments  # for processes that Lightning starts with the same ones
                hydra_config = HydraConfig.get()
                # Hydra reports an Exception of a task in its own words: leave before it sees one.
                try:
                    config = _checked(name, values, hydra_config.runtime.choices, verbatim)
                    folders.append(Path(hydra_config.sweep.dir))
                    with _standard_output():
                        result = main(config)
                except ConfigError as error:
                    if not several:
                        _fail(name, str(error))
                    _say(name, str(error))  # the other jobs are none the worse for it
                    failed.append(error)
                    return
                except BrokenPipeError:
                    _leave_pipe()
                results.append((list(hydra_config.overrides.task), result))

            hydra_main = hydra.main(
                version_base="1.3", config_path=str(CONFIG_DIR), config_name=name
            )
            overrides: list[str] = []
            try:
                with _standard_output():
                    overrides += _overrides(name, sys.argv[1:])
                    if {"-h", "--help"} & set(sys.argv):
                        print(_manual(name, overrides))
                        return
                    _check_groups(name, overrides)
                    if several:
                        _check_swept(names, overrides)
                        for job in _jobs(overrides):
                            compose(name, job)
                    with _sweep_folder(several):
                        hydra_main(task)()
                    # Lightning kills the first process where another one's exit code is not 0.
                    if _is_first():
                        if several and compare is not None and results:
                            get_method(compare)(folders[0], _own(results))
                        if failed:
                            sys.exit(2)
            except BrokenPipeError:
                _leave_pipe()
            except KeyboardInterrupt:
                sys.exit(130)
            except ConfigError as error:
                _fail(name, str(error))
            except Exception as error:  # of Hydra and OmegaConf, which raise all kinds
                if folders:  # a job had begun: it is not about the arguments
                    raise
                if isinstance(error, OSError) and error.errno:  # the folder of a multirun
                    _fail(
                        name,
                        "runs_dir must be a folder that can be written to, got "
                        f"{str(Path(error.filename).parent)!r} ({error.strerror}); name another",
                    )
                found = _explain_first(name, overrides, several)
                _fail(name, found or first_line(error))
            finally:
                if several and folders and not results:  # there is nothing to compare
                    Path(folders[0], "multirun.yaml").unlink(missing_ok=True)
                    with suppress(OSError):  # not empty: it was not made here
                        folders[0].rmdir()

        return run

    return decorate


def compose(name: str, overrides: list[str] | None = None) -> Any:
    """The checked config of `name`.py with these overrides, for tests and notebooks."""
    with _hydra():
        composed = hydra.compose(name, overrides or [], return_hydra_config=True)
    with open_dict(composed):
        choices = composed.pop("hydra").runtime.choices
    return _checked(name, composed, choices)


def explain(name: str, overrides: list[str]) -> str | None:
    """Which of the command line's overrides cannot be right, and what was probably meant."""
    with _hydra():
        groups = _groups(name)
        keys = all_keys(OmegaConf.to_container(hydra.compose(name)))
        # Groups first: what keys there are depends on them.
        for argument in sorted(overrides, key=lambda a: a.partition("=")[0] not in groups):
            if "=" not in argument and not argument.startswith("~"):
                return (
                    f"cannot read {argument!r} as key=value; write {_meant(argument, groups, keys)}"
                )
            try:
                override = OverridesParser.create().parse_override(argument)
            except HydraException:
                return (
                    f"cannot read {argument!r} as key=value; put text in quotes twice, "
                    "for example \"data.path='a (copy).txt'\""
                )
            key, value = override.key_or_group, override.value()
            if override.is_sweep_override():
                return f"{argument!r} has several values; give one, or add -m to try them all"
            named = value if isinstance(value, list) else [value]
            if key in groups and not all(name in groups[key] for name in named):
                options = ", ".join(groups[key])
                hint = nearest(str(value), groups[key])
                return f"{key} must be one of {options}, got {as_written(value)}{hint}"
            if key in groups:
                keys = all_keys(OmegaConf.to_container(hydra.compose(name, [argument])))
            elif key not in keys and key.partition(".")[0] != "hydra":
                return f"there is no key {key!r}{_nearest_key(key, keys, groups)}"
            elif override.is_delete():
                return (
                    f"every key must have a value, got {argument!r}; leave it out for the default, "
                    f"or write {key}=<value>"
                )
    return None


def _checked(
    name: str, composed: DictConfig, choices: DictConfig, verbatim: dict[str, Any] | None = None
) -> Any:
    """The dataclass of a composed config whose groups are set to `choices`. Raises ConfigError."""
    model, size = choices.get("model"), str(choices.get("size"))
    other = size.partition("_")[0]
    if other in MODELS and other != model:
        raise ConfigError(
            f"size must be one of model={model}, got {size}; use one that begins with {model}_, or "
            f"model={other}"
        )
    return CHECKS[name](composed, verbatim)


def _nearest_key(key: str, keys: list[str], groups: dict[str, list[str]]) -> str:
    """What was probably meant; within a section that there is, something of that section."""
    section, _, name = key.rpartition(".")
    names = [k.removeprefix(f"{section}.") for k in keys if section and k.startswith(f"{section}.")]
    if not names:
        return nearest(key, [*keys, *groups]) or HELP_LISTS_THEM
    return nearest(name, names, f"{section}.") or f"; {section} has {', '.join(names)}"


def _meant(word: str, groups: dict[str, list[str]], keys: list[str]) -> str:
    """How to write a word that stands alone: the option of a group, a group, a key or a prompt."""
    for group, options in {"model": MODELS, **groups}.items():
        if word in options:
            return f"{group}={word}"
    if word in groups:
        return f"{word}={groups[word][0]}"
    return f"{word}=<value>" if word in keys or "prompt" not in keys else f"prompt={word}"


def _overrides(name: str, arguments: list[str]) -> list[str]:
    """The arguments without options and their values. Raises ConfigError for what argparse would
    answer with its usage."""

    def error(message: str) -> None:
        dashed = [a.lstrip("-") for a in arguments if a.startswith("-") and "=" in a]
        if dashed:
            raise ConfigError(f"{message}; leave out the dashes: {' '.join(dashed)}")
        raise ConfigError(f"{message}; python {name}.py --help says how to write it")

    parser = get_args_parser()
    parser.error = error
    return parser.parse_args(arguments).overrides


def _check_groups(name: str, overrides: list[str]) -> None:
    """Raises ConfigError for a group that is set to anything but one of its files, which Hydra
    takes for values or for several files."""
    for argument in overrides:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:  # `explain` has more to say about it
            continue
        key, value = override.key_or_group, override.value()
        # Experiments are for changes that can be combined.
        if not isinstance(value, dict | list) or key == "experiment":
            continue
        groups = _groups(name)
        if key in groups:
            raise ConfigError(
                f"{key} must be one of {', '.join(groups[key])}, got "
                f"{argument.partition('=')[2]!r}; use one of them, and set values by their keys, "
                f"as in {key}.<name>=<value>"
            )


def _check_swept(names: tuple[str, ...], overrides: list[str]) -> None:
    """Raises ConfigError for a key of this command that Hydra takes for a group of the other's."""
    for argument in overrides:
        key = argument.partition("=")[0].lstrip("+")
        if key in names and (CONFIG_DIR / key).is_dir():
            raise ConfigError(
                f"{key} must be given without -m, got {argument!r}; run the command once for each"
                ", or use -m checkpoint= with several checkpoints"
            )


def _manual(name: str, overrides: list[str]) -> str:
    with _hydra():
        return manual(name, overrides, _groups(name))


def _explain_first(name: str, overrides: list[str], several: bool) -> str | None:
    """What `explain` has to say, of a multirun about the first job that it has."""
    try:
        jobs = _jobs(overrides) if several else [overrides]
    except HydraException:  # cannot be read
        jobs = [overrides]
    with suppress(Exception):  # wrong in yet another way: the first error has to do
        return next(filter(None, (explain(name, job) for job in jobs)), None)
    return None


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra ready to compose, also inside a command that Hydra runs."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a multirun. Raises ConfigError where there is none."""
    with _hydra():  # glob() asks it for the options of a group
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(overrides)
        jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    if not jobs:
        raise ConfigError(
            f"-m must have at least one job, got none from {' '.join(overrides)}; give each key "
            "one value or more, as in seed=1,2"
        )
    return jobs


@contextmanager
def _sweep_folder(several: bool) -> Iterator[None]:
    """Gives a process that is not the first of several another folder for Hydra's multirun.yaml:
    its clock would name one of its own beside the first one's."""
    apart = several and not _is_first()
    with tempfile.TemporaryDirectory() if apart else nullcontext() as folder:
        if apart:
            sys.argv.append(f"hydra.sweep.dir='{folder}'")
        yield


def _own(results: list[tuple[list[str], Any]]) -> list[tuple[str, Any]]:
    """Each result with those of its overrides that not all of them have."""
    shared = set.intersection(*(set(overrides) for overrides, _ in results))
    return [
        (" ".join(o for o in overrides if o not in shared) or " ".join(overrides), result)
        for overrides, result in results
    ]


@functools.cache
def _groups(name: str) -> dict[str, list[str]]:
    """The options of each config group that `name`.py has."""
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        chosen = hydra.compose(name, return_hydra_config=True).hydra.runtime.choices
        groups = sorted(group for group in chosen if group.partition("/")[0] != "hydra")
        return {group: loader.get_group_options(group) for group in groups}


def _take_verbatim(texts: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str | None]:
    """Takes `key=anything` for these keys out of sys.argv."""
    taken, rest = {}, []
    for argument in sys.argv[1:]:
        key, equals, text = argument.partition("=")
        if equals and key in texts:
            taken[key] = _unquote(text)
        elif equals and key in names:
            taken[key] = None if text == "null" else _unquote(text)
        else:
            rest.append(argument)
    sys.argv[1:] = rest
    return taken


def _unquote(text: str) -> str:
    """Without one pair of Hydra's quotes, if they stand around all of it."""
    try:
        override = OverridesParser.create().parse_override(f"text={text}")
    except HydraException:
        return text
    return override.value() if isinstance(override._value, QuotedString) else text


@contextmanager
def _standard_output() -> Iterator[None]:
    """Raises ConfigError where standard output takes no more, on a full disk for example. The files
    of a run have errors of their own, and a reader that left is a BrokenPipeError as ever."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise
        _drop_output()
        raise ConfigError(
            f"standard output must take the text, got an error ({error.strerror}); make room, or "
            "send it elsewhere"
        ) from error


def _drop_output() -> None:
    """For Python's flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_pipe() -> None:
    """`... | head`: nobody reads on, which is no error."""
    _drop_output()
    sys.exit(128 + signal.SIGPIPE)


def _is_first() -> bool:
    """Whether this is the first of the processes that work together, which speaks for all."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _say(name: str, message: str) -> None:
    if _is_first():
        print(f"{name}.py: error: {' '.join(message.split())}", file=sys.stderr)


def _fail(name: str, message: str) -> None:
    _say(name, message)
    sys.exit(2)

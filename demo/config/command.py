"""A script's `main` as a command: the one place where an error becomes a line on a terminal.

A mistake of the user's is one line on standard error and exit code 2, before any work.
"""

import argparse
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import yaml

from demo.config.errors import ConfigError
from demo.config.help import help_text
from demo.config.overrides import INSTEAD_OF_OPTIONS, compose, compose_values, jobs

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def command(
    name: str, *, compare: str | None = None
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorate `main(config)` of `name`.py; `main` may raise ConfigError.

    In a multirun (`-m`) the values of all jobs are checked before the first begins, and a job that
    fails stops no other. The function that `compare` names, as "module:function", then gets a new
    folder, and the result of each job with the overrides that not all jobs have.
    """

    def decorate(main: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            for stream in ("stdout", "stderr"):
                if getattr(sys, stream) is None:  # closed by the shell, as with `>&-`
                    setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
            try:
                with _standard_output():
                    succeeded = _run(name, main, compare)
            except BrokenPipeError:  # `... | head`: nobody reads on, which is no error
                _drop_output()
                sys.exit(128 + signal.SIGPIPE)
            except KeyboardInterrupt:
                sys.exit(130)
            except ConfigError as error:
                _say(name, error)
                succeeded = False
            if not succeeded:
                sys.exit(2)

        return run

    return decorate


def _run(name: str, main: Callable[[Any], Any], compare: str | None) -> bool:
    """Do what the command line says; whether all of it succeeded."""
    options = _options(name)
    todo = jobs(name, options.overrides) if options.multirun else [options.overrides]
    if options.help:
        print(help_text(name, compose_values(name, todo[0])))
        return True
    if options.cfg:
        values = [compose_values(name, job).values for job in todo]
        print(yaml.safe_dump_all(values, sort_keys=False, allow_unicode=True), end="")
        return True
    configs = [compose(name, job) for job in todo]
    if not options.multirun:
        main(configs[0])
        return True
    results = []
    for job, config in zip(todo, configs, strict=True):
        try:
            with _standard_output():
                results.append((job, main(config)))
        except ConfigError as error:
            _say(name, error)
    # Only the first process says how it went: Lightning kills it where another one exits with 2.
    if process_rank():
        return True
    if compare is not None and results:
        folder = Path(configs[0].runs_dir, f"compare_{datetime.now():%Y-%m-%d_%H-%M-%S}")
        folder.mkdir(parents=True, exist_ok=True)
        resolve_name(compare)(folder, _told_apart(results))
    return len(results) == len(todo)


def _options(name: str) -> argparse.Namespace:
    """The command line, its options apart from its overrides. Raises ConfigError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            dashed = [a.lstrip("-") for a in sys.argv[1:] if a.startswith("-") and "=" in a]
            remedy = f"python {name}.py --help says how to write it"
            remedy = f"leave out the dashes: {' '.join(dashed)}" if dashed else remedy
            options = [argument.partition("=")[0] for argument in sys.argv[1:]]
            known = (INSTEAD_OF_OPTIONS[o] for o in options if o in INSTEAD_OF_OPTIONS)
            remedy = next(known, remedy)
            raise ConfigError(f"{message}; {remedy}")

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args()


def _told_apart(results: list[tuple[list[str], Any]]) -> list[tuple[str, Any]]:
    """Each result with those of its overrides that not all of them have."""
    shared = set.intersection(*(set(overrides) for overrides, _ in results))
    return [
        (" ".join(o for o in overrides if o not in shared) or " ".join(overrides), result)
        for overrides, result in results
    ]


@contextmanager
def _standard_output() -> Iterator[None]:
    """Raises ConfigError where standard output takes no more, on a full disk for example. Errors of
    a run's files have the file's name, and a reader that left is still a BrokenPipeError."""
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
    """Have nothing left for Python to flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def process_rank() -> int:
    """Of this process among those that train together, of which the first speaks for all."""
    by_torchrun = "LOCAL_WORLD_SIZE" in os.environ  # Lightning's own launcher sets LOCAL_RANK alone
    return int(os.environ.get("RANK" if by_torchrun else "LOCAL_RANK", 0))


def process_count() -> int:
    """How many processes torchrun has started with this one among them; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 1


def warn(name: str, message: str) -> None:
    """Say what was probably not meant, in one line on standard error."""
    _say(name, message, "warning")


def _say(name: str, what: object, kind: str = "error") -> None:
    if process_rank() == 0:
        print(f"{name}.py: {kind}: {' '.join(str(what).split())}", file=sys.stderr)

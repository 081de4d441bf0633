"""Ranges of a dataclass's fields, and the error for a value outside. Imports nothing heavy."""

import difflib
import json
import math
import operator
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from types import NoneType
from typing import Any, get_args

RULES = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


def one_of(*choices: str, default: Any = MISSING) -> Any:
    """A field for one of these names, or for None where its type allows that."""
    return field(default=default, metadata={"choices": choices})


def number(
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field for a finite number in a range, or for None where its type allows that."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"bounds": bounds})


def check_ranges(config: Any) -> None:
    """Raises ValueError for the first field of a dataclass that is out of its range, or None where
    its type does not allow that."""
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None:
            if NoneType not in get_args(f.type):
                raise ValueError(f"{f.name} must have a value, got None; give one")
        elif "choices" in f.metadata:
            for name in value if isinstance(value, list) else [value]:
                check_choice(f.name, name, f.metadata["choices"])
        elif "bounds" in f.metadata:
            _check_bounds(f.name, value, f.metadata["bounds"])


def check_positive(**sizes: int) -> None:
    """Raises ValueError for a size that is not a positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}; use 1 or more")


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError, with the nearest choice, unless `value` is one of them."""
    if value not in list(choices):  # a value that cannot be hashed is none of them
        hint = nearest(str(value), choices)
        raise ValueError(
            f"{key} must be one of {', '.join(choices)}, got {as_written(value)}{hint}"
        )


def as_written(value: Any) -> str:
    """A value as it is written in YAML: null and true, not None and True."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def nearest(word: str, choices: Iterable[Any], prefix: str = "") -> str:
    """'; did you mean ...?' for the choice that is spelt most like `word`, said with `prefix`, or
    nothing."""
    names = {str(choice).lower(): str(choice) for choice in choices}
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{names[close[0]]}?" if close else ""


def _check_bounds(key: str, value: float, bounds: dict[str, float]) -> None:
    finite = math.isfinite(value)
    if not finite or not all(RULES[word](value, bound) for word, bound in bounds.items()):
        rule = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
        rule = rule if finite else f"finite and {rule}"
        raise ValueError(f"{key} must be {rule}, got {value}; use a value in that range")

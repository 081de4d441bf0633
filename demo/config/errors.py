"""What a user can put right, and the words for it. Imports nothing heavy.

The models and the library raise ValueError and TypeError. Where one of these is the user's to put
right, `demo` raises a ConfigError, and `demo.config.command` prints it as one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Something that the user can put right: the message names value, rule and remedy."""


class RunError(ConfigError):
    """A run that had to stop; the message says what is left of it and how to resume."""


@contextmanager
def about(key: str = "") -> Iterator[None]:
    """Turn a ValueError of the block into a ConfigError, one about `key` if that is given."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error)) from error


def first_line(error: BaseException) -> str:
    """The reason that the system gives, or the first line of an exception's message, or its type
    where the message is empty."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

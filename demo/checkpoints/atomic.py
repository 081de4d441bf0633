"""Files that are written whole or not at all, and the error where they do not fit."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.config.errors import RunError, first_line


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a hidden name beside `path`, then move what it wrote to `path` in one
    step."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def must_fit(file: Path, remedy: str) -> Iterator[None]:
    """Turn an error of the block, which writes `file`, into a RunError that ends with `remedy`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises either
        raise RunError(
            f"what a run writes must fit on the disk, got {first_line(error)!r} for {file}; free "
            f"some space{remedy}"
        ) from error

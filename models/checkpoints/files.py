"""Files that are whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path

from configs.schema import first_line


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a name beside `path`, then move what it wrote to `path` in one step."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def unreadable(error: Exception) -> str:
    """What safetensors, or the system, says of a file that cannot be read."""
    return first_line(error).removeprefix("Error while deserializing header: ")

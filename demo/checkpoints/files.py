"""Files that are whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None

from demo.config.errors import first_line


def lock(file: IO) -> bool:
    """Lock an open file until it is closed or its process ends, by whatever; False where another
    one has it. Always True where the system has no such locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True


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

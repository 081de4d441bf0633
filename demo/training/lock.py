"""A lock on a run's folder, which its process holds for as long as it trains."""

from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None


def lock(file: IO) -> bool:
    """Lock an open file until it is closed or its process ends, however it ends. False where
    another process holds the lock; always True where the system has no such locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True

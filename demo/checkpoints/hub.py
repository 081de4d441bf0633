"""Files from the Hugging Face hub, by a repository's id."""

import re
from pathlib import Path

from demo.config.errors import first_line


def is_hub_id(name: str) -> bool:
    """Whether `name` could be one: `owner/name`, or `name` alone, as the oldest ones are."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def download(name: str, *patterns: str) -> Path:
    """A local folder with those files of the hub's `name` that match `patterns`; from the hub's
    cache where there is no network.

    Raises:
        ValueError: when the files are neither in the cache nor reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors and its HTTP client's share no base class
        raise ValueError(
            f"{name!r} is neither on this machine nor reached on the hub ({first_line(error)}); "
            "give a path, or a hub id owner/name and a network"
        ) from error

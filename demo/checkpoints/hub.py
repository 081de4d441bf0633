"""Files from the Hugging Face hub, by a model's id."""

import re
from pathlib import Path

from demo.config.errors import first_line


def is_hub_id(name: str) -> bool:
    """Whether ``name`` could be one: ``owner/name``, or an old ``name`` alone."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def download(name: str, *patterns: str) -> Path:
    """A local folder with those files of the hub's ``name`` that match ``patterns``; from the
    hub's cache where there is no network.

    Raises:
        ValueError: where the files, the network or the package that reaches the hub are missing.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name!r} is not on this machine, and huggingface_hub, which looks for it on the hub, "
            "is not installed; pip install huggingface_hub, or give a path"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # a dozen kinds, some of other packages
        raise ValueError(
            f"{name!r} is neither on this machine nor reached on the hub ({first_line(error)}); "
            "give a path, or a hub id owner/name and a network"
        ) from error

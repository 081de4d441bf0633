"""How a run's files are written: whole or not at all, and a full disk is one line."""

import shlex
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from demo.checkpoints.atomic import write_atomically
from demo.checkpoints.checkpoint import METRICS, save_weights
from demo.config.errors import RunError, first_line
from models.language_model import LanguageModel


class Metrics(CSVLogger):
    """Lightning's metrics.csv in the folder of a run."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, name="", version="")

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            raise full_disk(error, Path(self.log_dir, METRICS)) from error


def go_on(run: Path) -> str:
    """The command that goes on with a run, as a shell takes it."""
    return f"python train.py resume={shlex.quote(str(run))}"


def full_disk(error: OSError | RuntimeError, path: Path) -> RunError:
    """What to say when a file of a run cannot be written."""
    return RunError(
        f"what a run writes must fit on the disk, got {first_line(error)!r} for {path}"
        f"; free some space, then go on with: {go_on(path.parent)}"
    )


class WholeCheckpoints(TorchCheckpointIO):
    """Writes Lightning's checkpoint whole or not at all, with the weights for infer.py beside it,
    and reads it without running code of it.

    Args:
        model: Whose weights they are. A state dict that FSDP gathered has tied ones twice.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.parameters = [name for name, _ in model.named_parameters()]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        state = checkpoint["state_dict"]
        weights = {name: state[f"model.{name}"] for name in self.parameters}
        try:
            save_weights(path.parent, weights)
            write_atomically(path, lambda part: torch.save(checkpoint, part))
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            raise full_disk(error, path) from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

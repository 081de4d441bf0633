"""What happens around the steps of a run: progress, checkpoints, random state, finite losses."""

import math
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import ProgressColumn
from torch.distributed.tensor import DTensor

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None

from demo.checkpoints.checkpoint import LAST
from demo.config.errors import RunError
from demo.training.writing import go_on


class Throughput(Callback):
    """Counts tokens and the time from the first batch on, and logs `tokens_per_s`."""

    def __init__(self, tokens_per_batch: int) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.tokens, self.seconds = 0, 0.0
        self._began = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    def on_train_start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._began
        self._began = now
        self.tokens += self.tokens_per_batch
        module.log("tokens_per_s", self.tokens_per_s)


class ProgressBar(RichProgressBar):
    """Lightning's bar with the time left, the loss in bits per byte, tokens/s and the most memory
    that was in use at once: of the GPU, or without one of the process. Where there is no terminal
    to draw it on, a line of the same twice a minute."""

    LINE_EVERY = 30.0  # seconds

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._began = self._said = time.perf_counter()
        self._first = trainer.global_step
        self._in_lines = not Console().is_terminal

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        now = time.perf_counter()
        if not self._in_lines or self.is_disabled or now - self._said < self.LINE_EVERY:
            return
        self._said, step = now, trainer.global_step
        left = (trainer.max_steps - step) * (now - self._began) / max(1, step - self._first)
        shown = ", ".join(
            f"{key} {value}" for key, value in self.get_metrics(trainer, module).items()
        )
        print(
            f"step {step} of {trainer.max_steps}, {shown}, {timedelta(seconds=round(left))} left",
            flush=True,
        )

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.num_training_batches)  # more than the steps where these accumulate

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"  # there is one epoch of `optim.steps` batches: its number says nothing

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        columns = super().configure_columns(trainer)[:-1]  # without batches per second
        columns[1].bar_width = max(10, min(40, Console().width - 70))  # room for what follows
        return columns

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
        metrics = trainer.callback_metrics
        shown = {}
        if "train_bpb" in metrics:
            shown["loss"] = f"{metrics['train_bpb']:.2f}"
        if "tokens_per_s" in metrics:
            shown["tok/s"] = f"{metrics['tokens_per_s']:,.0f}"
        if (peak := process_peak_memory(module.device)) is not None:
            shown["GiB"] = f"{peak / 2**30:.1f}"
        return shown


def process_peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has had in use at once, of the device's memory; None where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def stepped(trainer: L.Trainer, index: int) -> bool:
    """Whether the optimiser's step came with batch `index`, which may be one of several parts."""
    return (index + 1) % trainer.accumulate_grad_batches == 0


class FiniteLoss(Callback):
    """Stops the run when the loss or, before each checkpoint, a parameter is not a finite number;
    all processes of it at once, whichever of them the bad batch was for.

    On a GPU it looks at the loss before a checkpoint only, because looking waits for the device; it
    still says which batch was the first.
    """

    def __init__(self, every: int) -> None:
        self.every = every  # steps between two checkpoints
        self.batch = 0
        self.waits = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.first_bad = torch.full((), -1, device=module.device)
        self.bad_loss = torch.zeros((), device=module.device)
        self.waits = module.device.type == "cuda"

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not stepped(trainer, index):
            return
        bad = ~module.step_loss.isfinite() & (self.first_bad < 0)
        self.first_bad = torch.where(bad, index, self.first_bad)
        self.bad_loss = torch.where(bad, module.step_loss, self.bad_loss)
        self.batch = index
        if trainer.global_step % self.every == 0:
            self._check_all(trainer, module)
        elif not self.waits:
            self._check_loss(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_all(trainer, module)

    def _check_all(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_loss(trainer)
        if not all_finite(module, trainer.world_size):
            # The step's loss was still a number, and there is no next one to show it.
            self._stop("parameters must be finite numbers, got others", trainer, self.batch)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        bits = trainer.callback_metrics["val_bpb"].item()
        if not math.isfinite(bits):
            raise RunError(
                f"the validation loss must be finite, got {bits} after step {trainer.global_step}; "
                "lower optim.learning_rate, or look at the data and at what the run started from"
            )

    def _check_loss(self, trainer: L.Trainer) -> None:
        if self.first_bad >= 0:
            what = f"loss must be finite, got {self.bad_loss.item()}"
            self._stop(what, trainer, int(self.first_bad))

    def _stop(self, what: str, trainer: L.Trainer, batch: int) -> NoReturn:
        raise RunError(
            f"the {what} after step {trainer.global_step} (first at batch {batch}); the last good "
            "checkpoint, if there was one, is kept: lower optim.learning_rate, or look at the data"
        )


def all_finite(module: torch.nn.Module, processes: int) -> bool:
    """Whether every parameter is, in this and in all other processes."""
    # Sharded ones are looked at where they lie.
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    finite = torch.stack([part.detach().isfinite().all() for part in parts]).all().float()
    if processes > 1:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


class Checkpoints(Callback):
    """Writes `last.ckpt` to `run` every so many steps, and after the last; says how to go on when
    the run is interrupted."""

    def __init__(self, run: Path, every: int) -> None:
        self.run, self.every = run, every
        self.saved = 0  # the step that last.ckpt was written after, 0 where there is none yet

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved = checkpoint["global_step"]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if stepped(trainer, index) and trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.logger.save()  # what metrics.csv lacks of the steps before would be lost for good
        trainer.save_checkpoint(self.run / LAST)
        self.saved = trainer.global_step

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        terminated = isinstance(exception, SIGTERMException)
        if terminated:
            exception.code = 128 + signal.SIGTERM  # Lightning's own would be 0, as of a whole run
        if (terminated or isinstance(exception, KeyboardInterrupt)) and trainer.is_global_zero:
            step, how = trainer.global_step, "; go on"
            if not self.saved:
                how = ", before the first checkpoint; begin anew"
            elif self.saved < step:
                how = f"; go on after step {self.saved}, the last checkpoint,"
            print(f"\nstopped after step {step}{how} with: {go_on(self.run)}", file=sys.stderr)


class RandomState(Callback):
    """Keeps the state of all random generators in the checkpoint, as tensors and plain numbers."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        state = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (state := self.restored) is None:
            return
        torch.set_rng_state(state["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])

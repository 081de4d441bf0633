"""What happens around the steps of a run: speed, random state, checkpoints, progress."""

import math
import random
import resource
import sys
import time
from datetime import timedelta
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.distributed.tensor import DTensor

from demo.checkpoints.checkpoint import BEST
from demo.config.errors import RunError
from demo.training.run import LAST, SAMPLE, Run
from demo.training.stopping import Signals, leave


class Throughput(Callback):
    """Counts tokens and the time since the first batch, and logs `tokens_per_s`."""

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

    def on_validation_end(self, *_: Any) -> None:
        self._began = time.perf_counter()


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


class Checkpoints(Callback):
    """Saves a run every so many steps, after the last one, and after the one in which a signal
    stops it, as long as its numbers are finite; and its weights after each validation on the way
    that is better than those before.

    A step that ends in a validation is saved after it, so that a resumed run need not repeat it.

    A loss, a validation or, at a checkpoint, a parameter that is not a finite number stops all
    processes at once, whichever of them had the bad batch. On a GPU the loss is looked at only at a
    checkpoint, because looking waits for the device; it still says which batch was the first.

    Args:
        every, validate_every: Steps between two checkpoints, and between two validations or 0.
    """

    def __init__(self, run: Run, every: int, validate_every: int, signals: Signals) -> None:
        self.run, self.every, self.validate_every = run, every, validate_every
        self.signals = signals
        self.saved = 0  # the step that last.ckpt was written after, 0 where there is none yet
        self.best = math.inf  # of the validations on the way
        self.stopped_by = 0  # a signal
        self.batch = 0
        self.looks_late = False

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best = state["best"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.listen()
        self.signals.waits = True
        self.first_bad = torch.full((), -1, device=module.device)
        self.bad_loss = torch.zeros((), device=module.device)
        self.looks_late = module.device.type == "cuda"

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (index + 1) % trainer.accumulate_grad_batches:  # a part of a step's batch
            return
        bad = ~module.step_loss.isfinite() & (self.first_bad < 0)
        self.first_bad = torch.where(bad, index, self.first_bad)
        self.bad_loss = torch.where(bad, module.step_loss, self.bad_loss)
        self.batch = index
        if not self.looks_late:
            self._check_loss(trainer)
        if not self.validate_every or trainer.global_step % self.validate_every:
            self._end_step(trainer, module)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.stopped_by:  # now that the step that was reached has its row in metrics.csv
            leave(self.stopped_by)

    def on_train_end(self, *_: Any) -> None:
        self.on_train_batch_start()
        self.signals.waits = False

    def _end_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        self.stopped_by = self.signals.of_all(trainer.world_size, module.device)
        if self.stopped_by or step % self.every == 0 or step == trainer.max_steps:
            self._check(trainer, module)
            trainer.save_checkpoint(self.run.folder / LAST)
            self.saved = step

    def _check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_loss(trainer)
        if not all_finite(module, trainer.world_size):
            # The step's loss was still a number, and there may be no next one to show it.
            self._stop("parameters must be finite numbers, got others", trainer, self.batch)

    def _check_loss(self, trainer: L.Trainer) -> None:
        if self.first_bad >= 0:
            what = f"loss must be finite, got {self.bad_loss.item()}"
            self._stop(what, trainer, int(self.first_bad))

    def _stop(self, what: str, trainer: L.Trainer, batch: int) -> NoReturn:
        raise RunError(
            f"the {what} after step {trainer.global_step} (first at batch {batch}); the last good "
            "checkpoint, if there was one, is kept: lower optim.learning_rate, or look at the data"
        )

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.val_metric == SAMPLE:
            self._check(trainer, module)
        bits = trainer.callback_metrics[module.val_metric].item()
        if not math.isfinite(bits):
            raise RunError(
                f"the validation loss must be finite, got {bits} after step {trainer.global_step}; "
                "lower optim.learning_rate, or look at the data and at what the run started from"
            )
        if module.val_metric == SAMPLE:
            if bits < self.best:
                self.best = bits
                trainer.save_checkpoint(self.run.folder / BEST, weights_only=True)
            self._end_step(trainer, module)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SystemExit) and trainer.is_global_zero:  # of a signal
            step, how = trainer.global_step, "; go on"
            if not self.saved:
                how = ", before the first checkpoint; begin anew"
            elif self.saved < step:
                how = f"; go on after step {self.saved}, the last checkpoint,"
            command = self.run.resume_command
            print(f"\nstopped after step {step}{how} with: {command}", file=sys.stderr)


def all_finite(module: torch.nn.Module, processes: int) -> bool:
    """Whether the parameters are finite in all processes; each looks at its own shard."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    finite = torch.stack([part.detach().isfinite().all() for part in parts]).all().float()
    if processes > 1:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


class Progress(Callback):
    """A bar with the time left, the loss in bits per byte, tokens/s and the peak memory: of the
    GPU, or without one of the process. Where there is no terminal, a line with the same twice a
    minute. A validation before or after the training has a bar of its own, with the loss so far."""

    LINE_EVERY, DRAW_EVERY = 30.0, 0.25  # seconds: reading the loss waits for a GPU

    def __init__(self) -> None:
        self.bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._began = self._shown = time.perf_counter()
        self._first = trainer.global_step
        self._draw(trainer, "Training", trainer.max_steps, self._first)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        now, step = time.perf_counter(), trainer.global_step
        every = self.DRAW_EVERY if self.bar else self.LINE_EVERY
        if now - self._shown < every or not trainer.is_global_zero:
            return
        self._shown = now
        shown = self._numbers(trainer, module)
        if self.bar:
            self.bar.update(self._task, completed=step, numbers=shown)
            return
        left = (trainer.max_steps - step) * (now - self._began) / max(1, step - self._first)
        left = timedelta(seconds=round(left))
        print(f"step {step} of {trainer.max_steps}, {shown}, {left} left", flush=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar:
            numbers = self._numbers(trainer, module)
            self.bar.update(self._task, completed=trainer.global_step, numbers=numbers)
        self._stop()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.val_metric == SAMPLE:
            self._describe("Validation")
        else:
            self._bits, self._shown = [], 0.0
            self._draw(trainer, "Validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, bits: torch.Tensor, *_: Any
    ) -> None:
        if not self.bar or module.val_metric == SAMPLE:
            return
        self._bits.append(bits)
        self.bar.advance(self._task)
        now = time.perf_counter()
        if now - self._shown >= self.DRAW_EVERY:  # the first number that a new user sees
            self._shown = now
            mean = torch.stack(self._bits).mean()
            self.bar.update(self._task, numbers=f"loss {mean:.2f}")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.val_metric == SAMPLE:
            self._describe("Training")
        else:
            self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _draw(self, trainer: L.Trainer, what: str, total: int, completed: int = 0) -> None:
        console = Console()
        if not (console.is_terminal and trainer.is_global_zero):
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(max(10, min(40, console.width - 80))),  # leaves room for what follows
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self.bar = Bar(*columns, console=console, refresh_per_second=4)
        self._task = self.bar.add_task(what, total=total, completed=completed, numbers="")
        self.bar.start()

    def _describe(self, what: str) -> None:
        if self.bar:
            self.bar.update(self._task, description=what)

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _numbers(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        metrics, shown = trainer.callback_metrics, []
        if "train_bpb" in metrics:
            shown.append(f"loss {metrics['train_bpb']:.2f}")
        if SAMPLE in metrics:
            shown.append(f"val {metrics[SAMPLE]:.2f}")
        if "tokens_per_s" in metrics:
            shown.append(f"tok/s {metrics['tokens_per_s']:,.0f}")
        shown.append(f"GiB {process_peak_memory(module.device) / 2**30:.1f}")
        return ", ".join(shown)


def process_peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had in use at once, of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""The language model under Lightning: loss, optimiser, validation in bits per byte, throughput."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import ProgressColumn
from torch.distributed.tensor import DTensor

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None

from configs.schema import OptimConfig, RunError
from models.checkpoints.checkpoint import LAST, METRICS, save_weights
from models.checkpoints.files import write_whole
from models.data.batches import Batch, Packed
from models.language_model import LanguageModel
from models.training.parallel import ShardedStrategy, shard


class LitLanguageModel(L.LightningModule):
    """Next-token prediction with AdamW, linear warm-up and cosine decay.

    Batches are int64 [rows, tokens + 1]: the last token is only a target. Losses are logged in bits
    per byte of text: `train_bpb` each step, `val_bpb` over all of a validation.

    Args:
        bytes_per_token: How much text a token stands for, in training and in validation.
    """

    def __init__(
        self,
        model: LanguageModel,
        optim: OptimConfig,
        bytes_per_token: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.model, self.optim = model, optim
        # Nats per token to bits per byte.
        self.train_scale, self.val_scale = (1 / (math.log(2) * size) for size in bytes_per_token)
        self.step_loss = torch.zeros(())  # of the last step, over all processes
        self._sharded = False
        self._parts: list[torch.Tensor] = []  # the losses of a step so far, where it accumulates

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy) and not self._sharded:
            shard(self.model, self.device_mesh["data_parallel"])
            self._sharded = True

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.device.type != "cuda":
            return batch
        # A copy from pinned memory does not wait for the step before it.
        if isinstance(batch, Packed):
            return batch._replace(tokens=batch.tokens.pin_memory())
        return batch.pin_memory()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self._parts.append(loss.detach())
        if len(self._parts) == self.trainer.accumulate_grad_batches:
            bits = torch.stack(self._parts).mean() * self.train_scale
            self._parts.clear()
            if self.trainer.world_size > 1:  # Lightning's own way begins with a barrier
                torch.distributed.all_reduce(bits)
                bits /= self.trainer.world_size
            self.step_loss = bits
            self.log("train_bpb", bits)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        bits = self.loss(batch) * self.val_scale
        rows = len(batch.tokens if isinstance(batch, Packed) else batch)
        self.log("val_bpb", bits, on_epoch=True, sync_dist=True, batch_size=rows)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross entropy in nats, fp32 scalar, of the targets in `batch`."""
        if isinstance(batch, Packed):
            tokens, offsets = batch.tokens, torch.from_numpy(batch.offsets)
            logits, _ = self.model(tokens[:, :-1].reshape(1, -1), cu_seqlens=offsets)
        else:
            tokens = batch
            logits, _ = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own refuses a fused optimizer under any mixed precision.
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        optim = self.optim
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        # A fused optimizer takes scaled gradients, which are not to be clipped.
        scaled = self._trainer is not None and self.trainer.precision == "16-mixed"
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": optim.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=optim.learning_rate,
            betas=tuple(optim.betas),
            fused=not scaled,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(optim))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def learning_rate_factor(optim: OptimConfig) -> Callable[[int], float]:
    """What to multiply the learning rate with at a step: linear warm-up, then a cosine down to the
    smallest at the last step."""
    floor = optim.min_learning_rate / optim.learning_rate
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = min(40, optim.steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, optim.steps - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return factor


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
    that was in use at once: of the GPU, or without one of the process."""

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
        if (peak := peak_memory(module.device)) is not None:
            shown["GiB"] = f"{peak / 2**30:.1f}"
        return shown


def peak_memory(device: torch.device) -> int | None:
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
            self.on_train_end(trainer, module)
        elif not self.waits:
            self._check_loss(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
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


class Metrics(CSVLogger):
    """Lightning's metrics.csv in the folder of a run."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, name="", version="")

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            raise full_disk(error, Path(self.log_dir, METRICS)) from error


def full_disk(error: OSError | RuntimeError, path: Path) -> RunError:
    """What to say when a file of a run cannot be written."""
    return RunError(
        f"what a run writes must fit on the disk, got {str(error).splitlines()[0]!r} for {path}"
        f"; free some space, then go on with: python train.py resume={path.parent}"
    )


class Checkpoints(Callback):
    """Writes `last.ckpt` to `run` every so many steps, and after the last; says how to go on when
    the run is interrupted."""

    def __init__(self, run: Path, every: int) -> None:
        self.run, self.every = run, every

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if stepped(trainer, index) and trainer.global_step % self.every == 0:
            self.on_train_end(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.logger.save()  # what metrics.csv lacks of the steps before would be lost for good
        trainer.save_checkpoint(self.run / LAST)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            print(
                f"\nstopped after step {trainer.global_step}; "
                f"go on with: python train.py resume={self.run}",
                file=sys.stderr,
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
            write_whole(path, lambda part: torch.save(checkpoint, part))
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            raise full_disk(error, path) from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

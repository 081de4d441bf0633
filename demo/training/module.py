"""The language model under Lightning: loss, optimiser, validation in bits per byte, and how its
blocks run.

`trainer=fsdp` is PyTorch's second FSDP (`fully_shard`). Unlike the first, it also runs on a CPU, so
that it can be tested anywhere. `trainer=tp` is `models.tensor_parallel`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from demo.config.schema import OptimConfig, TrainerConfig
from demo.data.batches import Batch, Packed
from demo.training.run import SAMPLE, VAL
from demo.training.schedule import learning_rate_factor
from models.language_model import LanguageModel
from models.log_probs import log_probs_of
from models.tensor_parallel import TensorParallel


class LitLanguageModel(L.LightningModule):
    """Next-token prediction with AdamW.

    Batches are int64 [rows, tokens + 1]: the last token is only a target. Losses are logged in bits
    per byte of text: `train_bpb` each step, `val_bpb` over all of a validation before or after the
    training, and `val_sample_bpb` of one on the way, which may read less text.

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
        # From nats per token to bits per byte.
        self.train_scale, self.val_scale = (1 / (math.log(2) * size) for size in bytes_per_token)
        self.step_loss = torch.zeros(())  # of the last step, over all processes
        self.val_metric = VAL  # what a validation is logged as
        self.plan: TensorParallel | None = None  # of the heads over processes
        self._sharded = False
        self._parts: list[torch.Tensor] = []  # the losses of a step so far, where it accumulates

    def setup(self, stage: str) -> None:
        self.val_metric = VAL if stage == "validate" else SAMPLE

    def configure_model(self) -> None:
        # Lightning calls this again for each fit and validation.
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            mesh = self.device_mesh
            if mesh["tensor_parallel"].size() > 1:
                self.plan = TensorParallel(self.model, mesh.get_group("tensor_parallel"))
            else:
                for module in (*self.model.blocks, self.model):
                    fully_shard(module, mesh=mesh["data_parallel"])
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
            if self.trainer.world_size > 1:  # Lightning's own reduction begins with a barrier
                torch.distributed.all_reduce(bits)
                bits /= self.trainer.world_size
            self.step_loss = bits
            self.log("train_bpb", bits)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        bits = self.loss(batch) * self.val_scale
        rows = len(batch.tokens if isinstance(batch, Packed) else batch)
        self.log(self.val_metric, bits, on_epoch=True, sync_dist=True, batch_size=rows)
        return bits

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross entropy in nats, fp32 scalar, of the targets in `batch`."""
        if isinstance(batch, Packed):
            tokens, offsets = batch.tokens, torch.from_numpy(batch.cu_seqlens)
            logits, _ = self.model(tokens[:, :-1].reshape(1, -1), cu_seqlens=offsets)
        else:
            tokens = batch
            logits, _ = self.model(tokens[:, :-1])
        logits, targets = logits.flatten(0, 1), tokens[:, 1:].flatten()
        # In exact mode the very numbers that generation reports.
        return -log_probs_of(logits, targets, self.model.exact).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.plan is not None:
            self.plan.reduce_gradients(self.device_mesh.get_group("data_parallel"))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping refuses a fused optimizer under any mixed precision.
        if gradient_clip_val and self.plan is not None:
            self.plan.clip_gradients(gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> dict[str, Any]:
        optim = self.optim
        matrices, others = self._trained()
        optimizer = torch.optim.AdamW(
            [
                {"params": list(matrices.values()), "weight_decay": optim.weight_decay},
                {"params": list(others.values()), "weight_decay": 0.0},
            ],
            lr=optim.learning_rate,
            betas=optim.betas,
            # With 16-mixed a fused optimizer would get scaled gradients, which must not be clipped.
            fused=self.trainer.precision != "16-mixed",
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(optim))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _trained(self) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
        """The model's parameters by name, those that decay and those that do not."""
        named = dict(self.model.named_parameters())
        matrices = {name: p for name, p in named.items() if p.ndim >= 2}
        return matrices, {name: p for name, p in named.items() if p.ndim < 2}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (plan := self.plan) is not None:  # as a single process writes it

            def whole(name: str, part: torch.Tensor) -> torch.Tensor:
                tensor = plan.whole(name, part)
                return tensor.cpu() if self.trainer.is_global_zero else tensor.new_empty(0)

            self._change_states(checkpoint, whole)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plan is not None:
            self._change_states(checkpoint, self.plan.part)

    def _change_states(
        self, checkpoint: dict[str, Any], change: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> None:
        """Put in place what `change` makes of the tensor of each parameter, by name, and of the
        optimiser's moments of it."""
        state = checkpoint["state_dict"]
        for name, tensor in state.items():
            state[name] = change(name.removeprefix("model."), tensor)
        names = [name for group in self._trained() for name in group]
        for optimizer in checkpoint.get("optimizer_states", ()):
            for index, values in optimizer["state"].items():
                optimizer["state"][index] = {
                    key: change(names[index], value) if value.ndim else value
                    for key, value in values.items()
                }


def prepare_blocks(model: LanguageModel, config: TrainerConfig) -> None:
    """Have each block recompute its activations or its norm's output in the backward, project in
    FP8, and be compiled, as `config` says.

    The blocks are alike, so the first one's compiled code serves all. Names of parameters stay.
    """
    for block in model.blocks:
        precision = block.mixer.norm_linear_precision = config.norm_linear_precision
        block.mixer.fuse_norm_linear = config.fuse_norm_linear or precision is not None
        if config.activation_checkpointing:  # outside: the compiler would leave all of it alone
            forward = torch.compile(block.forward) if config.compile else block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False)
        elif config.compile:
            block.compile()


def check_norm_linear(model: LanguageModel, config: TrainerConfig) -> None:
    """Raises ValueError where the norm's projections have no FP8."""
    precision, ranks = config.norm_linear_precision, config.tensor_parallel
    if precision is None:
        return
    if model.exact:
        raise ValueError(
            f"it must be null with exact=true, got {precision}: infer.py, which has no FP8, would "
            "give other bits; leave out one of them"
        )
    for block in model.blocks:
        norm, projection = block.mixer.norm, block.mixer.out_proj
        group, own = norm.group_size or norm.hidden_size, projection.in_features // ranks
        if group > own:
            raise ValueError(
                f"a norm group must lie on one process, got {group} channels for {ranks} processes "
                f"of {own}; use more groups, or leave it out"
            )
        sizes = {"rows": projection.out_features, "columns": own}
        for name, size in sizes.items():
            if size % 128:
                raise ValueError(
                    f"a process must have a multiple of 128 {name} of the projection after the "
                    f"norm, got {size}; change the model's sizes, or leave it out"
                )

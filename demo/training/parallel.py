"""How a model is spread over processes and how its blocks run: FSDP, compiled, checkpointed.

FSDP here is PyTorch's second one (`fully_shard`), through Lightning's ModelParallelStrategy. Unlike
the first, it also runs on a CPU, so that it can be tested anywhere.
"""

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from demo.config.schema import TrainerConfig
from models.language_model import LanguageModel


class ShardedStrategy(ModelParallelStrategy):
    """FSDP over all processes whose checkpoints are those of a single process: whole tensors in
    one file, written by the first process."""

    def __init__(self, processes: int) -> None:
        super().__init__(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def load_checkpoint(self, checkpoint_path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return super().load_checkpoint(checkpoint_path, weights_only=True)


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Spread the parameters over the processes of `mesh`, each block a unit of its own."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def prepare_blocks(model: LanguageModel, config: TrainerConfig) -> None:
    """Make each block compute its inside again in the backward, and compile it, as asked.

    The blocks are alike, so the first one's compiled code serves all; names of parameters stay.
    """
    for block in model.blocks:
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.compile()

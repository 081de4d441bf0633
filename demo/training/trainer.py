"""Lightning's Trainer as train.py uses it, and what it writes to the folder of a run."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from demo.checkpoints.checkpoint import BEST
from demo.config.errors import ConfigError, about, first_line
from demo.config.schema import TrainConfig
from demo.training.callbacks import Checkpoints, Progress, RandomState, Throughput
from demo.training.loggers import loggers_of
from demo.training.module import check_norm_linear
from demo.training.processes import Processes, on_gpu
from demo.training.run import Run
from demo.training.schedule import steps_between_validations
from demo.training.stopping import Signals
from models.language_model import LanguageModel
from models.tensor_parallel import check_ranks


def build_trainer(
    config: TrainConfig, processes: Processes, model: LanguageModel
) -> tuple[L.Trainer, Throughput]:
    """The trainer for `config` and `model`, which writes nothing until `record` says where to.
    Raises ConfigError."""
    _quiet()
    gpu = on_gpu(config.trainer)
    precision = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if gpu else "32-true"
    parts, strategy = config.trainer.accumulate, config.trainer.strategy
    throughput = Throughput(config.optim.batch_size // parts * config.data.sequence_length)
    sharded, ranks = strategy == "fsdp", processes.tensor_parallel
    with about("trainer.tensor_parallel"):
        check_ranks(model, ranks)
    with about("trainer.norm_linear_precision"):
        check_norm_linear(model, config.trainer)
    if sharded or ranks > 1:
        strategy = (TensorParallelStrategy if ranks > 1 else ModelParallelStrategy)(
            data_parallel_size=processes.readers,
            tensor_parallel_size=ranks,
            # Checkpoints are those of a single process: whole tensors in one file.
            save_distributed_checkpoint=False,
        )
    try:
        trainer = L.Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=processes.devices,
            num_nodes=processes.hosts,
            strategy=strategy,
            accumulate_grad_batches=parts,
            precision=precision,
            max_steps=config.optim.steps,
            val_check_interval=parts * (steps_between_validations(config) or 1),
            check_val_every_n_epoch=None,  # the run is one epoch to Lightning
            gradient_clip_val=config.optim.gradient_clip or None,
            # Each row of the log waits for the GPU, which then waits for the next step.
            log_every_n_steps=max(10 if gpu else 1, config.optim.steps // 1000),
            num_sanity_val_steps=0,
            # FSDP keeps the tensors that it gathers parameters into, and autograd refuses those
            # that a validation in inference mode has made. (Over gloo Lightning turns it off.)
            inference_mode=not sharded,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,  # Progress is ours
            enable_checkpointing=False,  # so is Checkpoints: Lightning's chooses among many
            logger=False,
            plugins=[RunCheckpoints(model)],
            callbacks=[throughput, RandomState(), Progress()],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ConfigError(
            "trainer must be one that Lightning can build here, got "
            f"{first_line(error)!r}; change trainer=, or the environment it speaks of"
        ) from error
    return trainer, throughput


def record(trainer: L.Trainer, run: Run, config: TrainConfig, signals: Signals) -> None:
    """Have `trainer` write its metrics and checkpoints to `run`, and stop at `signals`."""
    trainer.loggers = loggers_of(run, config)
    every = config.trainer.checkpoint_every, steps_between_validations(config)
    trainer.callbacks.append(Checkpoints(run, *every, signals))


class TensorParallelStrategy(ModelParallelStrategy):
    """Lightning's processes and device mesh, with the states of plain tensors that every process
    has for itself: LitLanguageModel makes whole ones of them for a checkpoint, and parts again."""

    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    load_checkpoint = Strategy.load_checkpoint


class RunCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint of Lightning's as those of a run, with the weights beside it.

    Args:
        model: Its parameters are the weights. A state dict that FSDP gathered has tied ones twice.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.parameters = [name for name, _ in model.named_parameters()]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        state, path = checkpoint["state_dict"], Path(path)
        weights = {name: state[f"model.{name}"] for name in self.parameters}
        if path.name == BEST:
            Run(path.parent).write_best(weights)
        else:
            Run(path.parent).write_checkpoint(checkpoint, weights)


def _quiet() -> None:
    """Silences what Lightning says about things that are as they should be."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")

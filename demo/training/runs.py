"""A training run: its trainer, its folder, and the table at its end."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from demo.checkpoints.checkpoint import CONFIG, LAST, METRICS, PICTURE, WEIGHTS, save_config
from demo.checkpoints.tokenizer import FILE as TOKENIZER
from demo.checkpoints.tokenizer import Tokenizer
from demo.config.errors import ConfigError, first_line
from demo.config.schema import TrainConfig, TrainerConfig, model_name
from demo.training.callbacks import (
    Checkpoints,
    FiniteLoss,
    ProgressBar,
    RandomState,
    Throughput,
)
from demo.training.lock import lock
from demo.training.memory import out_of_memory_in_a_line
from demo.training.parallel import ShardedStrategy
from demo.training.processes import Processes, on_gpu
from demo.training.resume import still_running
from demo.training.writing import Metrics, WholeCheckpoints
from models.language_model import LanguageModel

FILES = (WEIGHTS, CONFIG, TOKENIZER, LAST, METRICS, PICTURE)


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        run: The run's folder.
        model: As it was after the last step.
        tokens: Seen in training.
        tokens_per_s: In training, validation left out.
        before, after: Validation bits per byte.
    """

    run: Path
    model: LanguageModel
    tokens: int
    tokens_per_s: float
    before: float
    after: float

    @property
    def parameters(self) -> int:
        """How many numbers are trained, tied ones once."""
        return self.model.num_parameters()


@contextmanager
def running(run: Path, rank: int) -> Iterator[None]:
    """Around the work on a run: no other process may go on with it meanwhile, and where memory
    runs out that is one line. Raises ConfigError where another process works on it."""
    with (run / CONFIG).open("rb") if rank == 0 else nullcontext() as file:
        if file is not None and not lock(file):
            raise ConfigError(still_running(run))
        with out_of_memory_in_a_line(rank):
            yield


def create_run(config: TrainConfig, tokenizer: Tokenizer | None = None, rank: int = 0) -> Path:
    """A new folder `<time>_<model>` under `config.runs_dir` that holds the composed config and the
    tokenizer. Of several processes only the first makes one, and only that one writes to it."""
    if rank:
        return Path(config.runs_dir)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{model_name(config.model)}"
    number = 1
    while True:
        run = Path(config.runs_dir, name if number == 1 else f"{name}_{number}")
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(
                f"runs_dir must be a folder that can be written to, got {config.runs_dir!r} "
                f"({error.strerror}); name another one"
            ) from error
    try:
        save_config(run, config)
        if tokenizer is not None:
            tokenizer.save(run)
    except OSError as error:
        shutil.rmtree(run, ignore_errors=True)  # of no use without either
        raise ConfigError(
            f"runs_dir must be a folder that can be written to, got {config.runs_dir!r} "
            f"({error.strerror}); free some space, or name another one"
        ) from error
    return run


def build_trainer(
    config: TrainConfig, processes: Processes, model: LanguageModel
) -> tuple[L.Trainer, Throughput]:
    """Lightning's trainer for `config` and `model`, which writes nothing until `record` says where
    to. Raises ConfigError."""
    _quiet()
    gpu = on_gpu(config.trainer)
    precision = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if gpu else "32-true"
    parts = config.trainer.accumulate
    throughput = Throughput(config.optim.batch_size // parts * config.data.sequence_length)
    strategy = config.trainer.strategy
    try:
        trainer = L.Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=processes.devices,
            num_nodes=processes.hosts,
            strategy=ShardedStrategy(processes.count) if strategy == "fsdp" else strategy,
            accumulate_grad_batches=parts,
            precision=precision,
            max_steps=config.optim.steps,
            gradient_clip_val=config.optim.gradient_clip or None,
            # Each line of the log waits for the GPU, which then waits for the next step.
            log_every_n_steps=max(10 if gpu else 1, config.optim.steps // 1000),
            num_sanity_val_steps=0,
            # FSDP keeps the tensors that it gathers parameters into, and autograd refuses those
            # that a validation in inference mode has made. (Over gloo Lightning turns it off.)
            inference_mode=strategy != "fsdp",
            use_distributed_sampler=False,
            enable_model_summary=False,
            logger=False,
            plugins=[WholeCheckpoints(model)],
            enable_checkpointing=False,  # its callback chooses among many; here the last counts
            callbacks=[
                throughput,
                RandomState(),
                FiniteLoss(config.trainer.checkpoint_every),
                # Batches between two pictures, and pictures a second at most: Lightning takes one
                # number for both, and waits for the length of one where a bar ends.
                ProgressBar(refresh_rate=10 if gpu else 4),
            ],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ConfigError(
            "trainer must be one that Lightning can build here, got "
            f"{first_line(error)!r}; change trainer=, or the environment it speaks of"
        ) from error
    return trainer, throughput


def record(trainer: L.Trainer, run: Path, config: TrainerConfig) -> None:
    """Have `trainer` write metrics.csv and last.ckpt to `run`."""
    trainer.loggers = [Metrics(run)]
    if config.tensorboard:
        trainer.loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
    trainer.callbacks.append(Checkpoints(run, config.checkpoint_every))


@rank_zero_only
def print_summary(summary: Summary) -> None:
    """The table at the end, once for all processes."""
    table = Table(title="Done", title_justify="left", show_header=False)
    table.add_row("parameters", f"{summary.parameters:,}")
    table.add_row("tokens seen", f"{summary.tokens:,}")
    table.add_row("tokens/s", f"{summary.tokens_per_s:,.0f}")
    table.add_row("validation before", f"{summary.before:.3f} bits per byte")
    table.add_row("validation after", f"[bold]{summary.after:.3f}[/bold] bits per byte")
    files = [name for name in FILES if (summary.run / name).exists()]
    table.add_row("run", f"{summary.run}/\n  " + "\n  ".join(files))
    Console().print(table)


def compare_runs(folder: Path, results: list[tuple[str, Summary]]) -> None:
    """One table and one picture (`folder`/comparison.png) for the runs of a multirun, named by the
    overrides that tell them apart."""
    from demo.training.plots import plot_comparison  # matplotlib takes a second

    plot_comparison({name: s.run / METRICS for name, s in results}, folder / "comparison.png")
    where = {summary.run.parent for _, summary in results}.pop()
    table = Table(
        title=f"Runs in {where}/, validation at the end in bits per byte", title_justify="left"
    )
    for column in ("overrides", "params", "tokens/s", "validation", "run"):
        left = column in ("overrides", "run")
        no_wrap = column == "run"  # to be copied
        table.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=no_wrap
        )
    for name, summary in sorted(results, key=lambda result: result[1].after):
        table.add_row(
            name.replace(" ", "\n"),
            f"{summary.parameters:,}",
            f"{summary.tokens_per_s:,.0f}",
            f"{summary.after:.3f}",
            summary.run.name,
        )
    Console().print(table)
    print(f"the picture: {folder / 'comparison.png'}")


def _quiet() -> None:
    """Silences what Lightning says about things that are as they should be."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists.*")

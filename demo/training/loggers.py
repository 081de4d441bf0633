"""Where the numbers of a run go: its metrics.csv, and what `trainer.loggers` names, each through
Lightning's own logger.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from demo.checkpoints.checkpoint import as_values
from demo.config.errors import ConfigError, first_line
from demo.config.schema import TrainConfig, TrainerConfig
from demo.training.run import Run


class MetricsLogger(Logger):
    """Lightning's view of a run's metrics.csv."""

    name = version = ""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.run.write_metrics(step, metrics)

    def log_hyperparams(self, *_: object, **__: object) -> None:
        pass  # config.yaml has them


class EventFile(TensorBoardLogger):
    """One event file: Lightning would begin another for each validation and training."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.experiment.flush()
        self.save()


def check_loggers(config: TrainerConfig) -> None:
    """Raises ConfigError for a logger whose package is not installed."""
    for name in config.loggers:
        # Either will do for TensorBoard.
        if not _installed(name) and not (name == "tensorboard" and _installed("tensorboardX")):
            raise ConfigError(
                f"trainer.loggers needs the package {name}, got {name} without it; pip install "
                f"{name}, or leave it out: metrics.csv has the same numbers"
            )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def loggers_of(run: Run, config: TrainConfig) -> list[Logger]:
    """That of metrics.csv, and those that `config` asks for, which get all of its values. Raises
    ConfigError where one cannot begin."""
    folder = run.folder
    # mlflow has no store of plain files any more. Of all runs, so that it can compare them.
    database = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent}/mlflow.db"
    build = {
        "tensorboard": lambda: EventFile(folder, name="", version="tensorboard"),
        # The same one after the run was stopped.
        "wandb": lambda: WandbLogger(folder.name, folder, id=folder.name, resume="allow"),
        "mlflow": lambda: MLFlowLogger("gatednorm", folder.name, database),
    }
    made: list[Logger] = [MetricsLogger(run)]
    for name in config.trainer.loggers:
        try:
            made.append(build[name]())
            made[-1].log_hyperparams(as_values(config))
        except Exception as error:  # no server, no key: each package has its own for that
            raise ConfigError(
                f"trainer.loggers must name those that can begin here, got {name} "
                f"({first_line(error)}); set it up, or leave it out"
            ) from error
    return made

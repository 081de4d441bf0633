"""Where the numbers go beside metrics.csv, by the name of Lightning's logger."""

from importlib.metadata import PackageNotFoundError

import pytest
from lightning.pytorch.loggers import Logger

from demo.checkpoints.checkpoint import read_config
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.config.schema import train_config
from demo.training import loggers
from demo.training.run import Run
from small_runs import STOPPABLE, config_in, curve, train_in


def test_tensorboard_gets_what_the_table_gets_in_one_file(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_in(tmp_path, *STOPPABLE, "trainer.loggers=tensorboard").run
    (file,) = (run / "tensorboard").glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    for column in ("train_bpb", "val_bpb", "val_sample_bpb"):
        assert [e.value for e in events.Scalars(column)] == pytest.approx(curve(run, column))
    assert "batch_size: 4" in (run / "tensorboard" / "hparams.yaml").read_text()
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_others_get_the_same_and_the_whole_config(name, tmp_path, monkeypatch):
    """From stand-ins for Lightning's loggers, whose packages the tests do not need."""
    made = []

    class Kept(Logger):
        name = version = "kept"

        def __init__(self, *args, **kwargs):
            super().__init__()
            self.metrics, self.args = [], (args, kwargs)
            made.append(self)

        def log_hyperparams(self, values):
            self.hyperparams = values

        def log_metrics(self, metrics, step=None):
            self.metrics.append(metrics)

    kind = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]
    monkeypatch.setattr(loggers, kind, Kept)
    monkeypatch.setattr(loggers, "version", lambda name: "1")
    run = train_in(tmp_path, *STOPPABLE, f"trainer.loggers=[{name}]").run
    (logger,) = made
    assert run.name in logger.args[0]
    found = [row["train_bpb"] for row in logger.metrics if "train_bpb" in row]
    assert found == pytest.approx(curve(run))
    config = read_config(run, train_config)
    assert logger.hyperparams["model"]["name"] == "mamba2"
    assert logger.hyperparams["optim"]["steps"] == config.optim.steps


def test_one_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no server\nat all")

    monkeypatch.setattr(loggers, "MLFlowLogger", fails)
    monkeypatch.setattr(loggers, "version", lambda name: "1")
    with pytest.raises(ConfigError, match=r"got mlflow \(no server\); set it up, or leave it out"):
        train_in(tmp_path, *STOPPABLE, "trainer.loggers=mlflow")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_each_is_optional(name, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(loggers, "version", missing)
    loggers.check_loggers(compose("train").trainer)
    with pytest.raises(ConfigError, match=f"got {name} without it; pip install {name}"):
        loggers.check_loggers(compose("train", [f"trainer.loggers={name}"]).trainer)


@pytest.mark.parametrize(("said", "expected"), [(True, ["tensorboard"]), (False, [])])
def test_a_config_of_0_1_0_says_whether_there_was_tensorboard(said, expected, tmp_path):
    run = Run.create(config_in(tmp_path))
    file = run.folder / "config.yaml"
    file.write_text(file.read_text().replace("loggers: []", f"tensorboard: {str(said).lower()}"))
    assert run.read_config().trainer.loggers == expected

"""What this machine cannot do: too few devices, a precision that it has not, a full disk."""

import errno
import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure

import train
from demo.checkpoints.checkpoint import build_model, load
from demo.config.command import compose
from demo.config.errors import ConfigError, RunError
from demo.training import runs
from demo.training.processes import Processes, check_devices
from demo.training.runs import create_run
from small_runs import SIX_STEPS, checkpoint_step

SMALL = [*SIX_STEPS, "trainer.checkpoint_every=2"]


@pytest.mark.parametrize(
    ("gpus", "overrides", "says"),
    [
        (0, ["trainer=gpu"], "must be one that this machine has, got gpu without a CUDA device"),
        (2, ["trainer=ddp", "trainer.devices=3"], r"devices must be at most .*, 2, got 3"),
        (1, ["trainer=gpu", "trainer.devices=2"], r"devices must be at most .*, 1, got 2"),
        (2, ["trainer=fsdp", "trainer.precision=16-mixed"], "with trainer.strategy=fsdp, got 16"),
        (0, ["trainer.precision=16-mixed"], "on a CPU, got 16-mixed"),
        (1, ["trainer=cpu", "trainer.precision=16-mixed"], "on a CPU, got 16-mixed"),
    ],
)
def test_what_the_devices_cannot_do_is_refused(gpus, overrides, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=says) as error:
        check_devices(compose("train", overrides).trainer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gpus", "overrides"),
    [
        (2, ["trainer=ddp", "trainer.devices=2", "trainer.precision=16-mixed"]),
        (2, ["trainer=fsdp", "trainer.devices=2", "trainer.precision=bf16-mixed"]),
        (1, ["trainer=cpu", "trainer.strategy=ddp", "trainer.devices=4"]),
    ],
)
def test_what_they_can_do_is_not(gpus, overrides, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_devices(compose("train", overrides).trainer)


def test_torchrun_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = compose("train", ["trainer=ddp", "trainer.devices=2"]).trainer
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_devices(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"devices must be at most .*, 1, got 4"):
        check_devices(config)


@pytest.mark.parametrize(("strategy", "mode"), [("auto", True), ("ddp", True), ("fsdp", False)])
def test_fsdp_validates_outside_of_inference_mode(strategy, mode):
    """Over NCCL, what it gathers there is kept and autograd refuses it; Lightning turns the mode
    off by itself over gloo, so that no run on CPUs would tell."""
    config = compose("train", [f"trainer.strategy={strategy}", "trainer.accelerator=cpu"])
    model = build_model(config.model, "training")
    trainer, _ = runs.build_trainer(config, Processes(1, 1, 0), model)
    assert trainer.validate_loop.inference_mode is mode


def test_a_trainer_that_cannot_be_built_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fails(**_):
        raise MisconfigurationException("no such thing\nas this")

    monkeypatch.setattr(runs.L, "Trainer", fails)
    with pytest.raises(ConfigError, match=r"trainer must be one .* got 'no such thing'; change"):
        train.train(compose("train", [*SMALL, f"runs_dir={tmp_path}"]))
    assert list(tmp_path.iterdir()) == []


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_folder_is_left_where_its_config_has_no_room(tmp_path, monkeypatch):
    config = compose("train", [f"runs_dir={tmp_path}"])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"No space left on device\); free some space"):
        create_run(config)
    assert list(tmp_path.iterdir()) == []


def test_metrics_without_room_are_one_line_and_keep_the_checkpoint(tmp_path, monkeypatch):
    save = _ExperimentWriter.save

    def later(self):
        return full() if any(row["step"] >= 3 for row in self.metrics) else save(self)

    monkeypatch.setattr(_ExperimentWriter, "save", later)
    says = r"No space left on device.*metrics\.csv; free .*resume="
    with pytest.raises(RunError, match=says):
        train.train(compose("train", [*SMALL, f"runs_dir={tmp_path}"]))
    (run,) = tmp_path.iterdir()
    assert checkpoint_step(run) == 4
    load(run)


def test_a_picture_without_room_is_one_line_and_the_run_is_whole(tmp_path, monkeypatch):
    def half(self, file, **_):
        Path(file).write_bytes(b"half a picture")
        full()

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RunError, match=r"No space left on device.*loss\.png; free some space"):
        train.train(compose("train", [*SMALL, f"runs_dir={tmp_path}"]))
    (run,) = tmp_path.iterdir()
    assert not [file.name for file in run.iterdir() if "png" in file.name]
    load(run)

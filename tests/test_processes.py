"""Several processes train what one does."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from configs.command import compose
from configs.schema import ConfigError
from models.checkpoint import load_model
from models.processes import Processes, find_processes

SMALL = [
    "model=mamba2",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.head_dim=16",
    "model.d_state=8",
    "optim.steps=12",
    "optim.batch_size=4",
    "optim.warmup_steps=3",
    "data.sequence_length=32",
    "data.val_tokens=2000",
]


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(["-m", "torch.distributed.run", "--nproc-per-node", "2"], id="torchrun"),
        pytest.param([], id="lightning", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(launch, tmp_path):
    alone = train.train(compose("train", [*SMALL, "trainer=cpu", f"runs_dir={tmp_path / 'one'}"]))
    script = str(Path(train.__file__))
    overrides = [*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = subprocess.run(
        [sys.executable, *launch, script, *overrides, "runs_dir=a run (2)"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation after") == 1
    (run,) = (tmp_path / "a run (2)").iterdir()
    for column in ("train_bpb", "val_bpb"):
        assert curve(run, column) == pytest.approx(curve(alone.run, column), abs=1e-4)
    for one, other in zip(alone.model.parameters(), load_model(run).parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other, atol=1e-3, rtol=1e-3)


def curve(run: Path, column: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes(2, 1, 0)),
        ({"LOCAL_RANK": "1"}, Processes(2, 1, 1)),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "6", "LOCAL_RANK": "2"},
            Processes(4, 2, 6),
        ),
    ],
)
def test_who_am_i(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (
        find_processes(compose("train", ["trainer=ddp", "trainer.devices=2", "optim.batch_size=8"]))
        == expected
    )
    assert expected.count == expected.devices * expected.hosts


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.devices=2"], "trainer.strategy must be ddp or fsdp"),
        (["trainer=ddp", "trainer.devices=3"], "optim.batch_size must be a multiple"),
    ],
)
def test_processes_that_cannot_share(overrides, says):
    with pytest.raises(ConfigError, match=says):
        find_processes(compose("train", overrides))

"""What stops a run, itself, a signal, a full disk or SIGKILL: it keeps the last good checkpoint and
says how to go on."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from demo.checkpoints.checkpoint import load
from demo.config.command import compose
from demo.config.errors import ConfigError, RunError
from demo.training import lit
from demo.training.resume import find_stopped
from small_runs import STOPPABLE, checkpoint_step


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good(tmp_path, monkeypatch):
    config = compose("train", [*STOPPABLE, f"runs_dir={tmp_path}"])
    loss = lit.LitLanguageModel.loss

    def breaks(self, batch):
        return loss(self, batch) * (float("nan") if self.global_step == 8 else 1)

    monkeypatch.setattr(lit.LitLanguageModel, "loss", breaks)
    with pytest.raises(RunError, match=r"got nan after step 9 \(first at batch 8\)"):
        train.train(config)
    (run,) = tmp_path.iterdir()
    assert checkpoint_step(run) == 8
    assert all(p.isfinite().all() for p in load(run).model.parameters())


def test_a_full_disk_stops_the_run_and_keeps_the_last_good(tmp_path, monkeypatch):
    config = compose("train", [*STOPPABLE, f"runs_dir={tmp_path}"])
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 4:  # the config, then weights and last.ckpt of the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*resume="):
        train.train(config)
    (run,) = tmp_path.iterdir()
    assert checkpoint_step(run) == 4
    assert not list(run.glob(".*"))
    load(run)


@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)],
    ids=["int", "term"],
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on(how, code, tmp_path):
    """By Ctrl-C, or as schedulers and `docker stop` do; and nobody takes it over before that."""
    script = str(Path(train.__file__))
    command = [sys.executable, script, *STOPPABLE, "optim.steps=100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(lambda: list(tmp_path.glob("runs/*/last.ckpt")), process)
        (run,) = (tmp_path / "runs").iterdir()
        asked = [*STOPPABLE, "optim.steps=100000", f"runs_dir={tmp_path / 'runs'}"]
        assert find_stopped(compose("train", [*asked, "resume=auto"])) is None
        with pytest.raises(ConfigError, match="which another process works on"):
            find_stopped(compose("train", [*asked, f"resume={run}"]))
        process.send_signal(how)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code
    assert f"resume=runs/{run.name}" in err
    assert f" after step {checkpoint_step(run)}" in err
    assert "Traceback" not in err
    assert checkpoint_step(run) > 0
    assert find_stopped(compose("train", [*asked, "resume=auto"])).run == run


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (2, "stopped after step 2, before the first checkpoint; begin anew with"),
        (4, "stopped after step 4; go on with"),
        (6, "stopped after step 6; go on after step 4, the last checkpoint, with"),
    ],
)
def test_how_to_go_on_says_from_where_and_can_be_pasted(batch, says, tmp_path, monkeypatch, capsys):
    training_step = lit.LitLanguageModel.training_step

    def interrupted(self, tokens, index):
        if index == batch:
            raise KeyboardInterrupt
        return training_step(self, tokens, index)

    folder = tmp_path / "the runs"
    config = compose("train", [*STOPPABLE, "trainer.checkpoint_every=4", f"runs_dir='{folder}'"])
    monkeypatch.setattr(lit.LitLanguageModel, "training_step", interrupted)
    with pytest.raises(SystemExit):
        train.train(config)
    (run,) = folder.iterdir()
    assert capsys.readouterr().err.endswith(f"{says}: python train.py resume='{run}'\n")
    # the step is that of the checkpoint that was gone on from, too
    config.resume = str(run)
    with pytest.raises(SystemExit):
        train.train(config)
    assert says in capsys.readouterr().err


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------ kill


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """SIGKILL, at any moment after training began; each run goes on where the last whole
    checkpoint was."""
    script, steps = str(Path(train.__file__)), 1500
    command = [sys.executable, script, *STOPPABLE, f"optim.steps={steps}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL}
    began = time.monotonic()
    subprocess.run([*command, "runs_dir=whole"], check=True, **options)
    pace = (time.monotonic() - began) / steps  # seconds, so that a fast machine has time for 20
    (whole,) = (tmp_path / "whole").iterdir()

    moments = random.Random(0)
    reached = []
    for kill in range(20):
        process = subprocess.Popen([*command, "resume=auto"], stderr=subprocess.PIPE, **options)
        before = reached[-1] if reached else 0
        wait_for(lambda before=before: position(tmp_path) > before, process)
        time.sleep(moments.uniform(0, 40 * pace))
        assert process.poll() is None, f"finished before kill {kill}: give it more steps"
        process.kill()
        process.communicate()
        reached.append(position(tmp_path))
    assert reached == sorted(reached)
    subprocess.run([*command, "resume=auto"], check=True, **options)
    (run,) = (tmp_path / "runs").iterdir()
    expected = load(whole).model.state_dict()
    for name, tensor in load(run).model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def position(folder: Path) -> int:
    runs = list(folder.glob("runs/*/config.yaml"))
    return checkpoint_step(runs[0].parent) if runs else 0

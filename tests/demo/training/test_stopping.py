"""What stops a run, numbers that are none, a signal, a full disk or SIGKILL: it keeps the last good
checkpoint and says how to go on."""

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
from matplotlib.figure import Figure

import train
from demo.checkpoints.checkpoint import load
from demo.config.errors import ConfigError, RunError
from demo.training import callbacks, stopping
from demo.training.module import LitLanguageModel
from demo.training.resume import find_start
from demo.training.run import METRICS, VAL, Run
from small_runs import (
    SIX_STEPS,
    STOPPABLE,
    break_loss,
    check_same_run,
    check_weights,
    checkpoint_step,
    config_in,
    run,
    train_in,
    train_until,
)

TOO_FAST = "optim.learning_rate=1e38"


def check_last_good(folder: Path, step: int) -> None:
    """That the run in `folder` is whole, with its checkpoint of `step`."""
    (run,) = folder.iterdir()
    assert checkpoint_step(run) == step
    assert all(p.isfinite().all() for p in load(run).model.parameters())
    assert not list(run.glob(".*"))


# --------------------------------------------------------------------------------- finite numbers


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The loss is looked at only before a checkpoint."""
    start = callbacks.Checkpoints.on_train_start

    def late(self, trainer, module):
        start(self, trainer, module)
        self.looks_late = True

    monkeypatch.setattr(callbacks.Checkpoints, "on_train_start", late)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    break_loss(monkeypatch, lambda module: module.training and module.global_step == 8)
    with pytest.raises(RunError, match=r"got nan after step 9 \(first at batch 8\)"):
        train_in(tmp_path, *STOPPABLE)
    check_last_good(tmp_path, 8)


@pytest.mark.parametrize("bad", [4, 5], ids=["last but one", "last"])
def test_a_bad_loss_after_the_last_look_is_found_at_the_end(
    bad, as_on_a_gpu, tmp_path, monkeypatch
):
    break_loss(monkeypatch, lambda module: module.global_step == bad)
    says = rf"loss must be finite, got nan after step 6 \(first at batch {bad}\)"
    with pytest.raises(RunError, match=says):
        train_in(tmp_path, *SIX_STEPS, "trainer.checkpoint_every=4")
    check_last_good(tmp_path, 4)


def test_a_validation_that_is_not_a_number_is_an_error(tmp_path, monkeypatch):
    break_loss(monkeypatch, lambda module: not module.training)
    with pytest.raises(RunError, match="validation loss must be finite, got nan after step 0"):
        train_in(tmp_path, *SIX_STEPS)


@pytest.mark.parametrize("more", ["optim.steps=1", "trainer.checkpoint_every=1"])
def test_parameters_that_are_not_numbers_are_never_saved(more, tmp_path):
    code, _, err = run("train", *SIX_STEPS, TOO_FAST, more, f"runs_dir={tmp_path}")
    assert code == 2
    (line,) = err.splitlines()
    says = "the parameters must be finite numbers, got others after step 1 (first at batch 0); "
    assert line.startswith(f"train.py: error: {says}")
    (folder,) = tmp_path.iterdir()
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["config.yaml", "data.json", "metrics.csv"]


def test_one_bad_parameter_is_enough():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    assert callbacks.all_finite(module, 1)
    with torch.no_grad():
        module[1].bias[2] = float("inf")
    assert not callbacks.all_finite(module, 1)


# ------------------------------------------------------------------------------------- full disk


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4, 6, 7])
def test_a_full_disk_is_one_line_and_keeps_the_last_good(writes, tmp_path, monkeypatch):
    """After the config, metrics.csv, data.json, the best weights of step 3, and the weights and
    last.ckpt of step 4."""
    fsync, left = os.fsync, [None] * writes
    monkeypatch.setattr(
        os, "fsync", lambda file: fsync(file) if left and not left.pop() else full()
    )
    with pytest.raises(ConfigError, match="No space left on device") as error:
        train_in(tmp_path, *STOPPABLE)
    assert "\n" not in str(error.value)
    if writes == 0:  # of no use without its config
        assert "runs_dir must be a folder that can be written to" in str(error.value)
        assert list(tmp_path.iterdir()) == []
        return
    (run,) = tmp_path.iterdir()
    assert f"free some space, then go on with: python train.py resume={run}" in str(error.value)
    if writes >= 6:
        check_last_good(tmp_path, 4)


def test_metrics_without_room_are_one_line_and_keep_the_checkpoint(tmp_path, monkeypatch):
    write, opened = Run.write_metrics, Path.open

    def later(self, step, values):
        if step >= 4:
            monkeypatch.setattr(
                Path, "open", lambda f, *a, **k: full() if f.name == METRICS else opened(f, *a, **k)
            )
        write(self, step, values)

    monkeypatch.setattr(Run, "write_metrics", later)
    with pytest.raises(RunError, match=r"No space left on device.*metrics\.csv; free .*resume="):
        train_in(tmp_path, *STOPPABLE)
    check_last_good(tmp_path, 4)


def test_a_picture_without_room_is_one_line_and_the_run_is_whole(tmp_path, monkeypatch):
    def half(self, file, **_):
        Path(file).write_bytes(b"half a picture")
        full()

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RunError, match=r"No space left on device.*loss\.png; free some space"):
        train_in(tmp_path, *SIX_STEPS)
    check_last_good(tmp_path, 6)


# --------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(how, tmp_path):
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
        asked = [*STOPPABLE, "optim.steps=100000"]
        assert find_start(config_in(tmp_path / "runs", *asked, "resume=auto")).run is None
        with pytest.raises(ConfigError, match="which another process works on"):
            find_start(config_in(tmp_path / "runs", *asked, f"resume='{run}'"))
        process.send_signal(how)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + how
    says = f"stopped after step {checkpoint_step(run)}; go on with: python train.py resume="
    assert err == f"\n{says}runs/{run.name}\n"
    assert find_start(config_in(tmp_path / "runs", *asked, "resume=auto")).run.folder == run


@pytest.fixture
def heeds_ctrl_c():
    """Where a shell starts the tests in the background, they ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def told_to_stop(monkeypatch, method: str, when, *signals: int) -> None:
    """Have a signal come in the middle of a step or of a validation of the Lightning module."""
    original = getattr(LitLanguageModel, method)

    def is_told(self, *args):
        if when(self):
            for number in signals:
                signal.raise_signal(number)
        return original(self, *args)

    monkeypatch.setattr(LitLanguageModel, method, is_told)


@pytest.mark.parametrize("method", ["training_step", "validation_step"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_keeps_the_step_that_was_reached(
    method, number, heeds_ctrl_c, undisturbed, tmp_path, monkeypatch, capsys
):
    """In a step and in a validation on the way, and the run goes on to the same bits."""
    config = config_in(tmp_path, *STOPPABLE)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        told_to_stop(patch, method, lambda module: module.global_step == 6, number, number)
        with pytest.raises(SystemExit) as left:
            train.train(config)
    assert left.value.code == 128 + number
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    (run,) = tmp_path.iterdir()
    step = 7 if method == "training_step" else 6
    assert checkpoint_step(run) == step
    assert f"stopped after step {step}; go on with: python" in capsys.readouterr().err
    config.resume = str(run)
    train.train(config)
    check_same_run(run, undisturbed.run)


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(heeds_ctrl_c):
    """As one that `nohup` or a shell's `&` started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.of_all(1, torch.device("cpu")) == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_signal_stops_at_once(heeds_ctrl_c, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stopping, "ONE_KEY", -1)
    step = lambda module: module.global_step == 6  # noqa: E731
    told_to_stop(monkeypatch, "training_step", step, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        train_in(tmp_path, *STOPPABLE)
    assert left.value.code == 130
    check_last_good(tmp_path, 4)
    assert "stopped after step 6; go on after step 4" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 12], ids=["before", "after"])
def test_a_signal_outside_of_the_training_stops_at_once(step, tmp_path, monkeypatch):
    def told(module):
        return module.val_metric == VAL and module.global_step == step

    told_to_stop(monkeypatch, "validation_step", told, signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        train_in(tmp_path, *STOPPABLE)
    assert left.value.code == 143
    (run,) = tmp_path.iterdir()
    assert checkpoint_step(run) == step


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (2, "stopped after step 2, before the first checkpoint; begin anew with"),
        (4, "stopped after step 4; go on with"),
        (6, "stopped after step 6; go on after step 4, the last checkpoint, with"),
    ],
)
def test_how_to_go_on_says_from_where_and_can_be_pasted(batch, says, tmp_path, monkeypatch, capsys):
    config = config_in(tmp_path / "the runs", *STOPPABLE)
    run = train_until(batch, config, monkeypatch, SystemExit)  # as a second signal does
    assert capsys.readouterr().err.endswith(f"{says}: python train.py resume='{run}'\n")
    # A run that was itself resumed says the same, if it gets no further.
    config.resume = str(run)
    train_until(batch, config, monkeypatch, SystemExit)
    assert says in capsys.readouterr().err


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


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
    check_weights(run, whole)


def position(folder: Path) -> int:
    runs = list(folder.glob("runs/*/config.yaml"))
    return checkpoint_step(runs[0].parent) if runs else 0

"""A run that was stopped goes on to the same bits as one that was not."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from configs.command import compose
from configs.schema import ConfigError, RunError
from models.checkpoints.checkpoint import load_model
from models.training import lit
from models.training.callbacks import RandomState
from models.training.resume import find_stopped, read_metrics
from small_runs import TWELVE_STEPS, checkpoint_step, train_until

SMALL = [*TWELVE_STEPS, "model=mamba2", "trainer.checkpoint_every=4"]


@pytest.fixture(scope="module")
def stopped_runs() -> dict[int, Path]:
    """By the step that they were stopped in, for as long as this file's tests run."""
    return {}


@pytest.fixture
def stopped_run(stopped_runs, tmp_path_factory, tmp_path, monkeypatch) -> Callable[[int], Path]:
    """Puts a run that was stopped in some step into `tmp_path`."""

    def put(step: int) -> Path:
        if step not in stopped_runs:
            runs_dir = tmp_path_factory.mktemp("stopped")
            config = compose("train", [*SMALL, f"runs_dir={runs_dir}"])
            stopped_runs[step] = train_until(step, config, monkeypatch)
        return shutil.copytree(stopped_runs[step], tmp_path / stopped_runs[step].name)

    return put


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train.train(compose("train", [*SMALL, f"runs_dir={tmp_path_factory.mktemp('runs')}"]))


@pytest.mark.parametrize(
    ("step", "resume"),
    [
        (2, "auto"),
        pytest.param(4, "auto", marks=pytest.mark.slow),
        (7, "by name"),
        pytest.param(11, "auto", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(step, resume, undisturbed, tmp_path, stopped_run):
    run = stopped_run(step)
    assert checkpoint_step(run) == step // 4 * 4
    resume = "auto" if resume == "auto" else str(run)
    config = compose("train", [*SMALL, f"runs_dir={tmp_path}"])
    config.resume = resume
    torch.manual_seed(99)  # whatever happened in between
    summary = train.train(config)
    assert summary.run == run
    assert (summary.before, summary.after) == (undisturbed.before, undisturbed.after)
    assert summary.tokens == undisturbed.tokens
    expected = load_model(undisturbed.run).state_dict()
    for name, tensor in load_model(run).state_dict().items():
        assert torch.equal(tensor, expected[name])
    columns = [[row.split(",")[i] for i in (1, 3, 4)] for row in metrics(run)]
    assert columns == [[row.split(",")[i] for i in (1, 3, 4)] for row in metrics(undisturbed.run)]


def metrics(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,tokens_per_s,train_bpb,val_bpb"
    return [line for line in lines[1:] if line.split(",")[3]]


def test_auto_starts_anew_when_nothing_was_stopped(undisturbed, tmp_path, stopped_run):
    config = compose("train", [*SMALL, f"runs_dir={undisturbed.run.parent}", "resume=auto"])
    assert find_stopped(config) is None
    run = stopped_run(5)
    config = compose("train", [*SMALL, f"runs_dir={tmp_path}", "resume=auto"])
    assert find_stopped(config).run == run
    other = compose("train", ["model=fla", f"runs_dir={tmp_path}", "resume=auto"])
    assert find_stopped(other) is None


def test_a_resumed_run_has_its_own_config(tmp_path, stopped_run):
    run = stopped_run(5)
    config = compose("train", ["model=mamba2", f"runs_dir={tmp_path}", "resume=auto"])
    assert find_stopped(config).config.optim.steps == 12
    config.optim.learning_rate = 1e-4
    with pytest.raises(ConfigError, match=r"optim\.learning_rate must be as in the run"):
        find_stopped(config)
    config = compose("train", [])
    config.resume = str(run)
    assert find_stopped(config).config.model.name == "mamba2"


def test_what_was_typed_must_be_as_in_the_run_even_if_it_is_the_default(
    tmp_path, monkeypatch, capsys, stopped_run
):
    run = stopped_run(5)
    before = sorted(tmp_path.rglob("*"))
    for typed, says in (
        ("model=fla", "model.name must be as in the run that is resumed, 'mamba2', got 'fla'"),
        ("optim.warmup_steps=null", "must be as in the run that is resumed, 3, got null"),
        ("data=stdlib optim.steps=330", "optim.steps must be as in the run that is resumed, 12"),
        ("optim.batch_size=8", "optim.batch_size must be as in the run that is resumed, 4, got 8"),
        ("trainer.accumulate=2", "trainer.accumulate must be as in the run that is resumed, 1"),
        ("trainer.precision=bf16-mixed", "trainer.precision must be as in the run that is"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", f"resume={run}", *typed.split()])
        with pytest.raises(SystemExit):
            train.main()
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_goes_on_with_other_devices(stopped_run):
    run = stopped_run(5)
    other = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.checkpoint_every=7"]
    config = compose("train", ["model=mamba2", *other, "trainer.activation_checkpointing=true"])
    config.resume = str(run)
    trainer = find_stopped(config).config.trainer
    assert (trainer.strategy, trainer.devices, trainer.checkpoint_every) == ("ddp", 2, 7)
    assert trainer.accelerator == "cpu"
    assert trainer.activation_checkpointing


def test_a_flipped_bit_anywhere_is_found_or_harmless(stopped_run):
    run = stopped_run(5)
    file = run / "last.ckpt"
    whole = file.read_bytes()
    expected = torch.load(file, weights_only=True)["state_dict"]
    places = random.Random(0).sample(range(len(whole)), 60)
    found = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        error = ""
        try:
            assert checkpoint_step(run) == 4
        except ConfigError as caught:
            error = str(caught)
        if error:
            assert "last.ckpt" in error
            assert "\n" not in error
            found += 1
        else:
            state = torch.load(file, weights_only=True)["state_dict"]
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert found > 40


def of_another_version(run: Path, *keys: str) -> None:
    """Without the part of last.ckpt that these keys lead to."""
    state = torch.load(run / "last.ckpt", weights_only=True)
    *path, last = keys
    part = state
    for key in path:
        part = part[key]
    del part[last]
    torch.save(state, run / "last.ckpt")


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return edit


UNREADABLE = {
    "missing": (lambda run: (run / "config.yaml").unlink(), "without config.yaml"),
    "finished": (lambda run: (run / "loss.png").touch(), "which is finished"),
    "truncated": (lambda run: os.truncate(run / "last.ckpt", 5000), "it is cut short"),
    "pickle": (
        lambda run: (run / "last.ckpt").write_bytes(b"cos\nsystem\n(S'touch was-run'\ntR."),
        "it is cut short",
    ),
    "config of a model alone": (
        lambda run: (run / "config.yaml").write_text("model: {name: mamba2}"),
        "it lacks model.hidden_size",
    ),
    "config of a list": (
        lambda run: (run / "config.yaml").write_text("- model"),
        "it has no model section",
    ),
    "config that refers to nothing": (
        edited("config.yaml", "steps: 12", "steps: ${x}"),
        "Interpolation key 'x' not found",
    ),
    "config without a section": (
        edited("config.yaml", "optim:", "optics:"),
        "there is no key 'optics'",
    ),
    "config of an older version": (
        edited("config.yaml", "  steps: 12\n", ""),
        "optim.steps must have a value, got none",
    ),
    "config of other sizes": (
        edited("config.yaml", "hidden_size: 32", "hidden_size: 64"),
        r"its embedding.weight has shape \[256, 32\] and not \[256, 64\]",
    ),
    "config of a huge size": (
        edited("config.yaml", "hidden_size: 32", "hidden_size: 32000000"),
        r"its embedding.weight has shape \[256, 32\] and not \[256, 32000000\]",
    ),
    "config of a billion layers": (
        edited("config.yaml", "num_layers: 2", "num_layers: 1000000000"),
        "too few tensors",
    ),
    "no optimizer": (
        lambda run: of_another_version(run, "optimizer_states"),
        "it has no optimizer_states, perhaps because another version",
    ),
    "no random state": (
        lambda run: of_another_version(run, "callbacks", "RandomState"),
        "it has no callbacks.RandomState",
    ),
    "no position": (
        lambda run: of_another_version(
            run, "loops", "fit_loop", "state_dict", "combined_loader", 0, "text"
        ),
        "got the parts position in the checkpoint, not position, text",
    ),
    "metrics": (
        edited("metrics.csv", "epoch,step", "epoch,stop"),
        "metrics.csv.* must be whole .* not a table of numbers with the column step",
    ),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_run_that_cannot_be_resumed_is_one_error_and_stays_as_it_is(
    how, tmp_path, monkeypatch, stopped_run
):
    run = stopped_run(5)
    change, says = UNREADABLE[how]
    change(run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    monkeypatch.chdir(tmp_path)
    config = compose("train", ["model=mamba2"])
    config.resume = str(run)
    with pytest.raises(ConfigError, match=says) as error:
        train.train(config)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert list(tmp_path.iterdir()) == [run]


def test_a_run_in_a_folder_that_is_read_only_is_one_error(monkeypatch, stopped_run):
    run = stopped_run(5)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    config = compose("train", ["model=mamba2"])
    config.resume = str(run)
    with pytest.raises(ConfigError, match="which cannot; change its permissions"):
        find_stopped(config)


def test_a_run_whose_text_has_changed_stays_as_it_is(tmp_path, monkeypatch):
    text, runs = tmp_path / "book.txt", tmp_path / "runs"
    text.write_bytes(bytes(range(256)) * 40)
    config = compose("train", [*SMALL, "data=text", "data.path=x", f"runs_dir={runs}"])
    config.data.path = str(text)
    run = train_until(5, config, monkeypatch)
    before = {path: path.read_bytes() for path in run.iterdir()}
    text.write_bytes(bytes(range(255)) * 40)
    config.resume = str(run)
    with pytest.raises(ConfigError, match="training tokens must be those of the run that is res"):
        train.train(config)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    text.write_bytes(bytes(range(256)) * 40)
    train.train(config)


def test_the_beginning_of_a_row_that_a_kill_left_is_no_row(stopped_run):
    run = stopped_run(5)
    with (run / "metrics.csv").open("a", newline="") as file:
        file.write("0,2")  # of 0,25,...
    assert [step for step, _ in read_metrics(run, 4)] == [0, 0, 1, 2, 3]


# ------------------------------------------------------------------------------- it stops itself


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good(tmp_path, monkeypatch):
    config = compose("train", [*SMALL, f"runs_dir={tmp_path}"])
    loss = lit.LitLanguageModel.loss

    def breaks(self, batch):
        return loss(self, batch) * (float("nan") if self.global_step == 8 else 1)

    monkeypatch.setattr(lit.LitLanguageModel, "loss", breaks)
    with pytest.raises(RunError, match=r"got nan after step 9 \(first at batch 8\)"):
        train.train(config)
    (run,) = tmp_path.iterdir()
    assert checkpoint_step(run) == 8
    assert all(p.isfinite().all() for p in load_model(run).parameters())


def test_a_full_disk_stops_the_run_and_keeps_the_last_good(tmp_path, monkeypatch):
    config = compose("train", [*SMALL, f"runs_dir={tmp_path}"])
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
    load_model(run)


@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)],
    ids=["int", "term"],
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on(how, code, tmp_path):
    """By Ctrl-C, or as schedulers and `docker stop` do; and nobody takes it over before that."""
    script = str(Path(train.__file__))
    command = [sys.executable, script, *SMALL, "optim.steps=100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(lambda: list(tmp_path.glob("runs/*/last.ckpt")), process)
        (run,) = (tmp_path / "runs").iterdir()
        asked = [*SMALL, "optim.steps=100000", f"runs_dir={tmp_path / 'runs'}"]
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
    config = compose("train", [*SMALL, "trainer.checkpoint_every=4", f"runs_dir='{folder}'"])
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


# ---------------------------------------------------------------------------------- random state


def test_random_generators_go_on_where_they_were():
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002

    state = RandomState().state_dict()
    first = draw()
    callback = RandomState()
    callback.load_state_dict(state)
    callback.on_train_start(None, None)
    assert draw() == first
    assert draw() != first


# ------------------------------------------------------------------------------------------ kill


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """SIGKILL, at any moment after training began; each run goes on where the last whole
    checkpoint was."""
    script, steps = str(Path(train.__file__)), 1500
    command = [sys.executable, script, *SMALL, f"optim.steps={steps}"]
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
    expected = load_model(whole).state_dict()
    for name, tensor in load_model(run).state_dict().items():
        assert torch.equal(tensor, expected[name])


def position(folder: Path) -> int:
    runs = list(folder.glob("runs/*/config.yaml"))
    return checkpoint_step(runs[0].parent) if runs else 0

"""A run that was stopped goes on to the same bits as one that was not."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from demo.checkpoints.checkpoint import load
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.config.schema import model_name
from demo.training.callbacks import RandomState
from demo.training.resume import find_stopped
from small_runs import STOPPABLE, checkpoint_step, train_until


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train.train(
        compose("train", [*STOPPABLE, f"runs_dir={tmp_path_factory.mktemp('runs')}"])
    )


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
    config = compose("train", [*STOPPABLE, f"runs_dir={tmp_path}"])
    config.resume = resume
    torch.manual_seed(99)  # whatever happened in between
    summary = train.train(config)
    assert summary.run == run
    assert (summary.before, summary.after) == (undisturbed.before, undisturbed.after)
    assert summary.tokens == undisturbed.tokens
    expected = load(undisturbed.run).model.state_dict()
    for name, tensor in load(run).model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    columns = [[row.split(",")[i] for i in (1, 3, 4)] for row in metrics(run)]
    assert columns == [[row.split(",")[i] for i in (1, 3, 4)] for row in metrics(undisturbed.run)]


def metrics(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,tokens_per_s,train_bpb,val_bpb"
    return [line for line in lines[1:] if line.split(",")[3]]


def test_auto_starts_anew_when_nothing_was_stopped(undisturbed, tmp_path, stopped_run):
    config = compose("train", [*STOPPABLE, f"runs_dir={undisturbed.run.parent}", "resume=auto"])
    assert find_stopped(config) is None
    run = stopped_run(5)
    config = compose("train", [*STOPPABLE, f"runs_dir={tmp_path}", "resume=auto"])
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
    assert model_name(find_stopped(config).config.model) == "mamba2"


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


def test_a_run_whose_text_has_changed_stays_as_it_is(tmp_path, monkeypatch):
    text, runs = tmp_path / "book.txt", tmp_path / "runs"
    text.write_bytes(bytes(range(256)) * 40)
    config = compose("train", [*STOPPABLE, "data=text", "data.path=x", f"runs_dir={runs}"])
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

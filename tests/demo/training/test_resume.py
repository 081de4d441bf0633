"""A run that was stopped goes on to the same bits as one that was not."""

import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from demo.checkpoints.checkpoint import WEIGHTS
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.config.schema import model_name
from demo.training.callbacks import RandomState
from demo.training.resume import find_start
from demo.training.run import Run
from small_runs import (
    STOPPABLE,
    check_same_run,
    check_weights,
    checkpoint_step,
    config_in,
    curve,
    train_until,
)


def config_of(run: Path, *overrides: str):
    """Of the command that goes on with a run."""
    return compose("train", [*overrides, f"resume='{run}'"])


def as_version_0_1_0_wrote_it(run: Path) -> None:
    """The layout of last.ckpt is still the same; rows ended in CRLF, and keys were fewer."""
    metrics = run / "metrics.csv"
    rows = [line.rsplit(b",", 1) for line in metrics.read_bytes().splitlines()]
    lines = [row for row, sample in rows if not sample.strip(b"0123456789.")]
    metrics.write_bytes(b"\r\n".join([rows[0][0], *lines, b""]))
    (run / "best.safetensors").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["checkpoint"], config["tokenizer"]
    for section, key in (
        *((config["trainer"], key) for key in ("validate_every", "validate_tokens", "loggers")),
        *((config["optim"], key) for key in ("schedule", "min_learning_rate_ratio", "decay_steps")),
    ):
        del section[key]
    config["trainer"]["tensorboard"] = False
    config["optim"]["min_learning_rate"] = 5e-4
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    state = torch.load(run / "last.ckpt", weights_only=True)
    del state["callbacks"]["Checkpoints"]
    torch.save(state, run / "last.ckpt")
    assert set(state) == {
        *("epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops"),
        *("callbacks", "optimizer_states", "lr_schedulers"),
    }
    assert set(state["callbacks"]) == {"Throughput", "RandomState"}
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert set(loader) == {"position", "text"}
    assert len(state["optimizer_states"][0]["param_groups"]) == 2


@pytest.mark.parametrize(
    ("step", "resume", "change"),
    [
        (2, "auto", None),
        pytest.param(4, "auto", None, marks=pytest.mark.slow),
        (7, "by name", None),
        (7, "auto", as_version_0_1_0_wrote_it),
        pytest.param(11, "auto", None, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(
    step, resume, change, undisturbed, tmp_path, stopped_run
):
    run = stopped_run(step)
    assert checkpoint_step(run) == step // 4 * 4
    if change is not None:
        change(run)
    resume = "auto" if resume == "auto" else run
    torch.manual_seed(99)  # whatever happened in between
    options = STOPPABLE if change is None else ["model=mamba2"]
    summary = train.train(config_in(tmp_path, *options, f"resume='{resume}'"))
    assert summary.run == run
    assert (summary.before, summary.after) == (undisturbed.before, undisturbed.after)
    assert summary.tokens == undisturbed.tokens
    if change is None:
        check_same_run(run, undisturbed.run)
        assert steps(run) == steps(undisturbed.run)
        return
    check_weights(run / WEIGHTS, undisturbed.run / WEIGHTS)
    for column in ("train_bpb", "val_bpb"):
        assert curve(run, column) == curve(undisturbed.run, column)


def steps(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,tokens_per_s,train_bpb,val_bpb,val_sample_bpb"
    return [line.split(",")[1] for line in lines[1:]]


def test_auto_starts_anew_when_nothing_was_stopped(undisturbed, tmp_path, stopped_run):
    auto = [*STOPPABLE, "resume=auto"]
    assert find_start(config_in(undisturbed.run.parent, *auto)).run is None
    run = stopped_run(5)
    assert find_start(config_in(tmp_path, *auto)).run.folder == run
    assert find_start(config_in(tmp_path, "model=fla", "resume=auto")).run is None


def test_a_resumed_run_has_its_own_config(stopped_run):
    run = stopped_run(5)
    config = find_start(config_of(run)).config
    assert (model_name(config.model), config.optim.steps) == ("mamba2", 12)


def test_what_was_typed_must_be_as_in_the_run_even_if_it_is_the_default(stopped_run):
    run = stopped_run(5)
    for typed, says in (
        ("model=fla", "model.name must be as in the run that is resumed, 'mamba2', got 'fla'"),
        ("optim.warmup_steps=null", "must be as in the run that is resumed, 3, got null"),
        ("data=stdlib optim.steps=330", "optim.steps must be as in the run that is resumed, 12"),
        ("optim.batch_size=8", "optim.batch_size must be as in the run that is resumed, 4, got 8"),
        ("trainer.accumulate=2", "trainer.accumulate must be as in the run that is resumed, 1"),
        ("trainer.precision=bf16-mixed", "trainer.precision must be as in the run that is"),
    ):
        with pytest.raises(ConfigError, match=says):
            find_start(config_of(run, *typed.split()))


def test_a_run_in_a_folder_that_is_read_only_is_one_error(monkeypatch, stopped_run):
    run = stopped_run(5)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="which cannot; change its permissions"):
        find_start(config_of(run, "model=mamba2"))


def test_the_beginning_of_a_row_that_a_kill_left_is_no_row(stopped_run):
    run = stopped_run(5)
    with (run / "metrics.csv").open("a", newline="") as file:
        file.write("0,2")  # of 0,25,...
    assert [step for step, _ in Run(run).read_metrics(4)] == [0, 0, 1, 2, 2, 3]


def test_a_flipped_bit_anywhere_is_found_or_harmless(stopped_run):
    run = stopped_run(5)
    file = run / "last.ckpt"
    whole = file.read_bytes()
    expected = torch.load(file, weights_only=True)["state_dict"]
    errors = []
    for place in random.Random(0).sample(range(len(whole)), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            assert checkpoint_step(run) == 4
        except ConfigError as error:
            errors.append(str(error))
        else:
            state = torch.load(file, weights_only=True)["state_dict"]
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert len(errors) > 40
    assert all(re.fullmatch(r".*last\.ckpt.*", error) for error in errors)


def test_a_run_goes_on_with_other_devices(stopped_run):
    other = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.checkpoint_every=7"]
    more = ["model=mamba2", "trainer.activation_checkpointing=true", "exact=true"]
    config = find_start(config_of(stopped_run(5), *other, *more)).config
    trainer = config.trainer
    assert (trainer.strategy, trainer.devices, trainer.checkpoint_every) == ("ddp", 2, 7)
    assert trainer.accelerator == "cpu"
    assert trainer.activation_checkpointing
    assert config.exact


def test_what_a_run_has_and_what_is_asked_for_must_go_together(stopped_run):
    run = stopped_run(5)
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("exact: false", "exact: true"))
    with pytest.raises(ConfigError, match=r"exact=true needs trainer\.compile=false, got true"):
        find_start(config_of(run, "trainer.compile=true"))
    with pytest.raises(ConfigError, match=r"exact=true needs trainer\.tensor_parallel=1, got 2"):
        find_start(config_of(run, "trainer.tensor_parallel=2"))


def test_a_run_whose_text_has_changed_stays_as_it_is(tmp_path, monkeypatch):
    text, runs = tmp_path / "book.txt", tmp_path / "runs"
    text.write_bytes(bytes(range(256)) * 40)
    config = config_in(runs, *STOPPABLE, "data=text", f"data.path='{text}'")
    run = train_until(5, config, monkeypatch)
    before = {path: path.read_bytes() for path in run.iterdir()}
    text.write_bytes(bytes(range(255)) * 40)
    config.resume = str(run)
    with pytest.raises(ConfigError, match="training tokens must be as in the run that is res"):
        train.train(config)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    text.write_bytes(bytes(range(256)) * 40)
    train.train(config)


def test_all_generators_are_in_the_checkpoint():
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002

    state = RandomState().state_dict()
    first = draw()
    callback = RandomState()
    callback.load_state_dict(state)
    callback.on_train_start(None, None)
    assert draw() == first
    assert draw() != first

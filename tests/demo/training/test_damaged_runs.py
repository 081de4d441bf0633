"""A run that is damaged, of another version or read-only is one error, and stays as it is."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.training.resume import find_start
from demo.training.run import Run
from small_runs import checkpoint_step


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


# Beside the cases of tests/helpers/mistakes.py.
UNREADABLE = {
    "config of a model alone": (
        lambda run: (run / "config.yaml").write_text("model: {name: mamba2}"),
        "model.hidden_size must have a value, got none",
    ),
    "config of a list": (
        lambda run: (run / "config.yaml").write_text("- model"),
        "it has no model section",
    ),
    "config that refers to nothing": (
        edited("config.yaml", "steps: 12", "steps: ${x}"),
        r"optim.steps must be a whole number, got '\$\{x\}'",
    ),
    "config without a section": (
        edited("config.yaml", "optim:", "optics:"),
        "there is no key 'optics'",
    ),
    "config of a billion layers": (
        edited("config.yaml", "num_layers: 2", "num_layers: 1000000000"),
        "num_layers must be at most the number of tensors, 20, got 1000000000",
    ),
    "no random state": (
        lambda run: of_another_version(run, "callbacks", "RandomState"),
        "it has no callbacks.RandomState, perhaps because another version",
    ),
    "no position": (
        lambda run: of_another_version(
            run, "loops", "fit_loop", "state_dict", "combined_loader", 0, "text"
        ),
        "position in the data must be as in the run that is resumed, position, got position, text",
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
    with pytest.raises(ConfigError, match=says) as error:
        train.train(compose("train", ["model=mamba2", f"resume='{run}'"]))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert list(tmp_path.iterdir()) == [run]


def test_a_run_in_a_folder_that_is_read_only_is_one_error(monkeypatch, stopped_run):
    run = stopped_run(5)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="which cannot; change its permissions"):
        find_start(compose("train", ["model=mamba2", f"resume='{run}'"]))


def test_the_beginning_of_a_row_that_a_kill_left_is_no_row(stopped_run):
    run = stopped_run(5)
    with (run / "metrics.csv").open("a", newline="") as file:
        file.write("0,2")  # of 0,25,...
    assert [step for step, _ in Run(run).read_metrics(4)] == [0, 0, 1, 2, 3]

"""The learning rate at each step, and other steps for a run where that leaves it as it was."""

import numpy as np
import pytest
import yaml

import train
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.training.resume import find_start
from demo.training.schedule import learning_rate_factor, warmup_steps
from small_runs import STOPPABLE, check_same_run, config_in, train_in, train_until

HUNDRED = ["optim.learning_rate=1e-2", "optim.steps=100", "optim.warmup_steps=10"]


def factors(*overrides: str) -> np.ndarray:
    """At each of 100 steps, and after the last."""
    factor = learning_rate_factor(compose("train", [*HUNDRED, *overrides]).optim)
    return np.array([factor(step) for step in range(101)])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_each_begins_with_a_linear_warm_up(schedule):
    found = factors(f"optim.schedule={schedule}")
    assert found[:11] == pytest.approx([*np.linspace(0.1, 1, 10), 1])


@pytest.mark.parametrize(
    ("overrides", "floor"),
    [
        ([], 0.1),
        (["optim.min_learning_rate_ratio=0.3"], 0.3),
        (["optim.min_learning_rate=2e-3"], 0.2),
        (["optim.min_learning_rate=0"], 0),
    ],
    ids=["default", "ratio", "rate", "zero"],
)
def test_a_cosine_comes_down_to_the_smallest_rate(overrides, floor):
    found = factors(*overrides)
    expected = floor + (1 - floor) * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    assert found[10:] == pytest.approx(expected)


@pytest.mark.parametrize(("decay", "first"), [("null", 80), ("0", 100), ("90", 10)])
def test_wsd_is_constant_and_then_a_straight_line(decay, first):
    found = factors("optim.schedule=wsd", f"optim.decay_steps={decay}")
    assert (found[10:first] == 1).all()
    if first < 100:
        assert found[first:] == pytest.approx(np.linspace(1, 0.1, 101 - first))


def test_constant_stays():
    assert (factors("optim.schedule=constant")[10:] == 1).all()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.steps=1000"], 40),
        (["optim.steps=70"], 7),
        (["experiment=single_gpu"], 200),
        (["experiment=single_gpu", "optim.steps=100"], 10),
        (["experiment=single_gpu", "optim.steps=5"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_warm_up_fits_few_steps(overrides, expected):
    assert warmup_steps(compose("train", overrides).optim) == expected


# ----------------------------------------------------------------------------------- other steps


def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path):
    """A validation every 3 steps, a checkpoint every 4: its last step has both."""
    constant = [*STOPPABLE, "optim.schedule=constant"]
    long = train_in(tmp_path / "long", *constant, "optim.steps=21").run
    run = train_in(tmp_path / "short", *constant).run
    with pytest.raises(ConfigError, match=r"is finished; give it more steps with optim\.steps="):
        find_start(compose("train", [f"resume='{run}'"]))
    summary = train.train(compose("train", [f"resume='{run}'", "optim.steps=21"]))
    assert summary.run == run
    assert summary.tokens == 21 * 4 * 32
    check_same_run(run, long)
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["steps"] == 21
    assert (run / "loss.png").exists()


def test_the_stable_part_of_wsd_can_be_given_other_steps(tmp_path, monkeypatch):
    wsd = [*STOPPABLE, "optim.schedule=wsd", "optim.decay_steps=3"]
    short = train_in(tmp_path / "short", *wsd, "optim.steps=9").run
    run = train_until(6, config_in(tmp_path / "long", *wsd), monkeypatch)
    with pytest.raises(ConfigError, match=r"schedule=wsd has other learning rates before st"):
        find_start(compose("train", [f"resume='{run}'", "optim.steps=5"]))
    train.train(compose("train", [f"resume='{run}'", "optim.steps=9"]))
    check_same_run(run, short)


@pytest.mark.parametrize("steps", [6, 11, 13, 100])
def test_a_cosine_cannot(steps, stopped_run):
    run = stopped_run(5)
    says = f"optim.steps must be as in the run that is resumed, 12, got {steps}, with which optim.s"
    with pytest.raises(ConfigError, match=says):
        find_start(compose("train", [f"resume='{run}'", f"optim.steps={steps}"]))


def test_a_run_without_a_checkpoint_can(stopped_run):
    start = find_start(compose("train", [f"resume='{stopped_run(2)}'", "optim.steps=100"]))
    assert (start.config.optim.steps, start.saved.optim.steps) == (100, 100)
    assert start.config.trainer.validate_every == 3

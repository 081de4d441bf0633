"""A run whose numbers stop being numbers: it stops, says so, and keeps the last good checkpoint."""

import sys

import pytest
import torch

import train
from demo.checkpoints.checkpoint import LAST, load
from demo.config.command import compose
from demo.config.errors import RunError
from demo.training import callbacks, lit
from small_runs import SIX_STEPS, checkpoint_step

TOO_FAST = "optim.learning_rate=1e38"


def train_small(folder, *overrides):
    return train.train(compose("train", [*SIX_STEPS, f"runs_dir={folder}", *overrides]))


@pytest.mark.parametrize("more", [["optim.steps=1"], ["trainer.checkpoint_every=1"]], ids=" ".join)
def test_parameters_that_are_not_numbers_are_never_saved(more, tmp_path):
    says = r"parameters must be finite numbers, got others after step 1 \(first at batch 0\)"
    with pytest.raises(RunError, match=says):
        train_small(tmp_path, TOO_FAST, *more)
    (run,) = tmp_path.iterdir()
    assert not (run / LAST).exists()
    assert not (run / "model.safetensors").exists()


def test_the_command_leaves_with_an_error(tmp_path, monkeypatch, capsys):
    arguments = [*SIX_STEPS, TOO_FAST, "optim.steps=1", f"runs_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: the parameters must be finite")
    assert err.count("\n") == 1


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The loss is looked at before a checkpoint only."""
    start = callbacks.FiniteLoss.on_train_start

    def waits(self, trainer, module):
        start(self, trainer, module)
        self.waits = True

    monkeypatch.setattr(callbacks.FiniteLoss, "on_train_start", waits)


@pytest.mark.parametrize("bad", [4, 5], ids=["last but one", "last"])
def test_a_bad_loss_after_the_last_look_is_found_at_the_end(
    bad, as_on_a_gpu, tmp_path, monkeypatch
):
    loss = lit.LitLanguageModel.loss

    def breaks(self, batch):
        return loss(self, batch) * (float("nan") if self.global_step == bad else 1)

    monkeypatch.setattr(lit.LitLanguageModel, "loss", breaks)
    says = rf"loss must be finite, got nan after step 6 \(first at batch {bad}\)"
    with pytest.raises(RunError, match=says):
        train_small(tmp_path, "trainer.checkpoint_every=4")
    (run,) = tmp_path.iterdir()
    assert checkpoint_step(run) == 4
    assert all(p.isfinite().all() for p in load(run).model.parameters())


def test_a_validation_that_is_not_a_number_is_an_error(tmp_path, monkeypatch):
    loss = lit.LitLanguageModel.loss

    def breaks(self, batch):
        return loss(self, batch) * (1 if self.training else float("nan"))

    monkeypatch.setattr(lit.LitLanguageModel, "loss", breaks)
    with pytest.raises(RunError, match="validation loss must be finite, got nan after step 0"):
        train_small(tmp_path)


def test_one_bad_parameter_is_enough():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    assert callbacks.all_finite(module, 1)
    with torch.no_grad():
        module[1].bias[2] = float("inf")
    assert not callbacks.all_finite(module, 1)

"""Small runs and untrained checkpoints, and the commands run in this process."""

import csv
import importlib
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import train
from demo.checkpoints.checkpoint import BEST, WEIGHTS, load, save_config, save_weights
from demo.checkpoints.tokenizer import Tokenizer
from demo.config.command import compose
from models.language_model import LanguageModel

SMALL = ["model.hidden_size=32", "model.num_layers=2", "model.head_dim=16"]
FEW_STEPS = [  # of train.py, in seconds
    *("optim.steps=6", "optim.batch_size=2", "optim.warmup_steps=0"),
    *("data.sequence_length=32", "data.val_tokens=256", "trainer.accelerator=cpu"),
    "trainer.validate_every=3",
]
SIX_STEPS = [*SMALL, *FEW_STEPS]
TWELVE_STEPS = [  # on more rows
    *SIX_STEPS,
    *("optim.steps=12", "optim.batch_size=4", "optim.warmup_steps=3", "data.val_tokens=2000"),
]
STOPPABLE = [*TWELVE_STEPS, "model=mamba2", "trainer.checkpoint_every=4"]


class Stop(Exception):
    """Stands for the plug being pulled."""


def config_in(folder: Path, *overrides: str):
    """The config of `python train.py runs_dir=<folder> <overrides>`."""
    return compose("train", [*overrides, f"runs_dir='{folder}'"])


def train_in(folder: Path, *overrides: str):
    """Train with it. Returns the summary."""
    return train.train(config_in(folder, *overrides))


def train_until(batch: int, config, monkeypatch, ends: type[BaseException] = Stop) -> Path:
    """Train, and die in the middle of a step. Returns the run, the only one in its folder."""
    from demo.training.module import LitLanguageModel  # takes seconds

    training_step = LitLanguageModel.training_step

    def dies(self, tokens, index):
        if index == batch:
            raise ends
        return training_step(self, tokens, index)

    with monkeypatch.context() as patch:
        patch.setattr(LitLanguageModel, "training_step", dies)
        with pytest.raises(ends):
            train.train(config)
    (run,) = Path(config.runs_dir).iterdir()
    return run


def break_loss(monkeypatch, when: Callable[[torch.nn.Module], bool]) -> None:
    """Make the loss NaN where `when` says so of the Lightning module."""
    from demo.training.module import LitLanguageModel

    loss = LitLanguageModel.loss

    def breaks(self, batch):
        return loss(self, batch) * (float("nan") if when(self) else 1)

    monkeypatch.setattr(LitLanguageModel, "loss", breaks)


def curve(run: Path, column: str = "train_bpb") -> list[float]:
    """What metrics.csv has in a column."""
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def check_curves(run: Path, expected: Path, within: float = 1e-4) -> None:
    """That training and validation lost the same, and came to nearly the same weights."""
    for column in ("train_bpb", "val_bpb"):
        assert curve(run, column) == pytest.approx(curve(expected, column), abs=within)
    check_weights(run, expected, atol=max(within, 1e-3), rtol=max(within, 1e-3))


def check_weights(run: Path, expected: Path, **tolerance: float) -> None:
    """That the weights of two runs are the same; without a tolerance, to the same bits."""
    weights, others = load(run).model.state_dict(), load(expected).model.state_dict()
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        if tolerance:
            torch.testing.assert_close(tensor, others[name], **tolerance)
        else:
            assert torch.equal(tensor, others[name]), name


def check_same_run(run: Path, expected: Path) -> None:
    """That two runs came to the same bits: weights, the best ones too, losses and validations."""
    for file in (WEIGHTS, BEST):
        check_weights(run / file, expected / file)
    for column in ("train_bpb", "val_bpb", "val_sample_bpb"):
        assert curve(run, column) == curve(expected, column), column


def checkpoint_step(run: Path) -> int:
    """The step that the run's last.ckpt was written after, 0 where there is none yet."""
    from demo.training.run import Run

    state = Run(run).read_state()
    return 0 if state is None else state["global_step"]


def write_checkpoint(
    folder: Path, model: str, seed: int = 0, sharp: float = 1, tokenizer: Tokenizer | None = None
) -> torch.nn.Module:
    """An untrained model and its files, as train.py writes them; with `sharp` far above 1 no two
    tokens are as likely."""
    config = compose("train", [f"model={model}", *SMALL])
    if tokenizer is not None:
        config.model = replace(config.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(seed)
    language_model = LanguageModel(config.model).eval()
    with torch.no_grad():
        language_model.embedding.weight.mul_(sharp)
    folder.mkdir(parents=True)
    save_config(folder, config)
    save_weights(folder, language_model.state_dict())
    if tokenizer is not None:
        tokenizer.save(folder)
    return language_model


def run(script: str, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python <script>.py <arguments>`, which
    runs in this process."""
    main, code = importlib.import_module(script).main, 0
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", [f"{script}.py", *arguments]),
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
    ):
        try:
            main()
        except SystemExit as left:
            code = left.code
    for stream in (out, err):
        stream.seek(0)
    return code, out.read(), err.read()

"""Small runs and untrained checkpoints, and the commands run in this process."""

import csv
import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from demo.checkpoints.checkpoint import build_model, save_config, save_weights
from demo.checkpoints.tokenizer import Tokenizer
from demo.config.command import compose

SMALL = ["model.hidden_size=32", "model.num_layers=2", "model.head_dim=16"]
FEW_STEPS = [  # of train.py, in seconds
    *("optim.steps=6", "optim.batch_size=2", "optim.warmup_steps=0"),
    *("data.sequence_length=32", "data.val_tokens=256", "trainer.accelerator=cpu"),
]
SIX_STEPS = [*SMALL, *FEW_STEPS]
TWELVE_STEPS = [  # on more rows
    *SIX_STEPS,
    *("optim.steps=12", "optim.batch_size=4", "optim.warmup_steps=3", "data.val_tokens=2000"),
]
STOPPABLE = [*TWELVE_STEPS, "model=mamba2", "trainer.checkpoint_every=4"]


class Stop(Exception):
    """Stands for the plug being pulled."""


def train_until(batch: int, config, monkeypatch) -> Path:
    """Train, and die in the middle of a step. Returns the run, the only one in its folder."""
    from demo.training import lit  # takes seconds

    training_step = lit.LitLanguageModel.training_step

    def dies(self, tokens, index):
        if index == batch:
            raise Stop
        return training_step(self, tokens, index)

    with monkeypatch.context() as patch:
        patch.setattr(lit.LitLanguageModel, "training_step", dies)
        with pytest.raises(Stop):
            train.train(config)
    (run,) = Path(config.runs_dir).iterdir()
    return run


def curve(run: Path, column: str = "train_bpb") -> list[float]:
    """What metrics.csv has in a column."""
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def checkpoint_step(run: Path) -> int:
    """The step that the run's last.ckpt was written after, 0 where there is none yet."""
    from demo.training.resume import read_state

    state = read_state(run)
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
    language_model = build_model(config.model, "training").eval()
    with torch.no_grad():
        language_model.embedding.weight.mul_(sharp)
    folder.mkdir(parents=True)
    save_config(folder, config)
    save_weights(folder, language_model.state_dict())
    if tokenizer is not None:
        tokenizer.save(folder)
    return language_model


def run(
    arguments: list[str], monkeypatch, capfd, stdin: bytes = b"", script: str = "infer"
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python <script>.py ...`."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = 0
    try:
        importlib.import_module(script).main()
    except SystemExit as left:
        code = left.code
    return code, *capfd.readouterr()

"""Small untrained checkpoints, and the commands run in this process."""

import importlib
import io
import sys
from pathlib import Path

import torch

from configs.command import compose
from models.checkpoints.checkpoint import build_model, save_config, save_weights

SMALL = ["model.hidden_size=32", "model.num_layers=2", "model.head_dim=16"]
SIX_STEPS = [  # of train.py, in seconds
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.head_dim=16",
    "optim.steps=6",
    "optim.batch_size=2",
    "optim.warmup_steps=0",
    "data.sequence_length=32",
    "data.val_tokens=256",
    "trainer=cpu",
]


def write_checkpoint(folder: Path, model: str, seed: int = 0, sharp: float = 1) -> torch.nn.Module:
    """An untrained model and its files; with `sharp` far above 1 no two tokens are as likely."""
    config = compose("train", [f"model={model}", *SMALL])
    torch.manual_seed(seed)
    language_model = build_model(config.model, "training").eval()
    with torch.no_grad():
        language_model.embedding.weight.mul_(sharp)
    folder.mkdir(parents=True)
    save_config(folder, config)
    save_weights(folder, language_model.state_dict())
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

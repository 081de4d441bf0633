"""The benchmarks of FP8 on a CPU, where they say nothing about speed: their rows and pictures."""

import csv
import sys

from benchmarks import fp8_loss


def test_losses_in_fp8_beside_those_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_loss, "EACH", 1)
    table = tmp_path / "loss.csv"
    options = ["--device", "cpu", "--tiny", "--models", "mamba2", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["fp8_loss", *options, "--out", str(table)])
    fp8_loss.main()
    with table.open() as file:
        rows = list(csv.DictReader(file))
    kinds = [(row["precision"], row["steps"], row["text"]) for row in rows]
    steps = [("1", "training"), ("2", "training"), ("3", "training"), ("3", "held out")]
    assert kinds == [(kind, *step) for step in steps for kind in ("bf16", "fp8_emulated")]
    losses = [float(row["bits_per_byte"]) for row in rows]
    assert losses[4] < losses[0]  # it learns
    ratios = [float(row["to_bf16"]) for row in rows[1::2]]
    assert all(0.99 < ratio < 1.01 for ratio in ratios)
    assert any(ratio != 1 for ratio in ratios)
    assert table.with_suffix(".png").stat().st_size > 1000

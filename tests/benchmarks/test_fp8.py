"""The benchmarks of FP8 on a CPU, where they say nothing about speed: their rows and pictures."""

import csv
import statistics
import sys

import pytest
import torch

from benchmarks import fp8, fp8_loss


def test_output_and_pair_beside_their_peers(tmp_path, monkeypatch):
    """The times are made up, and the calls are not."""
    cases = [
        fp8.Case(8, 128, True, layer_norm=True, strided=True),
        fp8.Case(4, 64, False, "tensorwise", heads=2),
        fp8.Case(4, 128, False, "nvfp4"),
    ]
    found = {"case": "8 x 128 -> 128", "gate": "after", "apart_us": 3.0, "FP8_us": 2.0}
    found["together_us"] = 3.1
    times = {"graph_time": lambda call: len(call()) * 3.0, "ceiling": lambda ways: 4.0}
    for name, value in {**times, "CASES": cases, "PEERS": cases[1:2]}.items():
        monkeypatch.setattr(fp8, name, value)
    monkeypatch.setattr(fp8, "forward_ways", lambda *tensors: tensors)
    monkeypatch.setattr(fp8.linear, "CASES", ((8, 1, 128, 128, True),))
    monkeypatch.setattr(fp8.linear, "measure", lambda *case: found | {"FP8_faster": 1.5})
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    table = tmp_path / "fp8.csv"
    monkeypatch.setattr(sys, "argv", ["fp8", "--device", "cpu", "--out", str(table)])
    fp8.main()
    with table.open() as file:
        pair, alone, beside, narrow = csv.DictReader(file)
    assert (pair["what"], pair["ours_us"], pair["faster"]) == ("pair", "2.0", "1.5")
    assert pair["together_us"] == "3.1"
    assert (alone["case"], alone["ratio"], alone["apart_us"]) == ("8 x 128", "1.5", "")
    assert alone["options"] == "layer norm, bias, sigmoid, z strided"
    assert (narrow["scaling"], narrow["options"]) == ("nvfp4", "")
    assert (beside["case"], beside["compiled_us"], beside["faster"]) == ("4 x 2 x 64", "6.0", "1.0")
    assert table.with_suffix(".png").stat().st_size > 1000


def test_losses_in_fp8_beside_those_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_loss, "EACH", 1)
    table = tmp_path / "loss.csv"
    options = ["--device", "cpu", "--tiny", "--models", "mamba2", "--steps", "3"]
    options += ["--seeds", "4", "5", "--no-times"]
    monkeypatch.setattr(sys, "argv", ["fp8_loss", *options, "--out", str(table)])
    fp8_loss.main()
    with table.open() as file:
        rows = list(csv.DictReader(file))
    kinds = [(row["seed"], row["precision"], row["steps"], row["text"]) for row in rows]
    steps = [("1", "training"), ("2", "training"), ("3", "training"), ("3", "held out")]
    precisions = ("bf16", "fp8_emulated")
    assert kinds == [(seed, kind, *step) for seed in "45" for step in steps for kind in precisions]
    assert not any(row["ms"] for row in rows)
    losses = [float(row["bits_per_byte"]) for row in rows]
    assert losses[4] < losses[0]  # it learns
    assert losses[8] != losses[0]  # from other weights
    ratios = [float(row["to_bf16"]) for row in rows[1::2]]
    assert all(0.99 < ratio < 1.01 for ratio in ratios)
    assert any(ratio != 1 for ratio in ratios)
    found = fp8_loss.summary(rows)
    assert not any(row["ms a step"] for row in found)
    assert [row["seed"] for row in found] == ["4", "5", "mean", "deviation"]
    first, second, mean, deviation = (float(row["bf16"]) for row in found)
    assert first == pytest.approx(statistics.mean(losses[:6:2]), abs=1e-4)
    assert mean == pytest.approx((first + second) / 2, abs=1e-4)
    assert deviation == pytest.approx(abs(first - second) / 2**0.5, abs=2e-4)
    assert table.with_suffix(".png").stat().st_size > 1000

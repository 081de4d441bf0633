"""benchmarks/adoption.py on small sizes: every part makes its rows, and patching keeps the bits."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import adoption, profiles


def rows(folder, *arguments, monkeypatch):
    command = ["adoption", "--device", "cpu", "--tiny", "--rounds", "1", "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    adoption.main()
    with (folder / "adoption.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_model_keeps_its_bits(tmp_path, monkeypatch, capsys):
    table = rows(tmp_path, "--parts", "check", monkeypatch=monkeypatch)
    assert "Traceback" not in capsys.readouterr().err
    same = {(r["model"], r["norm"]): r["value"] for r in table if r["quantity"] == "same_logits"}
    assert same == {(name, norm): "1" for name in adoption.CONFIGS for norm in ("plain", "ours")}
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in table)


@pytest.mark.parametrize("part", ["prefill", "decode", "train"])
def test_every_part_makes_its_rows(part, tmp_path, monkeypatch, capsys):
    table = rows(tmp_path, "--parts", part, "--models", "kimi_linear", monkeypatch=monkeypatch)
    assert "Traceback" not in capsys.readouterr().err
    for norm in ("plain", "ours"):
        figures = {r["quantity"]: float(r["value"]) for r in table if r["norm"] == norm}
        assert figures["wall_ms"] > 0
        # Not one below the other: on a CPU a busy machine makes either longer.
        assert figures["norm_ms"] > 0
        assert figures["gpu_ms"] > 0


def test_time_in_which_a_kernel_runs():
    """Two that overlap, a gap, and one inside another; without one of them."""

    def kernel(name, start, end):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=span)

    spans = [("scan", 0, 30), ("norm", 20, 50), ("scan", 60, 80), ("norm", 65, 70)]
    events = [kernel(*span) for span in spans]
    assert profiles.busy_time("cuda", events, 1) == pytest.approx(70e-3)
    assert profiles.busy_time("cuda", events, 2, without=["norm"]) == pytest.approx(25e-3)


def test_overhead_of_every_door(tmp_path, monkeypatch, capsys):
    table = rows(tmp_path, "--parts", "overhead", monkeypatch=monkeypatch)
    assert "Traceback" not in capsys.readouterr().err
    doors = {row["norm"].split(".")[0] for row in table}
    assert doors >= {"rmsnorm_fn", "fla", "mamba", "sglang", "vllm"}

"""benchmarks/peers.py with our model in the peer's place, and which configurations it chooses."""

import csv
import sys

import pytest
from triton.runtime.autotuner import Autotuner

from benchmarks import peers


def test_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)  # put back what the command replaces
    monkeypatch.setattr(peers, "peer_model", lambda name, config, setup: setup.model(name))
    totals = {"gpu_ms": 3.0, "launches": 1}
    monkeypatch.setattr(peers.Setup, "profile", lambda *_: ([], {}, totals))
    out = tmp_path / "peers.csv"
    command = ["peers", "--device", "cpu", "--tiny", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--models", "gated_deltanet"])
    peers.main()
    assert "Traceback" not in capsys.readouterr().err
    with out.open() as file:
        rows = {(r["whose"], r["quantity"]): float(r["value"]) for r in csv.DictReader(file)}
    assert rows["ours", "parameters_M"] == rows["peer", "parameters_M"]
    assert rows["ours / peer", "gpu_ratio"] == 1
    ratio = rows["ours", "wall_ms"] / rows["peer", "wall_ms"]
    assert rows["ours / peer", "wall_ratio"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(
    ("choice", "share", "chosen"),
    [
        ("all", None, "abcde"),
        ("first", None, "a"),
        ("last", None, "e"),
        ("all", (1, 3), "be"),
        ("all", (2, 3), "ab"),  # a share of one configuration has another to fall back on
    ],
)
def test_the_configurations(choice, share, chosen, monkeypatch):
    monkeypatch.setattr(Autotuner, "run", lambda self: "".join(self.configs))
    peers.choose_configs(choice, share)
    tuner = Autotuner.__new__(Autotuner)
    tuner.configs = list("abcde")
    assert tuner.run() == tuner.run() == chosen

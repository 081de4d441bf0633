"""benchmarks/ranks.py on a CPU, where it says nothing about speed: every way is a norm."""

import csv
import sys

import pytest

from benchmarks import ranks


@pytest.mark.slow
def test_every_way_is_the_same_norm(tmp_path, monkeypatch, capfd):
    small = ["--device", "cpu", "--rows", "16", "--width", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["ranks", *small, "--out", str(tmp_path / "ranks.csv")])
    ranks.main()
    with (tmp_path / "ranks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["gate"] for row in rows] == ["before"] * 6 + ["after"] * 6
    assert all(float(row["eager_us"]) > 0 and row["commit"] for row in rows)
    errors = {row["way"]: row["error"] for row in rows}
    assert [way for way, error in errors.items() if error] == list(errors)[:3]
    assert capfd.readouterr().out.count(", aim ") == 4

"""benchmarks/exactness.py on a few tokens: its rows, the zeros of the exact mode, the picture."""

import csv
import sys

from benchmarks import exactness


def test_the_rows_and_the_picture(tmp_path, monkeypatch):
    arguments = ["--device", "cpu", "--parts", "gap", "--models", "mamba2", "--dtype", "bf16"]
    arguments += ["--rollouts", "1", "--new-tokens", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["exactness", *arguments])
    exactness.main()
    with (tmp_path / "exactness_cpu.csv").open() as file:
        rows = {(row["mode"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows["exact", "logits_compared"] == 4 * 256
    assert rows["exact", "logits_different"] == rows["exact", "log_prob_difference"] == 0
    assert rows["default", "logits_different"] > 0
    ratios = tmp_path / "exactness_ratios_cpu.csv"
    assert len(ratios.read_text().splitlines()) == 1 + 2 * 4
    monkeypatch.setattr(sys, "argv", ["exactness", "--draw", str(ratios)])
    exactness.main()
    assert ratios.with_suffix(".png").stat().st_size > 1000

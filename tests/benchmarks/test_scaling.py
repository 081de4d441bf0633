"""benchmarks/scaling.py on a CPU, where it says nothing about speed: it runs, and counts right."""

import csv
import os
import subprocess
import sys

import pytest

from benchmarks import scaling


@pytest.mark.slow
def test_two_processes_beside_one(tmp_path):
    small = ["size=mamba2_small", "trainer.accelerator=cpu", "data.sequence_length=32"]
    short = ["--models", "mamba2", "--seconds", "0.1", "--rows", "1", "--out", "scaling.csv"]
    subprocess.run(
        [sys.executable, scaling.__file__, *short, *small],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    with (tmp_path / "scaling.csv").open() as file:
        one, two = csv.DictReader(file)
    assert (one["processes"], two["processes"]) == ("1", "2")
    assert (one["rows"], two["rows"]) == ("1", "2")
    assert int(two["tokens_per_s"]) > 0
    ratio = int(two["tokens_per_s"]) / int(one["tokens_per_s"])
    assert float(two["times_one_process"]) == pytest.approx(ratio, abs=0.01)

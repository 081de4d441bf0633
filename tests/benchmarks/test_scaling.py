"""benchmarks/scaling.py on a CPU, where it says nothing about speed: it runs, and counts right."""

import csv
import os
import subprocess
import sys

import pytest

from benchmarks import scaling
from demo.config.command import compose
from demo.training.processes import count_parameters


def measure(folder, *options):
    """The rows of the table of small models."""
    small = ["size=mamba2_small", "trainer.accelerator=cpu", "data.sequence_length=32"]
    short = ["--models", "mamba2", "--seconds", "0.1", "--rows", "1", "--out", "scaling.csv"]
    subprocess.run(
        [sys.executable, scaling.__file__, *options, *short, *small],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    with (folder / "scaling.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_beside_one(tmp_path):
    """With a model each, and sharing one."""
    one, ddp, tp = rows = measure(tmp_path, "--strategy", "ddp", "tp")
    found = [(row["strategy"], row["processes"], row["rows"]) for row in rows]
    assert found == [("ddp", "1", "1"), ("ddp", "2", "2"), ("tp", "2", "2")]
    for two in (ddp, tp):
        ratio = int(two["tokens_per_s"]) / int(one["tokens_per_s"])
        assert float(two["times_one_process"]) == pytest.approx(ratio, abs=0.01)
    config = compose("train", ["model=mamba2"]).model
    assert int(tp["parameters"]) == count_parameters(config)

"""Norm groups over several ranks; what runs on them is in tests/helpers/many_ranks.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gatednorm

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="not in this torch")


@pytest.mark.parametrize(
    "name",
    [
        "quick",
        pytest.param("two", marks=pytest.mark.slow),
        pytest.param("four", marks=pytest.mark.slow),
    ],
)
def test_against_whole_rows(name):
    """Results, gradients, bytes that travel, and what is refused."""
    command = [sys.executable, "tests/helpers/many_ranks.py", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@pytest.mark.parametrize(
    ("make", "first"),
    [
        pytest.param(gatednorm.layernorm_fn, torch.ones(2, 8), id="function"),
        pytest.param(gatednorm.RMSNorm, 8, id="module"),
    ],
)
def test_what_is_no_process_group(make, first):
    with pytest.raises(TypeError, match=r"must be a torch\.distributed\.ProcessGroup .*, got str"):
        make(first, process_group="tp")

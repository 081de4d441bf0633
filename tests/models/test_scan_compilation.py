"""The scans' kernels compile for a GPU that is not here: the interpreter passes by what Triton's
compiler asks of types, and how much memory the code needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import TRITON

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TRITON, reason="needs triton")]


def test_hopper(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "tests/helpers/compile_scans.py", "cuda", "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 10
    for row in rows:
        assert row["shared"] <= 227 * 1024, row
        assert row["spilled"] <= 512, row

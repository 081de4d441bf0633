"""Norm groups over several ranks; what runs on them is in many_ranks.py, dtensor_ranks.py and
gpu_ranks.py of tests/helpers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gatednorm

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="not in this torch")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("many_ranks.py quick", id="quick"),
        pytest.param("many_ranks.py groups", id="groups", marks=pytest.mark.slow),
        pytest.param("many_ranks.py two", id="two", marks=pytest.mark.slow),
        pytest.param("many_ranks.py compiled", id="compiled", marks=pytest.mark.slow),
        pytest.param("many_ranks.py four", id="four", marks=pytest.mark.slow),
        pytest.param("dtensor_ranks.py 2", id="dtensors-2", marks=pytest.mark.slow),
        pytest.param("dtensor_ranks.py 4", id="dtensors-4", marks=pytest.mark.slow),
    ],
)
def test_against_whole_rows(command):
    """Results, gradients, bytes that travel, and what is refused."""
    run(*command.split(), TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_two_gpus():
    """The same over NCCL; CUDA graphs, and a current device that is another rank's."""
    run("gpu_ranks.py")


def run(file: str, *arguments: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tests/helpers/{file}", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
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


def test_a_module_follows_the_world_of_its_day():
    """One that was destroyed is not used again."""
    norm = None
    for _ in range(2):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            world = torch.distributed.group.WORLD
            norm = norm or gatednorm.RMSNorm(4, process_group=world)
            assert norm.process_group is world
            norm(torch.ones(2, 4))
            other = copy.deepcopy(norm)
            other._ranks = [0, 1]  # as one that was saved by two ranks
            with pytest.raises(RuntimeError, match=r"must have the ranks \[0, 1\].* got \[0\]"):
                other(torch.ones(2, 4))
        finally:
            torch.distributed.destroy_process_group()

"""Several processes train what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from demo.checkpoints.checkpoint import load
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.training.processes import Processes, find_processes
from small_runs import TWELVE_STEPS, checkpoint_step, curve

SMALL = [*TWELVE_STEPS, "model=mamba2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train.train(compose("train", [*SMALL, f"runs_dir={folder}"]))


# Standalone: any free port, so that tests on one machine do not meet.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(how: list[str], folder: Path, *overrides: str) -> tuple[str, str]:
    """Train in two processes; what they print, and what they say on standard error."""
    command = [sys.executable, *how, str(Path(train.__file__)), *SMALL]
    done = subprocess.run(
        [*command, "trainer.devices=2", *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        pytest.param(TORCHRUN, "ddp", id="torchrun-ddp", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "fsdp", id="torchrun-fsdp", marks=pytest.mark.slow),
        pytest.param([], "ddp", id="lightning-ddp", marks=pytest.mark.slow),
        pytest.param([], "fsdp", id="lightning-fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(how, strategy, alone, tmp_path):
    out, _ = launch(how, tmp_path, f"trainer={strategy}", "runs_dir=a run (2)")
    assert out.count("validation after") == 1
    (run,) = (tmp_path / "a run (2)").iterdir()
    for column in ("train_bpb", "val_bpb"):
        assert curve(run, column) == pytest.approx(curve(alone.run, column), abs=1e-4)
    for one, other in zip(alone.model.parameters(), load(run).model.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_have_the_loss_curve_of_one(strategy, tmp_path):
    """Over NCCL; a single process on one GPU reads what they leave."""
    exact = ["trainer.accelerator=gpu", "trainer.precision=32-true"]
    one = train.train(compose("train", [*SMALL, *exact, f"runs_dir={tmp_path / 'one'}"]))
    launch(TORCHRUN, tmp_path, f"trainer={strategy}", *exact)
    (run,) = (tmp_path / "runs").iterdir()
    for column in ("train_bpb", "val_bpb"):
        assert curve(run, column) == pytest.approx(curve(one.run, column), abs=2e-3)
    weights = load(run).model.parameters()
    for ours, other in zip(one.model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.detach().cpu(), other, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", [TORCHRUN, []], ids=["torchrun", "lightning"])
def test_a_multirun_in_two_processes_is_compared_once(how, tmp_path):
    sweep = ["-m", "trainer=ddp", "optim.steps=3", "optim.warmup_steps=0", "seed=1,2"]
    out, err = launch(how, tmp_path, *sweep)
    assert "Traceback" not in err
    assert out.count("Runs in runs/") == 1
    (folder,) = tmp_path.glob("runs/compare_*")
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.png"]
    assert len(list(tmp_path.glob("runs/*_mamba2"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_have_the_loss_curve_of_one_process(strategy, alone, tmp_path):
    """Each is an agent of torchrun in a folder of its own, as docs/training.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    agents = []
    for rank in range(2):
        here = tmp_path / f"host{rank}"
        here.mkdir()
        node = ["--nnodes", "2", "--node-rank", str(rank), *address, "--nproc-per-node", "1"]
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *node, train.__file__, *SMALL,
                 f"trainer={strategy}", f"runs_dir={tmp_path / 'shared'}"],
                cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        texts = [agent.communicate(timeout=600) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], texts
    assert [out.count("validation after") for out, _ in texts] == [1, 0]
    (run,) = (tmp_path / "shared").iterdir()
    assert list((tmp_path / "host1").iterdir()) == []
    for column in ("train_bpb", "val_bpb"):
        assert curve(run, column) == pytest.approx(curve(alone.run, column), abs=1e-4)


PATCHED = f"""
import os, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import train
from demo.training import lit
"""
BAD_LOSS = f"""{PATCHED}
loss = lit.LitLanguageModel.loss

def breaks(self, batch):
    bad = self.global_step == 5 and self.global_rank == 1
    return loss(self, batch) * (float("nan") if bad else 1)

lit.LitLanguageModel.loss = breaks
train.main()
"""
DIES = f"""{PATCHED}
step = lit.LitLanguageModel.training_step

def dies(self, batch, index):
    if self.global_step == int(os.environ["DIES_AT"]):
        os._exit(9)
    return step(self, batch, index)

lit.LitLanguageModel.training_step = dies
train.main()
"""


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_two_processes_and_then_in_one(alone, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    overrides = [*SMALL, "trainer.checkpoint_every=4"]
    for dies_at, more in ((6, []), (10, ["resume=auto"])):
        done = subprocess.run(
            [sys.executable, *TORCHRUN, str(script), *overrides, "trainer=fsdp", *more],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DIES_AT": str(dies_at)},
            capture_output=True,
            text=True,
        )
        assert done.returncode
        (run,) = (tmp_path / "runs").iterdir()
        assert checkpoint_step(run) == dies_at // 4 * 4, done.stderr
    resume = ["trainer=cpu", "trainer.strategy=auto", f"runs_dir={tmp_path / 'runs'}"]
    config = compose("train", [*SMALL, "trainer.checkpoint_every=4", *resume, "resume=auto"])
    assert train.train(config).run == run
    assert curve(run, "train_bpb") == pytest.approx(curve(alone.run, "train_bpb"), abs=1e-4)
    for one, other in zip(alone.model.parameters(), load(run).model.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_bad_loss_in_one_process_stops_all_and_one_of_them_says_so(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(BAD_LOSS)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(script), *SMALL, "trainer=ddp"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode
    assert (
        done.stderr.count("the loss must be finite, got nan after step 6 (first at batch 5)") == 1
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes(2, 1, 0)),
        ({"LOCAL_RANK": "1"}, Processes(2, 1, 1)),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "6", "LOCAL_RANK": "2"},
            Processes(4, 2, 6),
        ),
    ],
)
def test_who_am_i(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (
        find_processes(compose("train", ["trainer=ddp", "trainer.devices=2", "optim.batch_size=8"]))
        == expected
    )
    assert expected.count == expected.devices * expected.hosts


def test_tasks_of_slurm_are_not_taken_for_one_process_each(monkeypatch):
    config = compose("train", ["trainer=ddp"])
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match="must be started by torchrun, got the 4 tasks"):
        find_processes(config)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_NAME", "bash")  # a shell in the job
        assert find_processes(config) == Processes(1, 1, 0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", "1")
    assert find_processes(config) == Processes(2, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.devices=2"], "trainer.strategy must be ddp or fsdp"),
        (["trainer=ddp", "trainer.devices=3"], "optim.batch_size must be a multiple"),
        (["trainer.accumulate=3"], "a multiple of the number of processes times trainer.accum"),
    ],
)
def test_processes_that_cannot_share(overrides, says):
    with pytest.raises(ConfigError, match=says):
        find_processes(compose("train", overrides))

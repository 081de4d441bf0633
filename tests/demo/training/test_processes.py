"""Several processes train what one does."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import train
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.training.processes import Processes, find_processes
from demo.training.run import Run
from small_runs import TWELVE_STEPS, check_curves, checkpoint_step, train_in

SMALL = [*TWELVE_STEPS, "model=mamba2"]


LIGHTNING = []  # starts the second process itself
# Standalone: any free port, so that tests on one machine do not meet.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(how: list[str], folder: Path, *overrides: str, script: str = train.__file__, **env):
    """Train in two processes; what came of the first."""
    return subprocess.run(
        [sys.executable, *how, script, *SMALL, *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        *(pytest.param(TORCHRUN, name, id=f"torchrun-{name}") for name in ("ddp", "fsdp", "tp")),
        *(pytest.param(LIGHTNING, name, id=f"lightning-{name}") for name in ("ddp", "fsdp")),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(how, strategy, undisturbed, tmp_path):
    options = [f"trainer={strategy}", "trainer.devices=2", "runs_dir=a run (2)"]
    done = launch(how, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation after") == 1
    (run,) = (tmp_path / "a run (2)").iterdir()
    check_curves(run, undisturbed.run)


@pytest.mark.slow
def test_two_pairs_of_processes_have_the_loss_curve_of_one(tmp_path):
    """Each pair shares the heads of a Gated DeltaNet, and reads its half of the rows. One process
    can go on, with moments that are those of the whole parameters."""
    small = [
        *TWELVE_STEPS,
        "model=fla",
        "trainer.accumulate=2",
        "trainer.activation_checkpointing=true",
    ]
    one = train_in(tmp_path / "one", *small)
    command = [*TORCHRUN[:-1], "4", train.__file__, *small, "trainer=tp", "trainer.accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)
    (run,) = (tmp_path / "runs").iterdir()
    check_curves(run, one.run)
    ours, theirs = (Run(folder).read_state() for folder in (run, one.run))
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    for index, moments in theirs["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(
                ours["state"][index][name], tensor, rtol=1e-3, atol=1e-3 * tensor.abs().max().item()
            )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
def test_two_gpus_have_the_loss_curve_of_one(strategy, tmp_path):
    """Over NCCL; a single process on one GPU reads what they leave."""
    exact = ["trainer.accelerator=gpu", "trainer.precision=32-true"]
    one = train_in(tmp_path / "one", *SMALL, *exact)
    done = launch(TORCHRUN, tmp_path, f"trainer={strategy}", "trainer.devices=2", *exact)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    check_curves(run, one.run, within=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", [TORCHRUN, LIGHTNING], ids=["torchrun", "lightning"])
def test_a_multirun_in_two_processes_is_compared_once(how, tmp_path):
    sweep = ["-m", "trainer=ddp", "trainer.devices=2", "seed=1,2"]
    done = launch(how, tmp_path, *sweep, "optim.steps=3", "optim.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("Runs in runs/") == 1
    (folder,) = tmp_path.glob("runs/compare_*")
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.png"]
    assert len(list(tmp_path.glob("runs/*_mamba2*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_have_the_loss_curve_of_one_process(strategy, undisturbed, tmp_path):
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
    check_curves(run, undisturbed.run)


PATCHED = f"""
import os, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import train
from demo.training.module import LitLanguageModel

loss = LitLanguageModel.loss

def breaks(self, batch):
    if self.training and self.global_step == int(os.environ["STEP"]):
        if os.environ["HOW"] == "die":
            os._exit(9)
        if self.global_rank == 1:
            return loss(self, batch) * float("nan")
    return loss(self, batch)

LitLanguageModel.loss = breaks
train.main()
"""


@pytest.fixture
def breaks(tmp_path):
    """train.py, but in step $STEP it dies, or the second process has a bad loss."""
    script = tmp_path / "breaks.py"
    script.write_text(PATCHED)
    return str(script)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_a_sharded_run_goes_on_in_two_processes_and_then_in_one(
    strategy, undisturbed, breaks, tmp_path
):
    options = [f"trainer={strategy}", "trainer.checkpoint_every=4"]
    for step, more in ((6, []), (10, ["resume=auto"])):
        done = launch(TORCHRUN, tmp_path, *options, *more, script=breaks, HOW="die", STEP=str(step))
        assert done.returncode
        (run,) = (tmp_path / "runs").iterdir()
        assert checkpoint_step(run) == step // 4 * 4, done.stderr
    one = ["trainer=cpu", "trainer.strategy=auto", "trainer.checkpoint_every=4", "resume=auto"]
    assert train_in(tmp_path / "runs", *SMALL, *one).run == run
    check_curves(run, undisturbed.run)


@pytest.mark.slow
def test_a_bad_loss_in_one_process_stops_all_and_one_of_them_says_so(breaks, tmp_path):
    done = launch(TORCHRUN, tmp_path, "trainer=ddp", script=breaks, HOW="nan", STEP="5")
    assert done.returncode
    says = "the loss must be finite, got nan after step 6 (first at batch 5)"
    assert done.stderr.count(says) == 1


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
    config = compose("train", ["trainer=ddp", "trainer.devices=2", "optim.batch_size=8"])
    assert find_processes(config) == expected
    assert expected.count == expected.devices * expected.hosts


def test_who_reads_what(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    config = compose("train", ["trainer=tp", "trainer.devices=6", "optim.batch_size=6"])
    found = find_processes(config)
    assert (found.reader, found.readers) == (2, 3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer=tp", "exact=true"], "exact=true needs trainer.tensor_parallel=1, got 2"),
        (["trainer=tp", "trainer.strategy=fsdp"], "must be 1 with trainer.strategy=fsdp, got 2"),
    ],
)
def test_what_does_not_go_with_shared_heads(overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose("train", overrides)


def test_heads_that_cannot_be_shared_are_one_line_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    says = "trainer.tensor_parallel: num_v_heads must be a multiple of the number of ranks, got 3"
    with pytest.raises(ConfigError, match=says):
        train_in(tmp_path, *TWELVE_STEPS, "trainer=tp", "model.num_heads=3")
    assert list(tmp_path.iterdir()) == []


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
        (
            ["trainer=tp"],
            "trainer.tensor_parallel must divide the number of processes, got 2 for 1",
        ),
        (
            ["trainer=tp", "trainer.devices=6", "optim.batch_size=4"],
            "must be a multiple of the number of processes over trainer.tensor_parallel=2, got 4",
        ),
    ],
)
def test_processes_that_cannot_share(overrides, says):
    with pytest.raises(ConfigError, match=says):
        find_processes(compose("train", overrides))


@pytest.mark.slow
@pytest.mark.parametrize("how", [TORCHRUN, LIGHTNING], ids=["torchrun", "lightning"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_stops_all_processes_after_the_same_step(number, how, tmp_path):
    """Ctrl-C goes to all processes of a terminal, and torchrun sends it to its own once more."""
    options = ["trainer=ddp", "trainer.devices=2", "optim.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, *how, train.__file__, *SMALL, *options, "trainer.checkpoint_every=100000"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        while not any("\n0,2," in f.read_text() for f in tmp_path.glob("runs/*/metrics.csv")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (run,) = tmp_path.glob("runs/*")
    says = f"stopped after step {checkpoint_step(run)}; go on with: python train.py resume=runs/"
    assert err.count(says) == 1
    assert checkpoint_step(run) > 2
    if how is LIGHTNING:
        assert (process.returncode, err.count("\n")) == (128 + number, 2)
    else:  # the one trace is that of torchrun, which tells its own caller of the signal
        assert err.count("Traceback") == err.count("SignalException: Process") == 1

"""What this machine cannot do is one line: too few devices, a precision, too little memory."""

import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from demo.config.command import compose
from demo.config.errors import ConfigError, RunError
from demo.training import processes, trainer
from demo.training.module import LitLanguageModel
from demo.training.processes import (
    Processes,
    check_devices,
    check_memory,
    count_parameters,
    host_memory,
)
from models.language_model import LanguageModel
from small_runs import SIX_STEPS, train_in

ALONE = Processes(1, 1, 0)


@pytest.mark.parametrize(
    ("gpus", "overrides", "says"),
    [
        (0, ["trainer=gpu"], "must be one that this machine has, got gpu without a CUDA device"),
        (2, ["trainer=ddp", "trainer.devices=3"], r"devices must be at most .*, 2, got 3"),
        (1, ["trainer=gpu", "trainer.devices=2"], r"devices must be at most .*, 1, got 2"),
        (2, ["trainer=fsdp", "trainer.precision=16-mixed"], "with trainer.strategy=fsdp, got 16"),
        (0, ["trainer.precision=16-mixed"], "on a CPU, got 16-mixed"),
        (1, ["trainer=cpu", "trainer.precision=16-mixed"], "on a CPU, got 16-mixed"),
        (2, ["trainer=ddp", "trainer.devices=2", "trainer.precision=16-mixed"], None),
        (2, ["trainer=fsdp", "trainer.devices=2", "trainer.precision=bf16-mixed"], None),
        (1, ["trainer=cpu", "trainer.strategy=ddp", "trainer.devices=4"], None),
        (0, ["trainer.norm_linear_precision=fp8"], r"CUDA 12\.9 and PyTorch 2\.10, got cpu and"),
        (1, ["trainer.norm_linear_precision=fp8"], r"got compute capability 8\.0 and PyTorch"),
        (0, ["trainer.norm_linear_precision=fp8_emulated"], None),
    ],
)
def test_what_the_devices_cannot_do_is_refused(gpus, overrides, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    config = compose("train", overrides).trainer
    if says is None:
        check_devices(config)
        return
    with pytest.raises(ConfigError, match=says) as error:
        check_devices(config)
    assert "\n" not in str(error.value)


def test_torchrun_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = compose("train", ["trainer=ddp", "trainer.devices=2"]).trainer
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_devices(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"devices must be at most .*, 1, got 4"):
        check_devices(config)


@pytest.mark.parametrize(("strategy", "mode"), [("auto", True), ("ddp", True), ("fsdp", False)])
def test_fsdp_validates_outside_of_inference_mode(strategy, mode):
    """Over NCCL, what it gathers there is kept and autograd refuses it; Lightning turns the mode
    off by itself over gloo, so that no run on CPUs would tell."""
    config = compose("train", [f"trainer.strategy={strategy}", "trainer.accelerator=cpu"])
    built, _ = trainer.build_trainer(config, ALONE, LanguageModel(config.model))
    assert built.validate_loop.inference_mode is mode


def test_a_trainer_that_cannot_be_built_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fails(**_):
        raise MisconfigurationException("no such thing\nas this")

    monkeypatch.setattr(trainer.L, "Trainer", fails)
    with pytest.raises(ConfigError, match=r"trainer must be one .* got 'no such thing'; change"):
        train_in(tmp_path, *SIX_STEPS)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("model", ["fla", "mamba2"])
@pytest.mark.parametrize("more", [[], ["model.mlp_ratio=4", "model.tie_embeddings=false"]])
def test_parameters_are_counted_without_the_model(model, more):
    config = compose("train", [f"model={model}", "model.num_layers=3", *more]).model
    assert count_parameters(config) == LanguageModel(config).num_parameters()


@pytest.mark.parametrize(
    ("mib", "gpu", "overrides", "processes", "fits"),
    [  # 568,000 parameters: 2.2 MiB of weights, 8.7 MiB with gradients and optimiser
        (8, False, [], ALONE, False),
        (9, False, [], ALONE, True),
        (9, False, ["trainer=ddp"], Processes(2, 1, 0), False),
        (9, False, ["trainer=fsdp"], Processes(2, 1, 0), True),
        (9, False, ["trainer=ddp"], Processes(1, 2, 0), True),
        (8, False, ["trainer=tp"], Processes(2, 1, 0, 2), False),
        (9, False, ["trainer=tp"], Processes(2, 1, 0, 2), True),
        (2, True, [], ALONE, False),
        (3, True, [], ALONE, True),
        (math.inf, False, [], ALONE, True),
    ],
)
def test_parameters_that_the_host_has_no_memory_for(
    mib, gpu, overrides, processes, fits, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("demo.training.processes.host_memory", lambda: mib * 2**20)
    config = compose("train", overrides)
    if fits:
        check_memory(config, processes)
        return
    says = rf"model=fla must fit in the memory of this host, {mib / 1024:.1f} GiB, got 568,"
    with pytest.raises(ConfigError, match=says):
        check_memory(config, processes)


def test_a_container_has_what_its_limit_says(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(processes, "CONTAINER_LIMIT", limit)
    whole = host_memory()
    assert whole > 2**28
    for text, expected in (("max\n", whole), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert host_memory() == expected


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nMore"), "CUDA out"),
        (RuntimeError("[at CPUAllocator.cpp:1] . DefaultCPUAllocator: not enough"), "DefaultCPU"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("something else"), None),
    ],
    ids=["cuda", "cpu", "python", "another"],
)
def test_no_memory_left_in_a_step_is_one_line(error, says, tmp_path, monkeypatch):
    def fails(self, batch):
        raise error

    monkeypatch.setattr(LitLanguageModel, "loss", fails)
    with pytest.raises((RunError, RuntimeError)) as found:
        train_in(tmp_path, *SIX_STEPS)
    if says is None:
        assert found.value is error
        return
    assert str(found.value).startswith(f"training must fit in memory, got '{says}")
    assert "\n" not in str(found.value)

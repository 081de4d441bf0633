"""What does not fit in memory is said in one line, where it is certain before any work."""

import math
import sys
from dataclasses import replace

import pytest
import torch

import train
from demo.checkpoints.checkpoint import build_model
from demo.config.command import compose
from demo.config.errors import ConfigError, RunError
from demo.training import lit, memory
from demo.training.memory import check_batch, check_model, count_parameters, host_memory
from demo.training.processes import Processes
from small_runs import SIX_STEPS

ALONE = Processes(1, 1, 0)


@pytest.mark.parametrize("model", ["fla", "mamba2"])
@pytest.mark.parametrize("more", [[], ["model.mlp_ratio=4", "model.tie_embeddings=false"]])
@pytest.mark.parametrize("layers", [1, 3])
def test_parameters_are_counted_without_the_model(model, more, layers):
    config = compose("train", [f"model={model}", f"model.num_layers={layers}", *more]).model
    assert count_parameters(config) == build_model(config, "training").num_parameters()


@pytest.mark.parametrize(
    ("model", "value"),
    [
        *(("fla", f"model.{key}") for key in ("hidden_size=1000000000", "num_layers=1000000000")),
        *(("fla", f"model.{key}") for key in ("vocab_size=10000000000", "mlp_ratio=1e300")),
        *(
            ("mamba2", f"model.{key}")
            for key in ("d_state=1" + "0" * 9, "hidden_size=1" + "0" * 30)
        ),
        ("mamba2", "model.conv_size=1" + "0" * 12),
    ],
)
def test_sizes_that_no_machine_has_are_one_line(model, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", f"model={model}", value])
    with pytest.raises(SystemExit) as left:
        train.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert err.startswith(f"train.py: error: model={model} must ")
    assert f"; lower one of {value.partition('=')[0]}=" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "gpu", "overrides", "processes", "says"),
    [
        # 568,000 parameters: 2.2 MiB of weights, 8.7 MiB to train them
        (6, None, [], ALONE, "this host, 6.0 MiB, got .* parameters, 8.7 MiB with"),
        (10, None, [], ALONE, "whose logits alone take 2.0 MiB"),
        (11, None, [], ALONE, None),
        (11, None, ["trainer=ddp"], Processes(2, 1, 0), r"17\.3 MiB with"),
        (14, None, ["trainer=fsdp"], Processes(2, 1, 0), None),
        (14, None, ["trainer=fsdp"], Processes(2, 2, 0), None),
        (4, None, ["trainer=fsdp"], Processes(2, 2, 0), r"4\.3 MiB with"),
        (1, 99, [], ALONE, "this host, 1.0 MiB, got .* parameters, 2.2 MiB"),
        (3, 8, [], ALONE, "a GPU, 8.0 MiB, got"),
        (3, 10, [], ALONE, "whose logits alone take 2.0 MiB"),
        (3, 10, ["trainer.accumulate=2"], ALONE, None),
        (math.inf, 10, ["trainer=fsdp"], Processes(2, 1, 0), None),
    ],
)
def test_what_training_needs_in_any_case(host, gpu, overrides, processes, says, monkeypatch):
    class Properties:
        total_memory = (gpu or 0) * 2**20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(memory, "host_memory", lambda: host * 2**20)
    monkeypatch.setattr(memory, "_gib", lambda size: f"{size / 2**20:.1f} MiB")
    config = compose("train", overrides)

    def check():
        check_model(config, processes)
        check_batch(config, processes)

    if says is None:
        check()
    else:
        with pytest.raises(ConfigError, match=says):
            check()


def test_a_container_has_what_its_limit_says(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", limit)
    whole = host_memory()
    assert whole > 2**28
    limit.write_text("max\n")
    assert host_memory() == whole
    limit.write_text("1048576\n")
    assert host_memory() == 2**20


def test_a_batch_that_does_not_fit_is_one_line(tmp_path):
    config = compose("train", [*SIX_STEPS, f"runs_dir={tmp_path}"])
    config = replace(config, optim=replace(config.optim, batch_size=10**9))
    with pytest.raises(ConfigError, match=r"optim\.batch_size must be of rows that fit in the mem"):
        train.train(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee more"),
        RuntimeError("[enforce fail at CPUAllocator.cpp:1] . DefaultCPUAllocator: can't allocate"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_left_in_a_step_is_one_line(error, tmp_path, monkeypatch):
    def fails(self, batch):
        raise error

    config = compose("train", [*SIX_STEPS, f"runs_dir={tmp_path}"])
    monkeypatch.setattr(lit.LitLanguageModel, "loss", fails)
    with pytest.raises(RunError, match=r"training must fit in memory, got .*; raise") as found:
        train.train(config)
    assert "\n" not in str(found.value)


def test_other_errors_are_not_about_memory(tmp_path, monkeypatch):
    def fails(self, batch):
        raise RuntimeError("something else")

    monkeypatch.setattr(lit.LitLanguageModel, "loss", fails)
    with pytest.raises(RuntimeError, match="something else"):
        train.train(compose("train", [*SIX_STEPS, f"runs_dir={tmp_path}"]))

"""Whether a training fits in memory: said before any work where that is certain, or in a line."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from demo.checkpoints.checkpoint import build_model
from demo.config.errors import ConfigError, RunError
from demo.config.schema import TrainConfig, model_name
from demo.training.processes import Processes, on_gpu
from models.config import ModelConfig

# Bytes for a parameter, fp32 whatever the precision; with its gradient and AdamW's two moments; and
# for a logit, which the loss has twice.
WEIGHT, TRAINED, LOGIT = 4, 16, 8

HOST = "this host"
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_model(config: TrainConfig, processes: Processes) -> None:
    """Raises ConfigError when the parameters, or these with their gradients and the optimiser, are
    more than the memory that there is."""
    for where, memory, weights in _weights(config, processes):
        if weights > memory:
            raise ConfigError(
                f"model={model_name(config.model)} must fit in the memory of {where}, "
                f"{_gib(memory)}, got {count_parameters(config.model):,} parameters, "
                f"{_gib(weights)} with what training adds to them; lower one of {_sizes(config.model)}, or spread it over more "
                "machines with trainer=fsdp"
            )


def check_batch(config: TrainConfig, processes: Processes) -> None:
    """As `check_model`, for the logits of a batch beside that. What the blocks keep comes on top,
    so that a training that passes may still not fit."""
    optim, parts = config.optim, config.trainer.accumulate
    rows = optim.batch_size // (parts * processes.count)
    logits = LOGIT * rows * config.data.sequence_length * config.model.vocab_size
    where, memory, weights = list(_weights(config, processes))[-1]
    if where == HOST:
        logits *= processes.devices
    if weights + logits > memory:
        raise ConfigError(
            f"optim.batch_size must be of rows that fit in the memory of {where}, {_gib(memory)}, "
            f"got {optim.batch_size}, whose logits alone take {_gib(logits)}; lower it, or raise "
            f"trainer.accumulate={parts}"
        )


def _weights(config: TrainConfig, processes: Processes) -> Iterator[tuple[str, float, float]]:
    """Where what belongs to the parameters lies, how many bytes there are, and how many it takes;
    last where training is done."""
    parameters, here = count_parameters(config.model), processes.devices
    built = WEIGHT * parameters * here  # each process has all of them before they are spread
    shards = processes.count if config.trainer.strategy == "fsdp" else 1
    trained = TRAINED * parameters / shards
    if on_gpu(config.trainer):
        yield HOST, host_memory(), built
        yield "a GPU", torch.cuda.get_device_properties(0).total_memory, trained
    else:
        yield HOST, host_memory(), max(built, here * trained)


def count_parameters(config: ModelConfig) -> int:
    """Of the model that `config` describes, without building all of it. Raises ConfigError."""
    try:
        with torch.device("meta"):
            model = build_model(replace(config, num_layers=1), "training")
    except (RuntimeError, ArithmeticError, TypeError) as error:
        raise ConfigError(
            f"model={model_name(config)} must have sizes that a machine can count with, got "
            f"larger ones; lower one of {_sizes(config)}"
        ) from error
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return model.num_parameters() + (config.num_layers - 1) * block


def host_memory() -> float:
    """Bytes that the processes of this host can have, infinite where the system does not say."""
    limits = [math.inf]
    with suppress(AttributeError, OSError, ValueError):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no container, or "max"
        limits.append(int(CONTAINER_LIMIT.read_text()))
    return min(limits)


@contextmanager
def out_of_memory_in_a_line(rank: int) -> Iterator[None]:
    """What runs in it ends with a RunError where a device or the host has no memory left. In a
    process whose errors are not printed it is left as it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if rank or not (full or "DefaultCPUAllocator" in str(error)):
            raise
        first = str(error).partition("\n")[0].rpartition("] . ")[2]
        reason = ". ".join(first.split(". ")[:2]) or type(error).__name__
        raise RunError(
            f"training must fit in memory, got {reason!r}; raise trainer.accumulate, set "
            "trainer.activation_checkpointing=true, or lower optim.batch_size or "
            "data.sequence_length"
        ) from error


def _sizes(config: ModelConfig) -> str:
    """The three largest: what was mistyped is among them."""
    sizes = {name: value for name, value in vars(config).items() if type(value) in (int, float)}
    names = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return ", ".join(f"model.{name}={sizes[name]}" for name in names)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"

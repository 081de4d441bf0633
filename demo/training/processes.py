"""How many processes train together, whether this machine has the devices and the memory for them,
and how they end when it runs out of memory.

torchrun describes the processes in environment variables, before Lightning has started anything; a
process that Lightning's own launcher started for another device of this host has LOCAL_RANK.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from demo.checkpoints.weights import largest_sizes, model_on_meta
from demo.config.command import process_rank
from demo.config.errors import ConfigError, RunError, about
from demo.config.schema import TrainConfig, TrainerConfig, model_name
from gatednorm.linear_fp8 import lacks_products
from models.config import ModelConfig

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Processes:
    """The processes of a training.

    Attributes:
        devices: How many there are on this host.
        hosts: How many hosts have as many.
        rank: Of this process among all of them.
        tensor_parallel: How many neighbours share the heads of each layer, and so read the same.
    """

    devices: int
    hosts: int
    rank: int
    tensor_parallel: int = 1

    @property
    def count(self) -> int:
        return self.devices * self.hosts

    @property
    def readers(self) -> int:
        """How many groups of processes read different rows of a batch."""
        return self.count // self.tensor_parallel

    @property
    def reader(self) -> int:
        """The group of this process among them."""
        return self.rank // self.tensor_parallel


def find_processes(config: TrainConfig) -> Processes:
    """What the environment and `config` say about them. Raises ConfigError when they cannot share
    the batch, or have no strategy for it."""
    if "WORLD_SIZE" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        hosts = int(os.environ["WORLD_SIZE"]) // devices
    else:
        _refuse_slurm()
        devices, hosts = config.trainer.devices, 1
    ranks = config.trainer.tensor_parallel
    found = Processes(devices, hosts, process_rank(), ranks)
    if found.count > 1 and config.trainer.strategy == "auto":
        raise ConfigError(
            f"trainer.strategy must be ddp or fsdp for several processes, got auto for "
            f"{found.count}; use trainer=ddp"
        )
    if found.count % ranks:
        raise ConfigError(
            f"trainer.tensor_parallel must divide the number of processes, got {ranks} for "
            f"{found.count}; start them with torchrun --nproc-per-node {ranks}, or change it"
        )
    parts = config.trainer.accumulate
    if config.optim.batch_size % (found.readers * parts):
        over = f" over trainer.tensor_parallel={ranks}" if ranks > 1 else ""
        over += f" times trainer.accumulate={parts}" if parts > 1 else ""
        raise ConfigError(
            f"optim.batch_size must be a multiple of the number of processes{over}, got "
            f"{config.optim.batch_size} for {found.count}; change one of them"
        )
    return found


def on_gpu(config: TrainerConfig) -> bool:
    """Whether the processes train on GPUs."""
    return config.accelerator != "cpu" and torch.cuda.is_available()


def check_devices(config: TrainerConfig) -> None:
    """Raises ConfigError when this machine does not have the devices that `config` asks for."""
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator must be one that this machine has, got gpu without a CUDA device; "
            "use trainer=cpu or trainer=auto"
        )
    gpu = on_gpu(config)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))  # of torchrun
    if gpu and devices > torch.cuda.device_count():
        raise ConfigError(
            "trainer.devices must be at most the number of CUDA devices of this host, "
            f"{torch.cuda.device_count()}, got {devices}; lower it, or use trainer=cpu"
        )
    if config.norm_linear_precision == "fp8":
        _check_fp8(gpu)
    for where, impossible, remedy in (
        ("on a CPU", not gpu, "trainer=gpu"),
        ("with trainer.strategy=fsdp", config.strategy == "fsdp", "trainer=ddp"),
        ("with trainer.tensor_parallel", config.tensor_parallel > 1, "trainer=ddp"),
    ):
        if config.precision == "16-mixed" and impossible:
            raise ConfigError(
                f"trainer.precision must be 32-true or bf16-mixed {where}, got 16-mixed; "
                f"use one of them, or {remedy}"
            )


def _check_fp8(gpu: bool) -> None:
    """Raises ConfigError where no GPU multiplies blocks of FP8."""
    found = lacks_products(torch.device("cuda" if gpu else "cpu"))
    if found is None and hasattr(torch.nn.functional, "scaled_mm"):
        return
    raise ConfigError(
        "trainer.norm_linear_precision=fp8 needs an H100 or H200 (compute capability 9.0), CUDA "
        f"12.9 and PyTorch 2.10, got {found or 'such a GPU'} and PyTorch {torch.__version__}; use "
        "fp8_emulated, which multiplies the same values in fp32"
    )


def _refuse_slurm() -> None:
    """Raises ConfigError in a process that srun started beside others: each would take itself for
    the only one. Lightning tells srun from a shell inside a job by the job's name, and so does
    this."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1 and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        raise ConfigError(
            f"processes must be started by torchrun, got the {tasks} tasks of a SLURM job; start "
            "one task on each host (--ntasks-per-node=1), with srun torchrun --nnodes ..."
        )


# --------------------------------------------------------------------------------------- memory


def check_memory(config: TrainConfig, processes: Processes) -> None:
    """Raises ConfigError when the parameters alone need more than this host's memory, where a
    mistyped size would make it swap until somebody kills the process."""
    model = config.model
    parameters = count_parameters(model)
    # Each process builds all of them in fp32. On a CPU their gradients and AdamW's two moments come
    # on top, unless FSDP spreads these over the processes; or of its share the four.
    alone = not on_gpu(config.trainer) and config.trainer.strategy != "fsdp"
    each = max(4, 16 / processes.tensor_parallel) if alone else 4
    needed = parameters * processes.devices * each
    if needed > (memory := host_memory()):
        raise ConfigError(
            f"model={model_name(model)} must fit in the memory of this host, "
            f"{memory / 2**30:,.1f} GiB, got {parameters:,} parameters, which need "
            f"{needed / 2**30:,.1f} GiB; lower one of {largest_sizes(model)}"
        )


def count_parameters(config: ModelConfig) -> int:
    """Of the model that `config` describes, of which it builds one block. Raises ConfigError."""
    with about(f"model={model_name(config)}"):
        model = model_on_meta(replace(config, num_layers=1))
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return model.num_parameters() + (config.num_layers - 1) * block


def host_memory() -> float:
    """Bytes that the processes of this host can have, infinite where the system does not say."""
    limits = [math.inf]
    with suppress(OSError, ValueError):  # not on every system
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no container, or "max"
        limits.append(int(CONTAINER_LIMIT.read_text()))
    return min(limits)


@contextmanager
def ends_in_a_line(rank: int) -> Iterator[None]:
    """Turn running out of memory into a RunError. Processes other than the first, whose errors are
    not printed as one line, keep it as it is."""
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

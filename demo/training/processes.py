"""How many processes train together, and which of them this is, before Lightning has said so.

torchrun says it in environment variables; a process that Lightning's own launcher started for
another device of this host has LOCAL_RANK.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from demo.config.errors import ConfigError
from demo.config.schema import TrainConfig, TrainerConfig


@dataclass(frozen=True)
class Processes:
    """devices: on this host; hosts: how many; rank: of this process among all."""

    devices: int
    hosts: int
    rank: int

    @property
    def count(self) -> int:
        return self.devices * self.hosts


def find_processes(config: TrainConfig) -> Processes:
    """Raises ConfigError when they cannot share the batch, or have no strategy for it."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        hosts = int(os.environ["WORLD_SIZE"]) // devices
        found = Processes(devices, hosts, int(os.environ["RANK"]))
    else:
        _refuse_slurm()
        found = Processes(config.trainer.devices, 1, local_rank)
    if found.count > 1 and config.trainer.strategy == "auto":
        raise ConfigError(
            f"trainer.strategy must be ddp or fsdp for several processes, got auto for "
            f"{found.count}; use trainer=ddp"
        )
    parts = config.trainer.accumulate
    if config.optim.batch_size % (found.count * parts):
        times = f" times trainer.accumulate={parts}" if parts > 1 else ""
        raise ConfigError(
            f"optim.batch_size must be a multiple of the number of processes{times}, got "
            f"{config.optim.batch_size} for {found.count}; change one of them"
        )
    return found


def on_gpu(config: TrainerConfig) -> bool:
    """Whether the processes train on GPUs."""
    return config.accelerator != "cpu" and torch.cuda.is_available()


def check_devices(config: TrainerConfig) -> None:
    """Raises ConfigError when this machine has not the devices or packages that `config` asks
    for."""
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
    if config.precision == "16-mixed" and not gpu:
        raise ConfigError(
            "trainer.precision must be 32-true or bf16-mixed on a CPU, got 16-mixed; "
            "use one of them, or trainer=gpu"
        )
    if config.precision == "16-mixed" and config.strategy == "fsdp":
        raise ConfigError(
            "trainer.precision must be 32-true or bf16-mixed with trainer.strategy=fsdp, got "
            "16-mixed; use one of them, or trainer=ddp"
        )
    if config.tensorboard and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ConfigError(
            "trainer.tensorboard needs the package tensorboard, got true without it; "
            "pip install tensorboard, or leave it out: metrics.csv has the same numbers"
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

"""How many processes train together, and which of them this is, before Lightning has said so.

torchrun says it in environment variables; a process that Lightning's own launcher started for
another device of this host has LOCAL_RANK.
"""

import os
from dataclasses import dataclass

from configs.schema import ConfigError, TrainConfig


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

"""Where infer.py has its model: on one device, or under torchrun on those of several processes
which share its heads. Then each computes the same text, and the first one prints it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

from demo.config.command import process_count, process_rank
from demo.config.errors import ConfigError, about
from models.language_model import LanguageModel
from models.tensor_parallel import TensorParallel, check_ranks


@contextmanager
def on_devices(model: LanguageModel, asked: str) -> Iterator[None]:
    """`model` on the device that is `asked` for, auto, cpu or cuda, or the part of it that is this
    process's. Raises ConfigError."""
    gpu = torch.cuda.is_available()
    if asked == "cuda" and not gpu:
        raise ConfigError("device must be one that torch can use, got cuda; use device=cpu")
    gpu, processes = gpu and asked != "cpu", process_count()
    if processes == 1:
        model.to("cuda" if gpu else "cpu")
        yield
        return
    with about("torchrun"):
        check_ranks(model, processes)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if here > torch.cuda.device_count():
            raise ConfigError(
                "torchrun must start a process for each CUDA device of this host, "
                f"{torch.cuda.device_count()} at most, got {here}; start fewer, or use device=cpu"
            )
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        TensorParallel(model, dist.group.WORLD)
        model.to(device)
        if process_rank() == 0:
            yield
        else:
            with open(os.devnull, "w") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
                yield
    finally:
        dist.destroy_process_group()

"""One process a rank, each running the same checks.

Over gloo it is forked from one that has imported torch and computed nothing, which spares the
imports; over NCCL it is spawned. After a check that fails on every rank the next ones run; one that
fails on some ends the run, since the others may wait for these.
"""

import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import sympy  # noqa: E402, F401 (einops has torch import it: once, not on each rank)

import paths  # noqa: E402, F401 (before anything imports triton)


def device() -> torch.device:
    """Where this rank computes."""
    gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if gpu else torch.device("cpu")


def refused(error: type, text: str, call: Callable) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def _rank(rank: int, size: int, folder: str, checks: list[Callable], backend: str) -> None:
    torch.set_num_threads(1)
    own = torch.device("cuda", rank) if backend == "nccl" else None
    if own is not None:
        torch.cuda.set_device(own)
    store = dist.FileStore(f"{folder}/ranks", size)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, device_id=own,
        timeout=timedelta(minutes=3),
    )  # fmt: skip
    failed = False
    for n, check_it in enumerate(checks):
        start = time.time()
        try:
            check_it()
            says = b"passed"
        except BaseException:
            print(f"rank {rank}, {check_it.__name__}:", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            says = b"FAILED"
            store.set_timeout(timedelta(seconds=10))
        store.set(f"{n} on {rank}", says)
        try:
            everyone = [store.get(f"{n} on {r}") for r in range(size)]
        except RuntimeError:  # they wait for this rank
            everyone = []
        if everyone != [says] * size:
            os._exit(1)
        store.set_timeout(timedelta(minutes=3))
        failed |= says == b"FAILED"
        if rank == 0:
            took = time.time() - start
            name = f"{size} ranks over {backend}: {check_it.__name__}"
            print(f"{name} {says.decode()}, {took:.1f} s", flush=True)
    dist.destroy_process_group()
    sys.exit(failed)


def run_on_ranks(size: int, checks: list[Callable], backend: str = "gloo") -> None:
    """Start the ranks, and exit with 1 where a check fails on any."""
    # A process that has asked for GPUs cannot be forked into ones that use them.
    context = multiprocessing.get_context("spawn" if backend == "nccl" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, size, folder, checks, backend))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            time.sleep(0.02)
        for rank in ranks:  # those that wait for one that has failed
            rank.join(5)
            rank.terminate()
    sys.exit(any(rank.exitcode for rank in ranks))

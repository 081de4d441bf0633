"""Run pytest in a fork of a process that has imported what takes long, once for all."""

import multiprocessing
import os
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["einops", "hypothesis", "numpy", "pytest", "torch"])


def _main(folder: Path, arguments: list[str]) -> None:
    import pytest
    import torch

    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # Under the interpreter also beside a GPU: there a mutant may be in the branch not taken.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Hydra's, of no use here, takes a second.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    torch.set_num_threads(1)
    os.chdir(folder / "tests/gatednorm")
    sys.path.insert(0, str(folder))
    sys.exit(pytest.main(arguments))


def run(folder: Path, arguments: list[str], timeout: float) -> tuple[int, str]:
    """The exit code, negative for a signal, and what was printed."""
    process = CONTEXT.Process(target=_main, args=(folder, arguments))
    process.start()
    process.join(timeout)
    process.kill()
    process.join()
    return process.exitcode, (folder / "output").read_text()

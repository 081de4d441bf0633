"""Runs that were stopped in some step, for what resumes them and what damages them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.config.command import compose
from small_runs import STOPPABLE, train_until


@pytest.fixture(scope="session")
def stopped_runs() -> dict[int, Path]:
    """By the step that they were stopped in, trained once for all tests."""
    return {}


@pytest.fixture
def stopped_run(stopped_runs, tmp_path_factory, tmp_path, monkeypatch) -> Callable[[int], Path]:
    """Puts a run that was stopped in some step into `tmp_path`."""

    def put(step: int) -> Path:
        if step not in stopped_runs:
            runs_dir = tmp_path_factory.mktemp("stopped")
            config = compose("train", [*STOPPABLE, f"runs_dir={runs_dir}"])
            stopped_runs[step] = train_until(step, config, monkeypatch)
        return shutil.copytree(stopped_runs[step], tmp_path / stopped_runs[step].name)

    return put

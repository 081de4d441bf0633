"""Runs that several tests look at, trained once for all of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from small_runs import STOPPABLE, config_in, train_in, train_until


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What a run of `STOPPABLE` comes to that nothing stops."""
    return train_in(tmp_path_factory.mktemp("undisturbed"), *STOPPABLE)


@pytest.fixture(scope="session")
def stopped_runs() -> dict[int, Path]:
    """By the step that they were stopped in."""
    return {}


@pytest.fixture
def stopped_run(stopped_runs, tmp_path_factory, tmp_path, monkeypatch) -> Callable[[int], Path]:
    """Puts a run that was stopped in some step into `tmp_path`."""

    def put(step: int) -> Path:
        if step not in stopped_runs:
            config = config_in(tmp_path_factory.mktemp("stopped"), *STOPPABLE)
            stopped_runs[step] = train_until(step, config, monkeypatch)
        return shutil.copytree(stopped_runs[step], tmp_path / stopped_runs[step].name)

    return put

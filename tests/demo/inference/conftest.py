"""A checkpoint that is decided in what it says, though nobody trained it."""

import pytest

from demo import load
from small_runs import write_checkpoint


@pytest.fixture(scope="session", params=["fla", "mamba2"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_checkpoint(folder, request.param, sharp=12)
    return load(folder)

"""Which route the mixers take on a GPU."""

import pytest
import torch

from models import routes


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(routes, "_chosen", None)
    monkeypatch.delenv("MODELS_TRITON", raising=False)


def test_the_environment_begins_and_use_route_goes_on(monkeypatch):
    monkeypatch.setenv("MODELS_TRITON", "kernels")
    assert routes.route() == "kernels"
    routes.use_route("plain")
    assert routes.route() == "plain"


def test_the_default_is_fused():
    assert routes.route() == "fused"


@pytest.mark.parametrize("where", ["environment", "call"])
def test_another_name_is_refused(where, monkeypatch):
    monkeypatch.setenv("MODELS_TRITON", "1")
    message = r"must be one of plain, kernels, fused, got '1'"
    with pytest.raises(ValueError, match=message):
        routes.route() if where == "environment" else routes.use_route("1")


@pytest.mark.parametrize("name", routes.ROUTES)
def test_a_cpu_has_the_plain_one(name):
    routes.use_route(name)
    x = torch.zeros(1, 1, 16, 2, 16)
    assert routes.gpu_kernels(x) is None
    assert routes.fused_kernels(x) is None

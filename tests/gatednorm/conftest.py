"""A small call of the norm, on both paths, and which kernels are launched."""

import pytest

from gatednorm import cpu
from norm_cases import Case, inputs_of
from paths import TRITON


@pytest.fixture
def small(path):
    def make(
        is_rms_norm=True, norm_before_gate=True, gated=True, weight=True, outer=(6,), **kwargs
    ):
        case = Case(outer, 8, 2, is_rms_norm, norm_before_gate, gated, weight=weight, **kwargs)
        return case, inputs_of(case, path.device)

    return make


@pytest.fixture
def launched(path, monkeypatch) -> list:
    """The launches, forward and backward, of whichever path runs."""
    calls = []
    modules = [cpu]
    if TRITON:
        from gatednorm.kernels import launch

        modules.append(launch)
    for module in modules:
        for name in ("forward", "backward"):
            run = getattr(module, name)

            def counted(*args, run=run, name=name):
                calls.append(name)
                return run(*args)

            monkeypatch.setattr(module, name, counted)
    return calls

"""A small call of the norm, on both paths."""

import pytest

from norm_cases import Case, inputs_of


@pytest.fixture
def small(path):
    def make(is_rms_norm=True, norm_before_gate=True, gated=True, weight=True, **kwargs):
        case = Case((6,), 8, 2, is_rms_norm, norm_before_gate, gated, weight=weight, **kwargs)
        return case, inputs_of(case, path.device)

    return make

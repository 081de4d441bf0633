"""Values and gradients against float64, for every combination of options, sizes, layouts, dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import Case, cases, check, through_autograd, through_buffers

ALL = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@settings(max_examples=150)
@given(data=st.data())
def test_generated(path, data):
    """Values and gradients, inputs untouched, nothing read or written outside of a view."""
    case = data.draw(cases(path.dtypes))
    route = data.draw(st.sampled_from([through_autograd, through_buffers]))
    check(case, path.device, route)

"""SSD against a float64 loop, against transformers' Mamba-2 scan, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from models.ssd import chunk_ssd, recurrent_ssd
from scan_checks import assert_close, make_ssd, results, with_all

FUNCTIONS = {"chunked": chunk_ssd, "recurrent": recurrent_ssd}


def naive(x, dt, A, B, C, D, dt_bias, initial_state, dt_limit):
    """h_t = exp(dt A) h + dt x B^T, y = h C + D x, one head and one token at a time."""
    batch, tokens, heads, _ = x.shape
    groups = B.shape[2]
    rows, finals = [], []
    for b in range(batch):
        for h in range(heads):
            group, state = h * groups // heads, initial_state[b, h]
            for t in range(tokens):
                step = F.softplus(dt[b, t, h] + dt_bias[h]).clamp(*dt_limit)
                write = step * torch.outer(x[b, t, h], B[b, t, group])
                state = (step * A[h]).exp() * state + write
                rows.append(state @ C[b, t, group] + D[h] * x[b, t, h])
            finals.append(state)
    y = torch.stack(rows).view(batch, heads, tokens, -1).transpose(1, 2)
    return y, torch.stack(finals).view_as(initial_state)


CASES = {  # batch, tokens, heads, groups, dim, size
    "T37-H4-G2": (2, 37, 4, 2, 8, 6),
    "T64-H3-G1": (1, 64, 3, 1, 4, 8),
    "T1": (2, 1, 2, 2, 4, 4),
    "T5-below_chunk": (1, 5, 1, 1, 5, 3),
}
LIMITS = {"no_limit": (0.0, float("inf")), "limit": (0.4, 0.9)}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("scan", ["chunk1", "chunk12", "chunk16", "chunk64", "recurrent"])
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_loop(case, scan, limit):
    inputs = make_ssd(*CASES[case])

    def loop(*args, initial_state, output_final_state):
        return naive(*args, initial_state, LIMITS[limit])

    if scan == "recurrent":
        function = with_all(recurrent_ssd, dt_limit=LIMITS[limit])
    else:
        function = with_all(chunk_ssd, dt_limit=LIMITS[limit], chunk_size=int(scan[5:]))
    assert_close(results(function, inputs), results(loop, inputs), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_options(name):
    """No D, no bias, no softplus, no state: dt and A as they are."""
    x, dt, A, B, C, *_ = (t.detach() for t in make_ssd(1, 20, 2, 1, 4, 3))
    dt = dt.abs()
    y, final = FUNCTIONS[name](x, dt, A, B, C)
    inverse_softplus = dt + torch.log(-torch.expm1(-dt))
    zeros = torch.zeros(2, dtype=x.dtype)
    state = torch.zeros(1, 2, 4, 3, dtype=x.dtype)
    expected, _ = naive(x, inverse_softplus, A, B, C, zeros, zeros, state, (0.0, 1e9))
    assert final is None
    assert_close([y], [expected], 1e-12)


@pytest.mark.parametrize("limit", LIMITS)
def test_equals_transformers(limit):
    """Outputs, final states and gradients in fp32, with several groups."""
    inputs = make_ssd(2, 150, 4, 2, 16, 32, dtype=torch.float32)

    def theirs(x, dt, A, B, C, D, dt_bias, initial_state, output_final_state):
        options = {"dt_bias": dt_bias, "dt_softplus": True, "dt_limit": LIMITS[limit]}
        states = {"initial_states": initial_state, "return_final_states": True}
        return mamba2_chunk_scan(x, dt, A, B, C, 64, D=D, **options, **states)

    ours = with_all(chunk_ssd, dt_limit=LIMITS[limit])
    assert_close(results(ours, inputs), results(theirs, inputs), 2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_shapes(name):
    x, dt, A, B, C, *_ = (t.detach() for t in make_ssd(2, 8, 4, 2, 4, 3))
    function = FUNCTIONS[name]
    with pytest.raises(ValueError, match="with the same B and T"):
        function(x[:, :7], dt, A, B, C)
    with pytest.raises(ValueError, match="got 4 heads and 3 groups"):
        function(x, dt, A, *(torch.zeros(2, 8, 3, 3),) * 2)
    with pytest.raises(ValueError, match=r"dt must be \[B, T, H\]"):
        function(x, dt[..., :2], A, B, C)
    with pytest.raises(ValueError, match=r"A must be \[H\]"):
        function(x, dt, A[:3], B, C)
    with pytest.raises(ValueError, match="got batch size 2"):
        function(x, dt, A, B, C, cu_seqlens=torch.tensor([0, 8]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt_limit": (1.0, 0.5)}, "0 <= low <= high"),
        ({"D": torch.zeros(3)}, r"D must be \[H\] = \[4\]"),
        ({"dt_bias": torch.zeros(3)}, r"dt_bias must be \[H\]"),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_options(name, options, message):
    inputs = [x.detach().float() for x in make_ssd(1, 8, 4, 2, 4, 3)[:5]]
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](*inputs, **options)

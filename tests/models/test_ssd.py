"""SSD against a float64 loop, against transformers' Mamba-2 scan, and against itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from models import chunks, ssd
from models.ssd import chunk_ssd, recurrent_ssd
from scan_checks import assert_close, results

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


def make(batch, tokens, heads, groups, dim, size, dtype=torch.float64, sequences=None):
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, tokens, heads, dim, dtype=dtype),
        torch.randn(batch, tokens, heads, dtype=dtype),
        -torch.rand(heads, dtype=dtype) * 4,
        torch.randn(batch, tokens, groups, size, dtype=dtype),
        torch.randn(batch, tokens, groups, size, dtype=dtype),
        torch.randn(heads, dtype=dtype),
        torch.randn(heads, dtype=dtype),
        torch.randn(sequences or batch, heads, dim, size, dtype=dtype),
    ]
    return [x.requires_grad_() for x in inputs]


def with_all(function, **fixed):
    """A scan as a function of (x, dt, A, B, C, D, dt_bias), with softplus."""

    def scan(x, dt, A, B, C, D, dt_bias, **options):
        return function(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, **fixed, **options)

    return scan


CASES = {
    "T37-H4-G2": {"batch": 2, "tokens": 37, "heads": 4, "groups": 2, "dim": 8, "size": 6},
    "T64-H3-G1": {"batch": 1, "tokens": 64, "heads": 3, "groups": 1, "dim": 4, "size": 8},
    "T1": {"batch": 2, "tokens": 1, "heads": 2, "groups": 2, "dim": 4, "size": 4},
    "T5-below_chunk": {
        "batch": 1,
        "tokens": 5,
        "heads": 1,
        "groups": 1,
        "dim": 5,
        "size": 3,
    },
}
LIMITS = {"no_limit": (0.0, float("inf")), "limit": (0.4, 0.9)}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("scan", ["chunk1", "chunk12", "chunk16", "chunk64", "recurrent"])
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_loop(case, scan, limit):
    inputs = make(**CASES[case])

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
    x, dt, A, B, C, *_ = (t.detach() for t in make(1, 20, 2, 1, 4, 3))
    dt = dt.abs()
    y, final = FUNCTIONS[name](x, dt, A, B, C)
    inverse_softplus = dt + torch.log(-torch.expm1(-dt))
    zeros = torch.zeros(2, dtype=x.dtype)
    state = torch.zeros(1, 2, 4, 3, dtype=x.dtype)
    expected, _ = naive(x, inverse_softplus, A, B, C, zeros, zeros, state, (0.0, 1e9))
    assert final is None
    assert_close([y], [expected], 1e-12)


def test_gradcheck():
    inputs = make(1, 7, 2, 1, 3, 2)
    scan = with_all(chunk_ssd, chunk_size=4, output_final_state=True)
    assert torch.autograd.gradcheck(lambda *a: scan(*a[:7], initial_state=a[7]), inputs)


@pytest.mark.parametrize("limit", LIMITS)
def test_equals_transformers(limit):
    """Outputs, final states and gradients in fp32, with several groups."""
    inputs = make(2, 150, 4, 2, 16, 32, dtype=torch.float32)

    def theirs(x, dt, A, B, C, D, dt_bias, initial_state, output_final_state):
        return mamba2_chunk_scan(
            x,
            dt,
            A,
            B,
            C,
            64,
            D=D,
            dt_bias=dt_bias,
            initial_states=initial_state,
            dt_softplus=True,
            dt_limit=LIMITS[limit],
            return_final_states=True,
        )

    ours = with_all(chunk_ssd, dt_limit=LIMITS[limit])
    assert_close(results(ours, inputs), results(theirs, inputs), 2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("blocks", ["one_block", "a_block_per_chunk"])
def test_packed_equals_separate(name, blocks, monkeypatch):
    """Outputs, states and gradients of packed sequences, an empty one among them."""
    if blocks == "a_block_per_chunk":
        monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", 1)
    offsets = [0, 3, 3, 20, 50]
    inputs = make(1, 50, 4, 2, 4, 5, sequences=4)
    scan = with_all(FUNCTIONS[name], chunk_size=8)

    def separate(x, dt, A, B, C, D, dt_bias, initial_state, output_final_state):
        parts = []
        for i, (a, b) in enumerate(itertools.pairwise(offsets)):
            x_, dt_, B_, C_ = (t[:, a:b] for t in (x, dt, B, C))
            state = initial_state[i : i + 1]
            part = scan(
                x_, dt_, A, B_, C_, D, dt_bias, initial_state=state, output_final_state=True
            )
            parts.append(part)
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])

    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    assert_close(results(scan, inputs, cu_seqlens=cu_seqlens), results(separate, inputs), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pieces_equal_the_whole(name):
    x, dt, A, B, C, D, dt_bias, state = make(2, 41, 4, 2, 4, 4)
    scan = with_all(FUNCTIONS[name], chunk_size=16, output_final_state=True)
    whole = with_all(recurrent_ssd, output_final_state=True)
    expected = whole(x, dt, A, B, C, D, dt_bias, initial_state=state)
    pieces, start = [], 0
    for end in (1, 2, 18, 40, 41):
        x_, dt_, B_, C_ = (t[:, start:end] for t in (x, dt, B, C))
        y, state = scan(x_, dt_, A, B_, C_, D, dt_bias, initial_state=state)
        pieces.append(y)
        start = end
    assert_close((torch.cat(pieces, 1), state), expected, 1e-12)


def test_16_bit_operands(monkeypatch):
    """What a GPU does with bf16 inputs: bf16 products, fp32 decays and states."""
    inputs = [x.detach().bfloat16() for x in make(2, 100, 4, 2, 16, 32)]
    inputs = [x.requires_grad_() for x in (*inputs[:7], inputs[7].float())]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = results(with_all(recurrent_ssd), wide)
    monkeypatch.setattr(ssd, "operand_dtype", lambda x: x.dtype)
    actual = results(with_all(chunk_ssd), inputs)
    assert actual[0].dtype == torch.bfloat16
    assert actual[1].dtype == torch.float32
    assert_close(actual, expected, 3e-2)


def test_large_decay_stays_finite():
    inputs = [x.detach().float() for x in make(1, 64, 2, 1, 4, 4)]
    inputs[2] = torch.full((2,), -100.0)
    inputs = [x.requires_grad_() for x in inputs]
    for tensor in results(with_all(chunk_ssd), inputs):
        assert torch.isfinite(tensor).all()


BAD = {
    "offsets_start": ({"cu_seqlens": torch.tensor([1, 8])}, "must start at 0, got 1"),
    "offsets_decrease": ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, "must not decrease, got 5"),
    "offsets_short": ({"cu_seqlens": torch.tensor([0, 5])}, "got 5 and 8 tokens"),
    "state_batch": ({"initial_state": torch.zeros(2, 4, 4, 3)}, r"shape \[1, 4, 4, 3\]"),
    "state_dtype": ({"initial_state": torch.zeros(1, 4, 4, 3).double()}, "must be torch.float32"),
    "state_device": ({"initial_state": torch.zeros(1, 4, 4, 3, device="meta")}, "device"),
    "limit_order": ({"dt_limit": (1.0, 0.5)}, "0 <= low <= high"),
    "D": ({"D": torch.zeros(3)}, r"D must be \[H\] = \[4\]"),
    "dt_bias": ({"dt_bias": torch.zeros(3)}, r"dt_bias must be \[H\]"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", BAD)
def test_bad_options(name, case):
    options, message = BAD[case]
    inputs = [x.detach().float() for x in make(1, 8, 4, 2, 4, 3)[:5]]
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](*inputs, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_shapes(name):
    x, dt, A, B, C, *_ = (t.detach() for t in make(2, 8, 4, 2, 4, 3))
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


def test_bad_chunk_size():
    inputs = [x.detach() for x in make(1, 8, 4, 2, 4, 3)[:5]]
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        chunk_ssd(*inputs, chunk_size=0)

"""What both scans promise: packed sequences, pieces, blocks, 16 bits, errors."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from models import chunks, delta_chunks, ssd_chunks
from models.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from models.ssd import chunk_ssd, recurrent_ssd
from scan_checks import assert_close, make_delta, make_ssd, results, with_all


class Scan(NamedTuple):
    chunked: Callable
    recurrent: Callable
    make: Callable  # of batch, tokens, heads of keys (groups of B and C), heads, and two sizes
    by_token: tuple[int, ...]  # which inputs have an entry for each token
    decay: int  # the input that makes decays


SCANS = {
    "delta": Scan(
        chunk_gated_delta_rule, recurrent_gated_delta_rule, make_delta, (0, 1, 2, 3, 4), 3
    ),
    "ssd": Scan(
        with_all(chunk_ssd),
        with_all(recurrent_ssd),
        lambda batch, tokens, groups, heads, *sizes, **options: make_ssd(
            batch, tokens, heads, groups, *sizes, **options
        ),
        (0, 1, 3, 4),
        2,
    ),
}
FORMS = ("chunked", "recurrent")


@pytest.fixture(params=SCANS)
def scan(request) -> Scan:
    return SCANS[request.param]


def part(scan, inputs, start, end):
    """The inputs, without a state, of some tokens."""
    return [x[:, start:end] if i in scan.by_token else x for i, x in enumerate(inputs)]


def wide(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def test_gradcheck(scan):
    def function(*args):
        options = {"initial_state": args[-1], "output_final_state": True, "chunk_size": 4}
        return scan.chunked(*args[:-1], **options)

    assert torch.autograd.gradcheck(function, scan.make(1, 7, 1, 2, 3, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", ["one_block", "a_block_per_chunk"])
def test_packed_equals_separate(scan, form, blocks, monkeypatch):
    """Outputs, states and gradients of packed sequences, an empty one among them."""
    if blocks == "a_block_per_chunk":
        monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", 1)
    offsets, function = [0, 3, 3, 20, 50], getattr(scan, form)
    inputs = scan.make(1, 50, 2, 4, 4, 5, sequences=4)

    def separate(*args, initial_state, **options):
        parts = [
            function(*part(scan, args, a, b), initial_state=initial_state[i : i + 1], **options)
            for i, (a, b) in enumerate(itertools.pairwise(offsets))
        ]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])

    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    packed = results(function, inputs, cu_seqlens=cu_seqlens, chunk_size=8)
    assert_close(packed, results(separate, inputs, chunk_size=8), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_pieces_equal_the_whole(scan, form):
    *inputs, state = scan.make(2, 41, 2, 4, 4, 4)
    expected = scan.recurrent(*inputs, initial_state=state, output_final_state=True)
    pieces = []
    for start, end in itertools.pairwise((0, 1, 2, 18, 40, 41)):
        options = {"output_final_state": True, "chunk_size": 16}
        tokens = part(scan, inputs, start, end)
        y, state = getattr(scan, form)(*tokens, initial_state=state, **options)
        pieces.append(y)
    assert_close((torch.cat(pieces, 1), state), expected, 1e-12)


def test_blocks_of_chunks_change_nothing(scan, monkeypatch):
    inputs = scan.make(2, 70, 1, 2, 4, 4)
    whole = results(scan.chunked, inputs, chunk_size=8)
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", 200)
    assert len(chunks.block_ranges(torch.empty(9, 2, 2, 8, 4), 0)) > 1
    assert_close(results(scan.chunked, inputs, chunk_size=8), whole, 1e-13)


def test_16_bit_operands(scan, monkeypatch):
    """What a GPU does with bf16 inputs: bf16 products, fp32 decays and states."""
    *inputs, state = scan.make(2, 100, 2, 4, 32, 16)
    inputs = [x.detach().bfloat16() for x in inputs] + [state.detach().float()]
    inputs = [x.requires_grad_() for x in inputs]
    expected = results(scan.recurrent, wide(inputs))
    for module in (delta_chunks, ssd_chunks):
        monkeypatch.setattr(module, "operand_dtype", lambda x: x.dtype)
    actual = results(scan.chunked, inputs)
    assert (actual[0].dtype, actual[1].dtype) == (torch.bfloat16, torch.float32)
    assert_close(actual, expected, 3e-2)


def test_autocast_leaves_the_state_in_fp32(scan):
    inputs = [x.detach().float() for x in scan.make(1, 9, 1, 2, 8, 8)[:-1]]
    for function in (scan.chunked, scan.recurrent):
        expected = function(*inputs, output_final_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            actual = function(*inputs, output_final_state=True)
        assert all(map(torch.equal, actual, expected))


def test_bf16_inputs_on_cpu_compute_in_fp32():
    scan = SCANS["delta"]  # SSD adds up its output's three terms in the dtype of x
    *inputs, _ = (x.detach().bfloat16() for x in scan.make(1, 40, 1, 1, 8, 8))
    y, final = scan.chunked(*inputs, output_final_state=True)
    exact, expected = scan.chunked(*(x.float() for x in inputs), output_final_state=True)
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(final, expected)


def test_large_decay_stays_finite(scan):
    """exp(G_j - G_i) for i > j overflows; nothing of it may reach a result or a gradient."""
    inputs = [x.detach().float() for x in scan.make(1, 64, 1, 2, 4, 4)]
    inputs[scan.decay] = torch.full_like(inputs[scan.decay], -100.0)
    for tensor in results(scan.chunked, [x.requires_grad_() for x in inputs]):
        assert torch.isfinite(tensor).all()


BAD = {
    "offsets_start": ({"cu_seqlens": torch.tensor([1, 8])}, "must start at 0, got 1"),
    "offsets_decrease": ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, "must not decrease, got 5"),
    "offsets_short": ({"cu_seqlens": torch.tensor([0, 5])}, "got 5 and 8 tokens"),
    "offsets_float": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "1-D integer tensor"),
    "state_batch": ({"initial_state": torch.zeros(2, 4, 4, 4)}, r"shape \[1, 4, 4, 4\]"),
    "state_dtype": ({"initial_state": torch.zeros(1, 4, 4, 4).double()}, "must be torch.float32"),
    "state_device": ({"initial_state": torch.zeros(1, 4, 4, 4, device="meta")}, "device"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD)
def test_bad_options(scan, form, case):
    options, message = BAD[case]
    *inputs, _ = (x.detach().float() for x in scan.make(1, 8, 2, 4, 4, 4))
    with pytest.raises(ValueError, match=message):
        getattr(scan, form)(*inputs, **options)


def test_bad_chunk_size(scan):
    *inputs, _ = (x.detach() for x in scan.make(1, 8, 2, 2, 4, 4))
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        scan.chunked(*inputs, chunk_size=0)

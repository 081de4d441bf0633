"""torch.compile: one graph of a block, whose code serves all lengths and documents."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from models import gated_delta_rule, short_conv, ssd
from scan_checks import make_delta, make_mixer
from small_models import MIXERS, small_model


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def texts(packed: bool) -> list[tuple[int, torch.Tensor | None]]:
    """Twenty lengths, for packed sequences with offsets: from one to nine, some of them empty."""
    generator = random.Random(0)
    lengths = [100, 33, 31, *generator.sample(range(2, 120), 17)]
    if not packed:
        return [(length, None) for length in lengths]
    counts = [4, 1, 2, *(generator.randint(1, 9) for _ in lengths[3:])]
    cuts = [
        sorted(generator.choices(range(length + 1), k=count - 1))
        for length, count in zip(lengths, counts, strict=True)
    ]
    return [
        (length, torch.tensor([0, *cut, length], dtype=torch.int32))
        for length, cut in zip(lengths, cuts, strict=True)
    ]


def check_block(mixer: str, packed: bool, backend: str, tolerance: float) -> None:
    plain, compiled = (small_model(mixer, num_layers=1, mlp_size=8).blocks[0] for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    compiled.compile(backend=counter, fullgraph=True)
    for tokens, cu_seqlens in texts(packed):
        x, results = torch.randn(1 if packed else 2, tokens, 24), []
        for block in (plain, compiled):
            x.requires_grad_()
            y, _ = block(x, None, False, cu_seqlens)
            results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_one_graph_serves_all_lengths_and_documents(mixer, packed):
    """Outputs and all gradients are those of eager code; the second compilation serves the rest."""
    check_block(mixer, packed, "aot_eager", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_inductor_makes_code_of_it(mixer):
    check_block(mixer, True, "inductor", 1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_compiled_mixer_continues_from_a_state(mixer):
    """Packed prompts, and after them a piece of each, two recurrent steps, and the gradients of
    what went into the state."""
    plain, compiled = make_mixer(mixer), make_mixer(mixer)
    compiled.compile(backend="aot_eager", fullgraph=True)
    cu_seqlens = torch.tensor([0, 5, 40], dtype=torch.int32)
    pieces = [torch.randn(1, 40, 32), *(torch.randn(2, tokens, 32) for tokens in (7, 1, 1))]
    results = []
    for layer in (plain, compiled):
        state, seen = None, []
        for piece, offsets in zip(pieces, (cu_seqlens, None, None, None), strict=True):
            y, state = layer(piece, state, True, offsets)
            seen += [y, *state]
        loss = sum(t.sin().sum() for t in seen)
        results.append((*seen, *torch.autograd.grad(loss, list(layer.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def delta_inputs(sequences):
    *inputs, state = make_delta(1, 21, 2, 2, 4, 3, torch.float32, sequences)
    return gated_delta_rule._operator, [*inputs, state], (0.5, 8)


def ssd_inputs(sequences):
    shapes = ((1, 21, 4, 3), (1, 21, 4), (4,), (1, 21, 2, 5), (1, 21, 2, 5), (4,), (4,))
    inputs = [torch.rand(shape) for shape in (*shapes, (sequences, 4, 3, 5))]
    inputs[2] *= -1  # the decay
    return ssd._operator, [t.requires_grad_() for t in inputs], (True, 0.0, 0.9, 8, False)


def conv_inputs(sequences):
    shapes = ((1, 21, 6), (6, 4), (6,), (sequences, 3, 6))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return short_conv._operator, inputs, (False,)


OPERATORS = {
    "delta": (delta_inputs, (5,)),
    "ssd": (ssd_inputs, (5, 6, 7)),
    "conv": (conv_inputs, (2, 3)),
}


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("optional", [True, False], ids=["with_all", "without_optional"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_are_registered_as_pytorch_wants_them(name, packed, optional):
    """Schema, fake, derivative, and both under a compiler; without what is optional too."""
    make, absent = OPERATORS[name]
    operator, inputs, options = make(3 if packed else 1)
    if not optional:
        inputs = [None if i in absent else t for i, t in enumerate(inputs)]
    cu_seqlens = torch.tensor([0, 2, 2, 21], dtype=torch.int32) if packed else None
    opcheck(operator.default, (*inputs, cu_seqlens, *options))

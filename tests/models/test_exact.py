"""The exact mode: a token's bits in training, prefill and decoding, and what would break them."""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from exact_checks import (
    LENGTHS,
    count_differences,
    exact_model,
    in_pieces,
    random_sizes,
    random_tokens,
    same_bits,
)
from models import (
    delta_chunks,
    exact,
    language_model,
    mixer,
    products,
    short_conv,
    ssd,
    ssd_chunks,
    swiglu,
    token_log_probs,
)
from models.exact import CHUNK
from models.generation import generate
from models.language_model import LanguageModel
from models.products import Linear
from small_models import MIXERS


@pytest.fixture(params=MIXERS)
def model(request):
    return exact_model(request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3], ids=["1-thread", "3-threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_in_every_call(model, dtype, count, threads, record_property):
    """Random splits, batches, packings and lengths around the chunk's border."""
    threads(count)
    different, compared = count_differences(model.to(dtype))
    what = f"{type(model.config).__name__}, {dtype}, {count} threads"
    record_property("exact mode", f"{what}: {compared:,} logits compared, {different} different")
    assert different == 0
    assert compared > 100_000


def test_a_packed_state_decodes_to_the_same_bits(model):
    """Sequences whose chunks are open at different places go on together."""
    texts = [random_tokens(length + 40, seed=length) for length in LENGTHS]
    prompts = [text[:-40] for text in texts]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, prompts))])
    after = torch.stack([text[-40:] for text in texts])
    with torch.inference_mode():
        _, state = model(torch.cat(prompts)[None], output_state=True, cu_seqlens=offsets)
    logits, _ = in_pieces(model, after, itertools.chain((1, 1, 5), itertools.repeat(1)), state)
    for row, text in zip(logits, texts, strict=True):
        assert same_bits(row, model(text[None])[0][0, -40:])[0] == 0


def test_generated_log_probs_are_those_of_training(model):
    prompts = [random_tokens(length, seed=length) for length in (1, 20, CHUNK, 3 * CHUNK + 5)]
    steps = list(generate(model, prompts, 50, seed=[1, 2, 3, 4], log_probs=True))
    tokens, reported = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    for prompt, new, log_probs in zip(prompts, tokens, reported, strict=True):
        logits, _ = model(torch.cat((prompt, new))[None, :-1])
        assert logits.requires_grad
        expected = token_log_probs(logits[0, len(prompt) - 1 :], new)
        assert same_bits(log_probs, expected) == (0, 50)


def test_checkpointing_and_autocast_have_bits_of_their_own_in_no_call(model):
    tokens = random_tokens(2, 70)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = model(tokens)
        assert same_bits(in_pieces(model, tokens, random_sizes(5))[0], expected)[0] == 0
    expected, _ = model(tokens)
    grads = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    for block in model.blocks:
        block.forward = lambda *args, run=block.forward: checkpoint(run, *args, use_reentrant=False)
    logits, _ = model(tokens)
    again = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    for one, other in zip((expected, *grads), (logits, *again), strict=True):
        assert same_bits(one, other)[0] == 0


def test_gradients_are_as_good_as_the_default_modes(model):
    """Against the same model in float64: at most twice the error of the default mode, and the same
    outputs within rounding."""
    tokens = random_tokens(2, 3 * CHUNK + 1)

    def outputs(mode, dtype):
        model.exact = mode
        model.to(dtype)
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return [logits, *torch.autograd.grad(loss, list(model.parameters()))]

    ours, default = outputs(True, torch.float32), outputs(False, torch.float32)
    for one, other, truth in zip(ours, default, outputs(False, torch.float64), strict=True):
        error, granted = ((t.double() - truth).norm() / truth.norm() for t in (one, other))
        assert error < max(2 * granted, 1e-6)


def test_a_saved_state_goes_on_and_one_of_the_other_mode_is_refused(model):
    tokens = random_tokens(1, 90)
    _, state = in_pieces(model, tokens[:, :50], iter((50,)))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file)
    logits, _ = in_pieces(model, tokens[:, 50:], iter((40,)), state)
    assert same_bits(logits, model(tokens)[0][:, 50:])[0] == 0
    sizes = [tensor.shape for layer in state for tensor in layer]
    _, longer = in_pieces(model, tokens, iter((90,)))
    assert [tensor.shape for layer in longer for tensor in layer] == sizes
    model.exact = False
    with pytest.raises(ValueError, match=r"one of exact=False, got one of exact=True"):
        model(tokens, state)
    _, state = model(tokens, output_state=True)
    model.exact = True
    with pytest.raises(ValueError, match=r"one of exact=True, got one of exact=False"):
        model(tokens, state)


def test_other_rows_of_the_open_chunk_do_not_matter(model):
    """What stands behind a sequence's last token is padding."""
    tokens = random_tokens(2, 45)
    _, state = in_pieces(model, tokens[:, :40], iter((40,)))
    *layers, (opened, filled) = state
    assert filled.tolist() == [40 - CHUNK] * 2
    opened = torch.cat((opened[:, : 40 - CHUNK], random_tokens(2, 2 * CHUNK - 40, seed=9)), dim=1)
    state = [*layers, (opened, filled)]
    logits, _ = in_pieces(model, tokens[:, 40:], itertools.repeat(1), state)
    assert same_bits(logits, model(tokens)[0][:, 40:])[0] == 0


class Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize("taps", [1, 2])
def test_short_convolutions_and_empty_sequences(taps):
    model = exact_model("gated_deltanet", conv_size=taps)
    tokens = random_tokens(1, 40)
    expected, _ = model(tokens)
    assert same_bits(in_pieces(model, tokens, itertools.repeat(1))[0], expected)[0] == 0
    offsets = torch.tensor([0, 0, 40, 40])
    assert same_bits(model(tokens, cu_seqlens=offsets)[0], expected)[0] == 0
    with torch.inference_mode():
        logits, state = model(tokens, output_state=True, cu_seqlens=offsets)
        assert same_bits(logits, expected)[0] == 0
        again, _ = model(tokens[:, :3].expand(3, -1), state)
    assert same_bits(again[0], expected[0, :3])[0] == 0


def test_a_convolution_longer_than_a_chunk_is_refused():
    model = exact_model("mamba2", conv_size=CHUNK + 2)
    with pytest.raises(ValueError, match="conv_size must be at most 33 in exact mode, got 34"):
        model(random_tokens(1, 3))


@pytest.mark.parametrize("name", ["blocks.1.mixer.out_proj", "head"])
def test_an_adapter_is_refused_by_its_name(model, name):
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, child, Adapter(getattr(parent, child)))
    with pytest.raises(ValueError, match=rf"got Adapter for {name}; merge"):
        model(random_tokens(1, 3))
    model.exact = False
    model(random_tokens(1, 3))


def test_tokens_of_32_bits(model):
    """In the training forward, a prefill and a step: the bits of those of 64."""
    tokens = random_tokens(1, CHUNK + 3)
    expected, _ = model(tokens)
    short, parts, state = tokens.int(), [], None
    for piece in short.split([CHUNK + 1, 1, 1], dim=1):
        logits, state = model(piece, state, output_state=True)
        parts.append(logits)
    assert torch.equal(torch.cat(parts, dim=1), expected)
    assert torch.equal(model(short)[0], expected)


class LowRank(Linear):
    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def a_subclass(linear):
    linear.__class__ = LowRank


def a_forward_of_its_own(linear):
    linear.forward = lambda x: x @ linear.weight.T


def a_hook(linear):
    linear.register_forward_hook(lambda module, given, out: out + 1)


@pytest.mark.parametrize(
    ("change", "got"),
    [(a_subclass, "LowRank"), (a_forward_of_its_own, "Linear"), (a_hook, "Linear with a hook")],
)
def test_a_linear_layer_that_does_more_is_refused(model, change, got):
    change(model.blocks[1].mixer.out_proj)
    with pytest.raises(ValueError, match=f"got {got} for blocks.1.mixer.out_proj; merge"):
        model(random_tokens(1, 3))


def test_a_linear_layer_of_another_name_is_refused(model):
    model.blocks[0].mlp = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.SiLU())
    with pytest.raises(ValueError, match=r"got Linear for blocks\.0\.mlp\.0; merge"):
        model(random_tokens(1, 3))


class Quantised(torch.Tensor):
    """A weight of a class of its own, as torchao's are."""


def test_a_quantised_weight_is_refused(model):
    linear = model.blocks[1].mixer.out_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    with pytest.raises(ValueError, match="plain tensors, got Quantised; convert them"):
        model(random_tokens(1, 3))


def test_exact_is_an_attribute_and_no_weight(model):
    other = LanguageModel(model.config, exact=True)
    assert other.exact
    assert other.state_dict().keys() == LanguageModel(model.config).state_dict().keys()
    with pytest.raises(TypeError, match="exact must be True or False, got 1"):
        other.exact = 1


# ---- what must be noticed ----


def with_a_tail(function):
    """As PyTorch's functions are on some processors: the end of a buffer, which fills no vector,
    gets other bits."""

    def call(*tensors):
        y = function(*tensors)
        tail = torch.zeros_like(y)
        tail.view(-1)[-3:] = 2 * torch.finfo(y.dtype).eps
        return y * (1 + tail)

    return call


def functions_of_all_chunks(exact, function, *tensors):
    return with_a_tail(function)(*tensors)


def test_chunk_by_chunk_a_function_with_a_tail_keeps_its_bits(model, monkeypatch):
    def by_chunks(on, function, *tensors):
        return exact.by_chunks(on, with_a_tail(function), *tensors)

    for module in (language_model, mixer, short_conv, ssd, swiglu):
        monkeypatch.setattr(module, "by_chunks", by_chunks)
    assert count_differences(model)[0] == 0


def sees_later_rows(total, dtype):
    pair = (total[..., :, None] - total[..., None, :]).to(dtype)
    return torch.exp(torch.where(pair <= 0, pair, -pair))


def adds_otherwise_in_large_products(x, weight, bias):
    half = x.shape[1] // 2 if len(x) > CHUNK else 0
    y = x[:, :half] @ weight[:, :half].T + x[:, half:] @ weight[:, half:].T
    return y if bias is None else y + bias


MUTANTS = {  # the second is given to every module that has the first
    "functions_of_all_chunks": ("by_chunks", functions_of_all_chunks),
    "split_product": ("_blocks", adds_otherwise_in_large_products),
    "later_rows": ("decay_matrix", sees_later_rows),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_count_notices(model, mutant, monkeypatch):
    name, wrong = MUTANTS[mutant]
    modules = (delta_chunks, language_model, mixer, products, short_conv, ssd, ssd_chunks, swiglu)
    for module in modules:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, wrong)
    assert count_differences(model)[0] > 0


def test_an_unaligned_chunk_is_noticed(model, monkeypatch):
    """A state after half a chunk more than there should be, whose open chunk is empty."""
    tokens, half = random_tokens(1, 3 * CHUNK), CHUNK // 2
    expected, _ = model(tokens)
    for module in (exact, mixer, products, short_conv):
        monkeypatch.setattr(module, "CHUNK", half)
    _, (*layers, (_, filled)) = in_pieces(model, tokens[:, : 3 * half], iter((3 * half,)))
    assert filled.tolist() == [0]
    monkeypatch.undo()
    state = [*layers, (torch.zeros(1, CHUNK, dtype=torch.int64), filled)]
    logits, _ = in_pieces(model, tokens[:, 3 * half :], itertools.repeat(1), state)
    torch.testing.assert_close(logits, expected[:, 3 * half :], rtol=1e-3, atol=1e-3)
    assert same_bits(logits, expected[:, 3 * half :])[0] > 0


# ---- token_log_probs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("words", [1, 256, 1003, 32003])
def test_token_log_probs(words, dtype):
    """Values and gradients against float64; and a row alone, at any address, has its own bits."""
    g = torch.Generator().manual_seed(words)
    logits = (5 * torch.randn(3, 7, words, generator=g)).to(dtype).requires_grad_()
    tokens = torch.randint(0, words, (3, 7), generator=g)
    ours = token_log_probs(logits, tokens)
    wide = logits.detach().double().requires_grad_()
    truth = wide.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (ours.shape, ours.dtype) == ((3, 7), torch.float32)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=2e-6)
    cotangent = torch.randn(3, 7, generator=g)
    (grad,) = torch.autograd.grad(ours, logits, cotangent)
    (expected,) = torch.autograd.grad(truth, wide, cotangent.double())
    # a probability is exp of numbers down to -50, which have 50 roundings of fp32 themselves
    rounding = max(torch.finfo(dtype).eps, 50 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=1e-8)
    for i, j in ((0, 0), (1, 3), (2, 6)):
        shifted = torch.zeros(words + 3, dtype=dtype)[i : i + words].copy_(logits[i, j])
        assert same_bits(token_log_probs(shifted, tokens[i, j]), ours[i, j])[0] == 0


def test_token_log_probs_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[2, 4, 9\]; give one token"):
        token_log_probs(torch.zeros(2, 4, 9), torch.zeros(2, 3, dtype=torch.int64))

"""Generation: sampling, against transformers' processors too, prompts of any lengths, seeds."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from models import generation
from models.generation import generate, penalize, sample
from small_models import MIXERS, small_model


@pytest.fixture(params=list(MIXERS))
def model(request):
    model = small_model(request.param)
    with torch.no_grad():
        model.embedding.weight.mul_(15)  # logits sharp enough that no two are close to equal
    return model.eval()


def prompt(length, seed=1):
    return torch.randint(0, 32, (length,), generator=torch.Generator().manual_seed(seed))


def collect(*args, **options):
    return torch.stack(list(generate(*args, **options)), dim=1)


def test_modules_are_left_in_the_mode_that_they_came_in(model):
    """Also where they are of two kinds, and where the generator is left on the way."""
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    next(generate(model, torch.tensor([1, 2]), 5))
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}


def test_greedy_equals_the_full_forward(model):
    """Each token is the most likely one of a forward over all tokens so far."""
    text = prompt(20)[None]
    tokens = collect(model, text, 12, temperature=0)
    assert tokens.shape == (1, 12)
    for _ in range(12):
        with torch.no_grad():
            logits, _ = model(text)
        text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, text[:, 20:])


def test_prompts_of_different_lengths_equal_one_at_a_time(model):
    prompts = [prompt(n, n) for n in (1, 2, 17, 60)]
    together = collect(model, prompts, 10, temperature=0)
    alone = [collect(model, p, 10, temperature=0) for p in prompts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_prompt_is_read_in_pieces(model, rows, monkeypatch):
    text = torch.stack([prompt(20, seed) for seed in range(rows)])
    whole = list(generate(model, text, 4, temperature=0, log_probs=True))
    lengths = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7 * rows)
    pieces = list(generate(model, text, 4, temperature=0, log_probs=True))
    assert lengths[:3] == [7, 7, 6]
    for (token, log_prob), (same, expected) in zip(pieces, whole, strict=True):
        assert torch.equal(token, same)
        torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)


def test_batch_equals_list_of_its_rows(model):
    batch = torch.stack([prompt(9, 1), prompt(9, 2)])
    assert torch.equal(collect(model, batch, 8, seed=3), collect(model, list(batch), 8, seed=3))


def test_seed(model):
    first = collect(model, prompt(5), 30, seed=7)
    torch.manual_seed(123)
    assert torch.equal(collect(model, prompt(5), 30, seed=7), first)
    assert not torch.equal(collect(model, prompt(5), 30, seed=8), first)
    state = torch.get_rng_state()
    collect(model, prompt(5), 3)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was(model, training):
    model.train(training)
    steps = generate(model, prompt(5), 3)
    for _ in steps:
        assert model.training == training
        assert not torch.is_inference_mode_enabled()
    assert model.training == training


def test_abandoned_generation_leaves_nothing_behind(model):
    steps = generate(model, prompt(5), 30)
    next(steps)
    del steps
    loss = model(prompt(5)[None])[0].sum()
    loss.backward()  # not in inference mode


def test_no_tokens(model):
    assert list(generate(model, prompt(5), 0)) == []


BAD = {
    "empty": ({"prompt": torch.empty(0, dtype=torch.int64)}, "at least one token"),
    "empty_list": ({"prompt": []}, "at least one token"),
    "empty_one": ({"prompt": [prompt(3), prompt(3)[:0]]}, "at least one token"),
    "dimensions": ({"prompt": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"\[T\] or \[B, T\]"),
    "temperature": ({"temperature": -1.0}, "temperature must be 0"),
    "nan": ({"temperature": float("nan")}, "temperature must be 0"),
    "top_k": ({"top_k": 0}, "top_k must be at least 1, got 0"),
    "top_p": ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    "penalty": ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
    "penalty_nan": ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0"),
    "seeds": ({"seed": [1, 2]}, "seed must be one number or one for each of 1 sequences"),
    "negative": ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_at_once(model, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": prompt(3), "max_new_tokens": 4, **options})


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-1.0, 3.0, 1.0, 0.0]])


def frequencies(**options):
    generator = torch.Generator().manual_seed(0)
    draws = sample(LOGITS.repeat(20000, 1), generator=generator, **options).view(-1, 2)
    return torch.stack([torch.bincount(draws[:, i], minlength=4) for i in (0, 1)]) / len(draws)


def test_sample_temperature_0_takes_the_most_likely():
    assert sample(LOGITS, 0).tolist() == [0, 1]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 5e-324])
def test_sample_nearly_greedy_takes_the_most_likely(temperature, options):
    """Temperatures that fp32 rounds to 0 too, and logits that are infinite."""
    inf = float("inf")
    logits = torch.cat((LOGITS, LOGITS.flip(1) * 1e30, torch.tensor([[-inf, 0.0, inf, 1.0]])))
    assert sample(logits, temperature, **options).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_draws_from_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(temperature=temperature) - expected).abs().max() < 0.015


def test_sample_top_k_keeps_k():
    expected = LOGITS.softmax(-1) * torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])
    expected /= expected.sum(-1, keepdim=True)
    assert (frequencies(top_k=2) - expected).abs().max() < 0.015
    assert (frequencies(top_k=9) - LOGITS.softmax(-1)).abs().max() < 0.015


def test_sample_top_p_keeps_the_fewest_that_reach_p():
    """Row 0 is 0.64, 0.24, 0.09, 0.03 and row 1 is 0.84 for its second token."""
    expected = LOGITS.softmax(-1) * torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]])
    expected /= expected.sum(-1, keepdim=True)
    assert (frequencies(top_p=0.8) - expected).abs().max() < 0.015
    assert sample(LOGITS, top_p=1e-9).tolist() == [0, 1]  # the most likely token always stays


def greedy_with_transformers(model, text, count, penalty):
    """Greedy decoding by a full forward per token, penalized by transformers."""
    process = RepetitionPenaltyLogitsProcessor(penalty)
    text = text[None]
    for _ in range(count):
        with torch.no_grad():
            logits = model(text)[0][:, -1]
        text = torch.cat((text, process(text, logits).argmax(-1, keepdim=True)), dim=1)
    return text[0, -count:]


@pytest.mark.parametrize("penalty", [0.7, 1.3, 4.0])
def test_penalize_equals_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator) * 4
    logits[0, :3] = torch.tensor([0.0, float("-inf"), -0.0])
    tokens = torch.randint(0, 20, (3, 30), generator=generator)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, tokens, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    assert torch.equal(penalize(logits, seen, penalty), expected)


@pytest.mark.slow
def test_repetition_penalty_covers_the_prompt_and_the_new_tokens(model):
    prompts = [prompt(n, n) for n in (1, 12, 30)]
    expected = torch.stack([greedy_with_transformers(model, p, 15, 2.5) for p in prompts])
    options = {"temperature": 0, "repetition_penalty": 2.5}
    alone = [torch.cat(list(generate(model, p, 15, **options))) for p in prompts]
    assert torch.equal(torch.stack(alone), expected)
    together = torch.stack(list(generate(model, prompts, 15, **options)), dim=1)
    assert torch.equal(together, expected)
    without = [torch.cat(list(generate(model, p, 15, temperature=0))) for p in prompts]
    assert not torch.equal(torch.stack(without), expected)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 3, "repetition_penalty": 3.0}])
def test_log_probabilities_are_those_of_the_model(model, options):
    prompts = [prompt(n, n) for n in (4, 9)]
    pairs = list(generate(model, prompts, 12, seed=1, log_probs=True, **options))
    tokens, log_probs = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
    assert torch.equal(
        tokens, torch.stack(list(generate(model, prompts, 12, seed=1, **options)), 1)
    )
    for text, new, found in zip(prompts, tokens, log_probs, strict=True):
        with torch.no_grad():
            logits = model(torch.cat((text, new))[None])[0][0, len(text) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(-1, new[:, None])[:, 0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_a_seed_for_each_sequence_gives_it_what_it_gives_alone(model):
    prompts = [prompt(n, n) for n in (4, 9, 9)]
    together = torch.stack(list(generate(model, prompts, 20, seed=[5, 6, 5])), dim=1)
    for text, seed, tokens in zip(prompts, [5, 6, 5], together, strict=True):
        assert torch.equal(torch.cat(list(generate(model, text, 20, seed=seed))), tokens)

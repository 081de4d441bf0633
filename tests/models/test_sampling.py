"""Sampling options of models.generation against transformers' own processors."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from models.generation import generate, penalize
from small_models import small_model


@pytest.fixture(scope="module")
def model():
    model = small_model("mamba2")
    with torch.no_grad():
        model.embedding.weight.mul_(15)  # logits sharp enough that no two are close to equal
    return model.eval()


def prompt(length, seed=1):
    return torch.randint(0, 32, (length,), generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan")])
def test_a_repetition_penalty_out_of_range_is_refused_at_once(model, penalty):
    with pytest.raises(ValueError, match=r"repetition_penalty must be above 0, got"):
        generate(model, prompt(3), 1, repetition_penalty=penalty)


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
    with pytest.raises(ValueError, match="seed must be one number or one for each of 3 sequences"):
        generate(model, prompts, 1, seed=[1])

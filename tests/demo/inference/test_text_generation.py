"""From prompts to texts: what `demo.generate` and `demo.stream_text` promise."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import demo
from demo import Options, generate, stream_text
from demo.checkpoints.checkpoint import Loaded
from demo.checkpoints.tokenizer import ByteTokenizer, TextTokenizer
from demo.config.command import compose
from demo.inference import text_generation

PROMPTS = ["import ", "a", "def f(x, y=1):\n    return x", "caf\u00e9 \U0001f600"]


@pytest.fixture
def says(monkeypatch):
    """A model that says the given tokens, the same to every prompt."""

    def say(tokens, tokenizer=None, rows=1):
        steps = [(torch.full((rows,), t), torch.full((rows,), -0.5)) for t in tokens]
        monkeypatch.setattr(
            text_generation.generation,
            "generate",
            lambda model, prompt, max_new_tokens, **_: iter(steps[:max_new_tokens]),
        )
        return Loaded(torch.nn.Linear(1, 1), tokenizer or ByteTokenizer(), Path(), "fla")

    return say


def without_times(result):
    return dataclasses.replace(result, prefill_s=0, decode_s=0, log_probs=[])


def test_a_result_has_text_tokens_log_probabilities_and_times(loaded):
    result = generate(loaded, "import ", max_new_tokens=20, temperature=0)
    assert result.prompt == "import "
    assert (result.prompt_tokens, len(result.tokens), result.finish) == (7, 20, "length")
    assert result.text == bytes(result.tokens).decode(errors="replace")
    assert result.prefill_s > 0
    assert result.decode_s > 0
    with torch.no_grad():
        everything = torch.tensor([*b"import ", *result.tokens])
        logits = loaded.model(everything[None])[0][0, 6:-1]
    assert logits.argmax(-1).tolist() == result.tokens
    expected = logits.log_softmax(-1).gather(-1, everything[7:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.log_probs), expected, rtol=0, atol=1e-4)
    assert result.tokens == generate(loaded, "import ", max_new_tokens=20, temperature=0).tokens


@pytest.mark.parametrize(
    "batch_size", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 9))]
)
def test_a_prompt_does_not_depend_on_the_others(loaded, batch_size):
    options = {"max_new_tokens": 24, "temperature": 1.2, "seed": 5}
    alone = [generate(loaded, prompt, **options) for prompt in PROMPTS]
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS * 2):
        results = generate(loaded, prompts, batch_size=batch_size, **options)
        expected = [alone[PROMPTS.index(prompt)] for prompt in prompts]
        assert [without_times(r) for r in results] == [without_times(r) for r in expected]
    assert len({r.text for r in alone}) == len(PROMPTS)
    if batch_size == 1:
        assert [r.log_probs for r in results] == [r.log_probs for r in expected]


def test_a_seed_gives_one_text_and_no_seed_another_each_time(loaded):
    texts = [generate(loaded, "x", max_new_tokens=30, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({generate(loaded, "x", max_new_tokens=30, seed=None).text for _ in range(3)}) > 1


def test_stream_is_the_text_of_generate(loaded):
    options = {"max_new_tokens": 40, "temperature": 1.5}
    pieces = list(stream_text(loaded, "import ", **options))
    assert len(pieces) > 1
    assert "".join(pieces) == generate(loaded, "import ", **options).text


def test_text_waits_for_whole_characters(says):
    text = "a\u00e9\U0001f600".encode() + b"\xff" + b"\xc3"
    pieces = list(stream_text(says(text), "x", max_new_tokens=len(text)))
    assert pieces == ["a", "\u00e9", "\U0001f600", "\ufffd", "\ufffd"]


def test_text_waits_for_what_may_be_a_stop_string_and_ends_before_it(says):
    loaded = says(b"ab\ncd\n\nef")
    assert list(stream_text(loaded, "x", stop=["\n\n"])) == ["a", "b", "\nc", "d"]
    result = generate(loaded, "x", stop="\n\n")
    assert (result.text, result.finish) == ("ab\ncd", "stop")
    assert bytes(result.tokens) == b"ab\ncd\n\n"
    assert len(result.log_probs) == len(result.tokens)
    held = generate(loaded, "x", stop="\n\n", max_new_tokens=3)
    assert (held.text, held.finish) == ("ab\n", "length")


class Words(TextTokenizer):
    """One token per word and a mark for the space before it, which a text's first word loses."""

    def __init__(self):
        words = ["</s>", "\u2581one", "\u2581two", "\u2581three", "\ufffd"]
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "\ufffd")
        )
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        super().__init__(tokenizer, eos=0)


def test_counts_are_tokens_and_the_first_word_keeps_its_space(says):
    loaded = says([2, 3, 0, 1], Words())
    result = generate(loaded, "one two")
    assert result.prompt_tokens == 2
    assert result.text == " two three"
    assert (result.tokens, result.finish) == ([2, 3, 0], "eos")
    assert generate(loaded, "one \ufffd").text.strip() == "two three"


def test_a_batch_ends_with_the_last_of_its_texts(says):
    results = generate(says(b"abc\nde", rows=3), ["x", "y", "z"], batch_size=3, stop="\n")
    assert [(r.prompt, r.text, r.finish) for r in results] == [(p, "abc", "stop") for p in "xyz"]


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("", {}, "a prompt must have at least one token, got b''"),
        (["a", ""], {"batch_size": 2}, "a prompt must have at least one token"),
        ("a", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("a", {"temperature": -1}, "temperature must be 0"),
        ("a", {"stop": ["x", ""]}, "stop strings must have at least one character"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_options_are_refused(loaded, prompts, options, says):
    with pytest.raises(ValueError, match=says):
        generate(loaded, prompts, **options)


def test_a_stream_refuses_at_once(loaded):
    with pytest.raises(ValueError, match="top_p must be in"):
        stream_text(loaded, "a", top_p=2)
    with pytest.raises(TypeError, match="no option 'temprature'; did you mean temperature"):
        stream_text(loaded, "a", temprature=2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("max_tokens", "did you mean max_new_tokens"),
        ("batchsize", "did you mean batch_size"),
        ("xyz", "there are max_new_tokens, temperature, top_k, .*, seed, batch_size"),
    ],
)
def test_an_option_that_does_not_exist_has_a_nearest_one(name, says, loaded):
    with pytest.raises(TypeError, match=f"there is no option '{name}'; {says}"):
        generate(loaded, "a", **{name: 5})


def test_the_defaults_are_those_of_the_command():
    assert dataclasses.asdict(Options.of(compose("infer"))) == {
        **dataclasses.asdict(Options()),
        "stop": [],
    }


def test_the_public_names_are_there_and_no_others():
    names = ["load", "generate", "stream_text", "Options", "Result", "score", "Score"]
    names += ["ConfigError"]
    assert demo.__all__ == names
    assert [getattr(demo, name).__name__ for name in names] == names
    files = {path.stem for path in Path(demo.__file__).parent.iterdir()}
    assert not files & set(names)  # a module, once imported, would hide the name
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        demo.lod  # noqa: B018


def test_the_way_in_imports_nothing_heavy():
    program = "import sys, demo; demo.ConfigError; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(demo.__file__).parents[1])

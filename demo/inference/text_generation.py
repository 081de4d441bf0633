"""From prompts to text: one call for many prompts, or piece by piece as soon as it is certain."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from demo.checkpoints.checkpoint import Loaded
from demo.checkpoints.tokenizer import Tokenizer
from demo.inference.stop_strings import StopStrings
from models import generation
from models.ranges import nearest

CONTEXT = 8  # tokens of the prompt that are decoded with the first new one


@dataclass(frozen=True)
class Options:
    """How a text goes on; the defaults are those of infer.py.

    Attributes:
        max_new_tokens: At least 1.
        temperature: Divides the logits; 0 always takes the likeliest token, whatever the seed.
        top_k: Keep the k likeliest tokens, or None for all.
        top_p: Keep the likeliest tokens that together have this probability, or None for all.
        repetition_penalty: Above 1 for fewer of the tokens that were there, the prompt included.
        stop: The text ends before the first of these strings.
        seed: Of each prompt's own generator, the same one for all: what a prompt gives does not
            depend on the prompts beside it. None for a random one.
    """

    max_new_tokens: int = 400
    temperature: float = 0.9
    top_k: int | None = 50
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = 1

    def __post_init__(self):
        if isinstance(self.stop, str):  # which is a sequence of strings too
            object.__setattr__(self, "stop", (self.stop,))

    @classmethod
    def of(cls, config: Any) -> "Options":
        """Those of its fields that have the same name, as in `demo.config.schema.InferConfig`."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})


@dataclass
class Result:
    """What came of one prompt.

    Attributes:
        prompt: As it was given; bytes that are not UTF-8 as U+FFFD.
        text: What came after it, without the stop string.
        tokens: All new tokens, those of a stop string and of the document's end included.
        log_probs: Natural log-probability of each token, by the model itself: before repetition
            penalty, temperature, top_k and top_p.
        prompt_tokens: How many tokens the prompt has.
        finish: "length" (max_new_tokens), "stop" (a stop string) or "eos" (the document's end).
        prefill_s: Seconds to the first token, for the whole batch that the prompt was in.
        decode_s: Seconds from there to the last token.
    """

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    finish: str | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0


def generate(
    loaded: Loaded,
    prompts: str | bytes | Sequence[str | bytes],
    *,
    batch_size: int = 1,
    **options: Any,
) -> Result | list[Result]:
    """Continue one prompt or many.

    Args:
        loaded: What `load` returned.
        prompts: One prompt for one `Result`, a list for a list of them in the same order.
        batch_size: How many prompts go through the model together. With 1, each gives to the bit
            what it gives alone. More are faster, and can differ where two tokens are almost
            equally likely, because a matrix product of another size rounds differently.
        **options: The fields of `Options`.
    Raises:
        ValueError: for an empty prompt and for options out of range.
        TypeError: for an option that does not exist, with the nearest one that does.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use 1 or more")
    one, given = isinstance(prompts, (str, bytes)), _options(options, "batch_size")
    batches = in_batches(loaded, [prompts] if one else prompts, batch_size, given)
    results = [result for batch in batches for result in batch.run()]
    return results[0] if one else results


def stream_text(loaded: Loaded, prompt: str | bytes, **options: Any) -> Iterator[str]:
    """The continuation of one prompt, piece by piece; arguments and errors as for `generate`."""
    return (text for _, text in PromptBatch(loaded, [prompt], _options(options)))


def _options(given: dict[str, Any], *others: str) -> Options:
    """The options of these names. Raises TypeError for a name that is none of theirs, nor of the
    caller's `others`."""
    names = [*(f.name for f in fields(Options)), *others]
    for name in given:
        if name not in names:
            hint = nearest(name, names) or f"; there are {', '.join(names)}"
            raise TypeError(f"there is no option {name!r}{hint}")
    return Options(**given)


class PromptBatch:
    """Prompts that are continued together. Iterate over it, once, for pairs of a prompt's index
    and the next piece of its text, as soon as that is certain.

    Bytes that end in the middle of a character wait for the rest of it, and so does text that may
    be the beginning of a stop string.

    Attributes:
        results: One for each prompt, complete after the last piece.
    Raises:
        ValueError: at once, for an empty prompt and for options out of range.
    """

    def __init__(self, loaded: Loaded, prompts: Sequence[str | bytes], options: Options):
        if options.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be at least 1, got {options.max_new_tokens}; use a larger "
                "one, or score for the prompt itself"
            )
        self._texts = [
            _Continuation(
                loaded.tokenizer, text.encode() if isinstance(text, str) else text, options
            )
            for text in prompts
        ]
        self.results = [text.result for text in self._texts]
        device = next(loaded.model.parameters()).device
        tokens = [
            torch.tensor(text.prompt, dtype=torch.int64, device=device) for text in self._texts
        ]
        sampling = asdict(options)
        del sampling["stop"]
        if options.seed is not None:
            sampling["seed"] = [options.seed] * len(tokens)
        self._steps = generation.generate(
            loaded.model, tokens if len(tokens) > 1 else tokens[0], log_probs=True, **sampling
        )

    def run(self) -> list[Result]:
        """The results, when all of them are complete."""
        for _ in self:
            pass
        return self.results

    def __iter__(self) -> Iterator[tuple[int, str]]:
        began = time.perf_counter()
        prefill_s = None
        for tokens, log_probs in self._steps:
            rows = list(zip(tokens.tolist(), log_probs.tolist(), strict=True))  # waits for a GPU
            now = time.perf_counter()
            if prefill_s is None:
                prefill_s, began = now - began, now
            for index, (text, row) in enumerate(zip(self._texts, rows, strict=True)):
                if text.result.finish is None:
                    text.result.prefill_s, text.result.decode_s = prefill_s, now - began
                    if piece := text.push(*row):
                        yield index, piece
            if all(text.result.finish for text in self._texts):
                break


def in_batches(
    loaded: Loaded, prompts: Sequence[str | bytes], batch_size: int, options: Options
) -> Iterator[PromptBatch]:
    """The prompts, `batch_size` at a time."""
    for start in range(0, len(prompts), batch_size):
        yield PromptBatch(loaded, prompts[start : start + batch_size], options)


class _Continuation:
    """What comes after one prompt: tokens in, text out."""

    def __init__(self, tokenizer: Tokenizer, prompt: bytes, options: Options):
        self.prompt = tokenizer.encode(prompt)
        if not self.prompt:
            raise ValueError(
                f"a prompt must have at least one token, got {prompt!r}; give some text"
            )
        self.result = Result(prompt.decode(errors="replace"), prompt_tokens=len(self.prompt))
        self.eos, self.length = tokenizer.eos, options.max_new_tokens
        self.stream, self.stops = tokenizer.stream(), StopStrings(options.stop)
        # How the first new token reads can depend on the prompt: whether it keeps its space.
        before = self.prompt[-CONTEXT:]
        if not tokenizer.decode(before).endswith("\ufffd"):  # else the stream would give that again
            for token in before:
                self.stream.push(token)

    def push(self, token: int, log_prob: float) -> str:
        result = self.result
        result.tokens.append(token)
        result.log_probs.append(log_prob)
        piece = ""
        if token == self.eos:
            result.finish = "eos"
        else:
            piece = self.stops.push(self.stream.push(token))
            if self.stops.found is not None:
                result.finish = "stop"
            elif len(result.tokens) == self.length:
                result.finish = "length"
        if result.finish in ("eos", "length"):
            piece += self.stops.push(self.stream.finish()) + self.stops.finish()
        result.text += piece
        return piece

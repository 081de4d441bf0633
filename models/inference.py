"""From a prompt to text, one token at a time, with the time that it took."""

import codecs
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from models.generation import generate
from models.language_model import LanguageModel


@dataclass
class Continuation:
    """The continuation of a prompt: iterate over it to get text as soon as it is certain.

    Bytes that end in the middle of a character wait for the rest of it; bytes that are not UTF-8
    come out as U+FFFD.

    Args:
        model: Any language model of this package.
        prompt: At least one byte.
        max_new_tokens, temperature, top_k, top_p, seed: As for `models.generation.generate`.

    Attributes:
        prefill_s: Seconds from the start to the first token.
        decode_s: Seconds for all others.
        tokens: The new tokens so far.
    """

    model: LanguageModel
    prompt: bytes
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def prefill_tokens_per_s(self) -> float:
        return len(self.prompt) / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else 0.0

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        device = next(self.model.parameters()).device
        prompt = torch.tensor(list(self.prompt), dtype=torch.int64, device=device)
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        began = time.perf_counter()
        for token in generate(self.model, prompt, self.max_new_tokens, seed=self.seed, **sampling):
            self.tokens.append(int(token))  # waits for the device
            now = time.perf_counter()
            if len(self.tokens) == 1:
                self.prefill_s, began = now - began, now
            self.decode_s = now - began
            if text := decoder.decode(bytes([self.tokens[-1]])):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest

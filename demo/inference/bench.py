"""`bench=true`: tokens per second on one prompt."""

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from demo.checkpoints.checkpoint import Loaded
from models.generation import generate
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Speed:
    """The median of several greedy runs.

    Attributes:
        norm_path: The path that was taken.
        prompt_tokens, new_tokens: Of each run.
        prefill_s: Seconds to the first new token.
        decode_s: Seconds from the second new token to the last, since the step to the second
            captures a CUDA graph on a GPU; 0 where there are no more than two.
    """

    norm_path: str
    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float

    def rates(self) -> dict[str, tuple[int, float]]:
        """Tokens, and tokens per second, of the prefill, and of decoding where it was timed."""
        parts = {"prefill": (self.prompt_tokens, self.prefill_s)}
        if self.new_tokens > 2:
            parts["decode"] = (self.new_tokens - 2, self.decode_s)
        return {name: (tokens, tokens / seconds) for name, (tokens, seconds) in parts.items()}

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {f"{name}_tokens_per_s": r for name, (_, r) in self.rates().items()}

    def table(self) -> Table:
        table = Table(title=f"Tokens/s, norm path {self.norm_path}", title_justify="left")
        for column in ("", "tokens", "median"):
            table.add_column(column, justify="right" if column else "left")
        for name, (tokens, rate) in self.rates().items():
            label = "decode, from the 3rd on" if name == "decode" else name
            table.add_row(label, f"{tokens:,}", f"{rate:,.0f}")
        return table


def bench(loaded: Loaded, prompt: bytes, max_new_tokens: int, runs: int) -> Speed:
    """Time `loaded.model` on its norm path: `runs` greedy runs, after one that is not counted."""
    tokens = encode(loaded, prompt)
    seconds = [time_run(loaded.model, tokens, max_new_tokens) for _ in range(1 + runs)][1:]
    medians = map(median, zip(*seconds, strict=True))
    return Speed(loaded.model.norm_path, len(tokens), max_new_tokens, *medians)


def encode(loaded: Loaded, prompt: bytes) -> Tensor:
    """The tokens [T] of a prompt, on the model's device."""
    device = next(loaded.model.parameters()).device
    return torch.tensor(loaded.tokenizer.encode(prompt), dtype=torch.int64, device=device)


def time_run(model: LanguageModel, prompt: Tensor, count: int) -> tuple[float, float]:
    """Seconds to the first of `count` new tokens, and from the second to the last."""
    times = [time.perf_counter()]
    for token in generate(model, prompt, count, temperature=0):
        token.cpu()  # waits for a GPU
        times.append(time.perf_counter())
    return times[1] - times[0], times[-1] - times[min(2, count)]

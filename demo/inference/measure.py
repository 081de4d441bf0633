"""Measurements on one prompt: the two norm paths side by side, and tokens per second."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from demo.checkpoints.checkpoint import Loaded
from demo.config.schema import NORM_PATHS
from demo.inference.output import number_of_tokens, say
from models.generation import generate
from models.language_model import LanguageModel

# Decoding holds the same memory at every step, so that a few steps show its peak.
PROFILED_TOKENS = 4


@dataclass(frozen=True)
class Spread:
    """Median, least and most of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def per_s(self, count: int) -> "Spread":
        """Of seconds for `count` things: how many things in a second."""
        return Spread(count / self.median, count / self.most, count / self.least)


@dataclass(frozen=True)
class Speed:
    """Seconds of several greedy runs, after one that is not counted.

    Attributes:
        norm_path: That was taken.
        prompt_tokens, new_tokens: Of each run.
        prefill_s: To the first new token.
        decode_s: From the second to the last; the step to the second one captures a CUDA graph
            on a GPU. 0 where there are no more than two.
    """

    norm_path: str
    prompt_tokens: int
    new_tokens: int
    prefill_s: Spread
    decode_s: Spread

    def table(self) -> Table:
        """Tokens per second of the prefill and of decoding once it runs."""
        table = Table(title=f"Tokens/s, norm path {self.norm_path}", title_justify="left")
        for column in ("", "tokens", "median", "least", "most"):
            table.add_column(column, justify="right" if column else "left")
        for name, (tokens, rate) in self.rates().items():
            values = (f"{value:,.0f}" for value in (rate.median, rate.least, rate.most))
            label = "decode, from the 3rd on" if name == "decode" else name
            table.add_row(label, f"{tokens:,}", *values)
        return table

    def rates(self) -> dict[str, tuple[int, Spread]]:
        """Of the prefill, and of decoding where there is any: tokens, and tokens per second."""
        parts = {"prefill": (self.prompt_tokens, self.prefill_s)}
        if self.new_tokens > 2:
            parts["decode"] = (self.new_tokens - 2, self.decode_s)
        return {name: (tokens, seconds.per_s(tokens)) for name, (tokens, seconds) in parts.items()}

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        rates = {f"{name}_tokens_per_s": asdict(rate) for name, (_, rate) in self.rates().items()}
        return asdict(self) | rates


@dataclass(frozen=True)
class Comparison:
    """Both norm paths on the same prompt, greedily.

    Attributes:
        difference: The largest difference of two logits, over the prompt and the new tokens.
        other_bits: How many of the logits are not the same to the bit.
        logits: How many logits were compared.
        equal_tokens: How many new tokens are the same from the first on.
        speed: By norm path.
        peak_bytes: By norm path: the most memory held beyond the weights, for the prompt and the
            first new tokens.
    """

    difference: float
    other_bits: int
    logits: int
    equal_tokens: int
    speed: dict[str, Speed]
    peak_bytes: dict[str, int]

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {"speed": {path: s.record() for path, s in self.speed.items()}}

    def table(self) -> Table:
        """Both paths side by side."""
        speeds = [self.speed[path] for path in NORM_PATHS]
        prompt, count = number_of_tokens(speeds[0].prompt_tokens), speeds[0].new_tokens
        title = f"Norm paths: {prompt} of prompt, {count:,} new"
        table = Table(title=title, title_justify="left")
        for column in ("", *NORM_PATHS, "difference"):
            table.add_column(column, justify="right" if column else "left")
        for name in ("prefill", "decode"):
            times = [getattr(speed, f"{name}_s") for speed in speeds]
            values = (_milliseconds(seconds) for seconds in times)
            table.add_row(f"{name}, ms", *values, _percent(*(seconds.median for seconds in times)))
        peaks = [self.peak_bytes[path] for path in NORM_PATHS]
        values = (f"{peak / 2**20:.2f} MiB" for peak in peaks)
        table.add_row("peak memory", *values, _percent(*peaks))
        table.add_section()
        table.add_row("logits differ by", "", "", f"{self.difference:g}")
        table.add_row("differ in a bit", "", "", f"{self.other_bits:,} of {self.logits:,}")
        same = self.equal_tokens == count
        words = f"0 of {count:,}" if same else f"after {self.equal_tokens:,}"
        table.add_row("tokens differ", "", "", words)
        return table


def bench(loaded: Loaded, prompt: bytes, max_new_tokens: int, runs: int) -> Speed:
    """Tokens per second of `loaded.model` on the norm path that it is set to."""
    tokens = _encode(loaded, prompt)
    _seconds(loaded.model, tokens, max_new_tokens)
    seconds = [_seconds(loaded.model, tokens, max_new_tokens) for _ in range(runs)]
    return _speed(loaded.model.norm_path, len(tokens), max_new_tokens, seconds)


def compare(loaded: Loaded, prompt: bytes, max_new_tokens: int, runs: int) -> Comparison:
    """Run both norm paths in turn; the model is left on the path that it was on."""
    model, tokens = loaded.model, _encode(loaded, prompt)
    before = model.norm_path
    logits, new, peak = {}, {}, {}
    seconds: dict[str, list] = {path: [] for path in NORM_PATHS}
    try:
        for path in NORM_PATHS:
            model.set_norm_path(path)
            logits[path], new[path] = _greedy(model, tokens, max_new_tokens)
            few = min(max_new_tokens, PROFILED_TOKENS)
            peak[path] = peak_memory(lambda few=few: _seconds(model, tokens, few), tokens.device)
            _seconds(model, tokens, max_new_tokens)  # CUDA graphs, caches
        for _ in range(runs):
            for path in NORM_PATHS:
                model.set_norm_path(path)
                seconds[path].append(_seconds(model, tokens, max_new_tokens))
    finally:
        model.set_norm_path(before)
    one, other = logits.values()
    equal = torch.eq(*new.values()).int().cumprod(0).sum().item()
    # what comes after another token is not to be compared
    one, other = one[: len(tokens) + equal], other[: len(tokens) + equal]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return Comparison(
        difference=(one - other).abs().max().item(),
        other_bits=(one.view(bits) != other.view(bits)).sum().item(),
        logits=one.numel(),
        equal_tokens=equal,
        speed={
            path: _speed(path, len(tokens), max_new_tokens, seconds[path]) for path in NORM_PATHS
        },
        peak_bytes=peak,
    )


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run` held at once beyond those held before: of CUDA's allocator, or of
    the CPU's as torch's profiler records it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start on standard error
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def show(measured: Speed | Comparison, output: str) -> None:
    """Print it as a table, or as one line of JSON."""
    if output == "json":
        say(json.dumps(measured.record()))
    else:
        Console().print(measured.table())


def _milliseconds(seconds: Spread) -> str:
    digits = 0 if seconds.median >= 0.1 else 1
    values = (seconds.median, seconds.least, seconds.most)
    median, least, most = (f"{1000 * value:.{digits}f}" for value in values)
    return f"{median} ({least} to {most})"


def _percent(one: float, other: float) -> str:
    return f"{100 * (other - one) / one:+.0f}%" if one else "none"


def _encode(loaded: Loaded, prompt: bytes) -> Tensor:
    device = next(loaded.model.parameters()).device
    return torch.tensor(loaded.tokenizer.encode(prompt), dtype=torch.int64, device=device)


def _greedy(model: LanguageModel, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits [prompt + count - 1, V] and the `count` likeliest tokens, on the CPU."""
    training = model.training
    model.eval()
    parts, tokens = [], []
    with torch.inference_mode():
        logits, state = model(prompt[None], output_state=True)
        for _ in range(count):
            parts.append(logits[0].cpu())
            tokens.append(logits[0, -1].argmax())
            if len(tokens) < count:
                logits, state = model(tokens[-1][None, None], state, output_state=True)
    model.train(training)
    return torch.cat(parts), torch.stack(tokens).cpu()


def _seconds(model: LanguageModel, prompt: Tensor, count: int) -> tuple[float, float]:
    """To the first token, and from the second to the last."""
    times = [time.perf_counter()]
    for token in generate(model, prompt, count, temperature=0):
        token.cpu()  # waits for a GPU
        times.append(time.perf_counter())
    return times[1] - times[0], times[-1] - times[min(2, count)]


def _speed(path: str, prompt: int, new: int, seconds: list[tuple[float, float]]) -> Speed:
    return Speed(path, prompt, new, *(Spread.of(part) for part in zip(*seconds, strict=True)))

"""`bench=true`: tokens per second on one prompt; `compare=true`: both norm paths on it, their
logits compared to the bit; and what `exact=true` says of generation and training."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from demo.checkpoints.checkpoint import Loaded
from demo.config.schema import NORM_PATHS
from demo.inference.text_generation import Result
from models import token_log_probs
from models.generation import generate, in_mode
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


@dataclass(frozen=True)
class Comparison:
    """Both norm paths on the same prompt, greedily.

    Attributes:
        difference: The largest difference of two logits, over the prompt and the new tokens.
        other_bits: How many of the logits are not the same to the bit.
        logits: How many logits were compared.
        equal_tokens: How many new tokens are the same from the first on.
        equal_log_probs: How many of the new tokens have the log-probability, to the bit, that the
            training forward gives them, on the path "inference".
        speed: By norm path.
        peak_bytes: By norm path: the most memory held at once beyond the weights. None on a CPU,
            whose allocator does not count it.
    """

    difference: float
    other_bits: int
    logits: int
    equal_tokens: int
    equal_log_probs: int
    speed: dict[str, Speed]
    peak_bytes: dict[str, int | None]

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {"speed": {path: s.record() for path, s in self.speed.items()}}

    def table(self) -> Table:
        speeds = [self.speed[path] for path in NORM_PATHS]
        prompt, count = speeds[0].prompt_tokens, speeds[0].new_tokens
        title = f"Norm paths, tokens: {prompt:,} of prompt, {count:,} new"
        table = Table(title=title, title_justify="left")
        for column in ("", *NORM_PATHS, "difference"):
            table.add_column(column, justify="right" if column else "left")
        rows = {
            "prefill, ms": [1e3 * speed.prefill_s for speed in speeds],
            "decode, ms": [1e3 * speed.decode_s for speed in speeds],
        }
        if None not in self.peak_bytes.values():
            rows["peak memory, MiB"] = [self.peak_bytes[path] / 2**20 for path in NORM_PATHS]
        for label, (one, other) in rows.items():
            change = f"{100 * (other - one) / one:+.0f}%" if one else "none"
            table.add_row(label, f"{one:.2f}", f"{other:.2f}", change)
        table.add_section()
        table.add_row("logits differ by", "", "", f"{self.difference:g}")
        table.add_row("logits differ in a bit", "", "", f"{self.other_bits:,} of {self.logits:,}")
        same = self.equal_tokens == count
        words = f"0 of {count:,}" if same else f"after {self.equal_tokens:,}"
        table.add_row("tokens differ", "", "", words)
        other = count - self.equal_log_probs
        table.add_row("log-probs differ from training's", "", "", f"{other:,} of {count:,}")
        return table


def bench(loaded: Loaded, prompt: bytes, max_new_tokens: int, runs: int) -> Speed:
    """Time `loaded.model` on its norm path: `runs` greedy runs, after one that is not counted."""
    path = loaded.model.norm_path
    return _time(loaded.model, _encode(loaded, prompt), max_new_tokens, runs, [path])[path]


def compare(loaded: Loaded, prompt: bytes, max_new_tokens: int, runs: int) -> Comparison:
    """Run both norm paths; the model is left on the path that it was on."""
    model, tokens = loaded.model, _encode(loaded, prompt)
    before = model.norm_path
    logits, new, peak = {}, {}, {}
    try:
        for path in NORM_PATHS:
            model.set_norm_path(path)
            logits[path], new[path], peak[path] = _greedy(model, tokens, max_new_tokens)
        # of the last path, which is "inference"
        reported = token_log_probs(logits[path][len(tokens) - 1 :], new[path])
        expected = training_log_probs(model, tokens, new[path].to(tokens.device)).cpu()
        speed = _time(model, tokens, max_new_tokens, runs, NORM_PATHS)
    finally:
        model.set_norm_path(before)
    equal = torch.eq(*new.values()).int().cumprod(0).sum().item()
    # the logits after two different tokens are not comparable
    one, other = (rows[: len(tokens) + equal] for rows in logits.values())
    return Comparison(
        difference=(one - other).abs().max().item(),
        other_bits=one.numel() - _same_bits(one, other),
        logits=one.numel(),
        equal_tokens=equal,
        equal_log_probs=_same_bits(reported, expected),
        speed=speed,
        peak_bytes=peak,
    )


def count_exact(loaded: Loaded, prompts: Sequence[bytes], results: Sequence[Result]) -> str:
    """How many of the reported log-probabilities the training forward gives to the bit, in words.
    It runs over each prompt with its text; the model is left as it was."""
    equal = total = 0
    for prompt, result in zip(prompts, results, strict=True):
        tokens = _encode(loaded, prompt)
        new = torch.tensor(result.tokens, device=tokens.device)
        expected = training_log_probs(loaded.model, tokens, new)
        equal += _same_bits(torch.tensor(result.log_probs), expected.cpu())
        total += len(new)
    return f"{equal:,} of {total:,} log-probabilities equal the training forward's, bit for bit"


def training_log_probs(model: LanguageModel, prompt: Tensor, new: Tensor) -> Tensor:
    """The log-probabilities [N] fp32 of the tokens `new` [N] after `prompt` [T] as training
    computes them: one call without a state, norms on the training path, gradients on."""
    path = model.norm_path
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        model.set_norm_path("training")
        model.requires_grad_(True)
        with torch.enable_grad(), in_mode(model, training=True):
            logits, _ = model(torch.cat((prompt, new))[None, :-1])
            return token_log_probs(logits[0, len(prompt) - 1 :], new).detach()
    finally:
        model.set_norm_path(path)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _same_bits(one: Tensor, other: Tensor) -> int:
    """How many elements of two tensors are the same to the bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return (one.view(bits) == other.view(bits)).sum().item()


def _encode(loaded: Loaded, prompt: bytes) -> Tensor:
    """The tokens [T] of a prompt, on the model's device."""
    device = next(loaded.model.parameters()).device
    return torch.tensor(loaded.tokenizer.encode(prompt), dtype=torch.int64, device=device)


def _time(
    model: LanguageModel, prompt: Tensor, count: int, runs: int, paths: Sequence[str]
) -> dict[str, Speed]:
    """The medians of `runs` runs on each norm path, after one that captures graphs. The model is
    left on the last path."""
    seconds: dict[str, list] = {path: [] for path in paths}
    for _ in range(1 + runs):  # in turn: a machine that is slow for a while is slow for all
        for path in paths:
            model.set_norm_path(path)
            seconds[path].append(time_run(model, prompt, count))
    return {
        path: Speed(path, len(prompt), count, *map(median, zip(*timed[1:], strict=True)))
        for path, timed in seconds.items()
    }


def time_run(model: LanguageModel, prompt: Tensor, count: int) -> tuple[float, float]:
    """Seconds to the first of `count` new tokens, and from the second to the last."""
    times = [time.perf_counter()]
    for token in generate(model, prompt, count, temperature=0):
        token.cpu()  # waits for a GPU
        times.append(time.perf_counter())
    return times[1] - times[0], times[-1] - times[min(2, count)]


def _greedy(model: LanguageModel, prompt: Tensor, count: int) -> tuple[Tensor, Tensor, int | None]:
    """Logits [prompt + count - 1, V] and the `count` likeliest tokens, on the CPU, and the most
    bytes that it took on a GPU."""
    if prompt.is_cuda:
        torch.cuda.reset_peak_memory_stats(prompt.device)
        held = torch.cuda.memory_allocated(prompt.device)
    parts, tokens = [], []
    with torch.inference_mode(), in_mode(model, training=False):
        logits, state = model(prompt[None], output_state=True)
        for _ in range(count):
            parts.append(logits[0].cpu())
            tokens.append(logits[0, -1].argmax())
            if len(tokens) < count:
                logits, state = model(tokens[-1][None, None], state, output_state=True)
    peak = torch.cuda.max_memory_allocated(prompt.device) - held if prompt.is_cuda else None
    return torch.cat(parts), torch.stack(tokens).cpu(), peak

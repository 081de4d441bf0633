"""`compare=true`: both norm paths on one prompt, their logits compared to the bit."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from demo.checkpoints.checkpoint import Loaded
from demo.config.schema import NORM_PATHS
from demo.inference.bench import Speed, encode, time_run
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Comparison:
    """Both norm paths on the same prompt, greedily.

    Attributes:
        difference: The largest difference of two logits, over the prompt and the new tokens.
        other_bits: How many of the logits are not the same to the bit.
        logits: How many logits were compared.
        equal_tokens: How many new tokens are the same from the first on.
        speed: By norm path.
        peak_bytes: By norm path: the most memory held at once beyond the weights. None on a CPU,
            whose allocator does not count it.
    """

    difference: float
    other_bits: int
    logits: int
    equal_tokens: int
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
        table.add_row("differ in a bit", "", "", f"{self.other_bits:,} of {self.logits:,}")
        same = self.equal_tokens == count
        words = f"0 of {count:,}" if same else f"after {self.equal_tokens:,}"
        table.add_row("tokens differ", "", "", words)
        return table


def compare(loaded: Loaded, prompt: bytes, max_new_tokens: int, runs: int) -> Comparison:
    """Run both norm paths; the model is left on the path that it was on."""
    model, tokens = loaded.model, encode(loaded, prompt)
    before = model.norm_path
    logits, new, peak = {}, {}, {}
    seconds: dict[str, list] = {path: [] for path in NORM_PATHS}
    try:
        for path in NORM_PATHS:
            model.set_norm_path(path)
            logits[path], new[path], peak[path] = _greedy(model, tokens, max_new_tokens)
            time_run(model, tokens, max_new_tokens)  # captures graphs, and is not counted
        for _ in range(runs):  # in turn: a machine that is slow for a while is slow for both
            for path in NORM_PATHS:
                model.set_norm_path(path)
                seconds[path].append(time_run(model, tokens, max_new_tokens))
    finally:
        model.set_norm_path(before)
    equal = torch.eq(*new.values()).int().cumprod(0).sum().item()
    # the logits after two different tokens are not comparable
    one, other = (rows[: len(tokens) + equal] for rows in logits.values())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return Comparison(
        difference=(one - other).abs().max().item(),
        other_bits=(one.view(bits) != other.view(bits)).sum().item(),
        logits=one.numel(),
        equal_tokens=equal,
        speed={
            path: Speed(path, len(tokens), max_new_tokens, *map(median, zip(*runs, strict=True)))
            for path, runs in seconds.items()
        },
        peak_bytes=peak,
    )


def _greedy(model: LanguageModel, prompt: Tensor, count: int) -> tuple[Tensor, Tensor, int | None]:
    """Logits [prompt + count - 1, V] and the `count` likeliest tokens, on the CPU, and the most
    bytes that it took on a GPU."""
    training = model.training
    model.eval()
    if prompt.is_cuda:
        torch.cuda.reset_peak_memory_stats(prompt.device)
        held = torch.cuda.memory_allocated(prompt.device)
    parts, tokens = [], []
    with torch.inference_mode():
        logits, state = model(prompt[None], output_state=True)
        for _ in range(count):
            parts.append(logits[0].cpu())
            tokens.append(logits[0, -1].argmax())
            if len(tokens) < count:
                logits, state = model(tokens[-1][None, None], state, output_state=True)
    model.train(training)
    peak = torch.cuda.max_memory_allocated(prompt.device) - held if prompt.is_cuda else None
    return torch.cat(parts), torch.stack(tokens).cpu(), peak

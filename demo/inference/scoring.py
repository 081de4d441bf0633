"""`max_new_tokens=0`: what a model makes of the prompts themselves, token by token."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.checkpoints.checkpoint import Loaded
from models.generation import in_mode
from models.log_probs import log_probs_of

PIECE = 1024  # tokens at a time: what a long prompt takes in memory does not grow with it


@dataclass(frozen=True)
class Score:
    """What a model makes of one prompt.

    Attributes:
        prompt: As it was given; bytes that are not UTF-8 as U+FFFD.
        tokens: Of the prompt.
        log_probs: Natural log-probability of each token after those before it; None for the first,
            which nothing comes before.
        bytes: How many bytes of text the tokens after the first stand for.
        log_prob: The sum of `log_probs`.
        bits_per_byte: The same in bits, over `bytes`; NaN where these are 0.
    """

    prompt: str
    tokens: list[int]
    log_probs: list[float | None]
    bytes: int
    log_prob: float
    bits_per_byte: float

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


def score(loaded: Loaded, prompts: str | bytes | Sequence[str | bytes]) -> Score | list[Score]:
    """Score one prompt or many, for one `Score` or a list of them in the same order. On a terminal
    a long one shows how far it is.

    Raises:
        ValueError: for a prompt of fewer than two tokens.
    """
    if isinstance(prompts, str | bytes):
        return _score(loaded, prompts)
    return [_score(loaded, prompt) for prompt in prompts]


@torch.inference_mode()
def _score(loaded: Loaded, prompt: str | bytes) -> Score:
    text = prompt.encode() if isinstance(prompt, str) else prompt
    tokens = loaded.tokenizer.encode(text)
    if len(tokens) < 2:
        raise ValueError(
            f"a prompt must have at least two tokens to be scored, got {text!r}; give more text"
        )
    model, console = loaded.model, Console(stderr=True)
    device = next(model.parameters()).device
    ids = torch.tensor(tokens, dtype=torch.int64, device=device)
    pieces = range(0, len(tokens) - 1, PIECE)
    hidden = len(pieces) == 1 or not console.is_terminal
    state, found = None, []
    with in_mode(model, training=False):
        for start in track(pieces, "Scoring", console=console, transient=True, disable=hidden):
            piece = ids[start : start + PIECE + 1]
            logits, state = model(piece[None, :-1], state, output_state=True)
            found += log_probs_of(logits[0], piece[1:], model.exact).tolist()
    size = len(text) - _size(loaded.tokenizer.decode(tokens[:1]))
    total = math.fsum(found)
    bits = -total / math.log(2) / size if size else math.nan
    return Score(text.decode(errors="replace"), tokens, [None, *found], size, total, bits)


def _size(text: str) -> int:
    """Bytes of what one token stands for; of a part of a character, one is counted."""
    return 1 if text == "\ufffd" else len(text.encode())


def score_table(scores: Sequence[Score]) -> Table:
    table = Table(title="The prompt's own log-probabilities", title_justify="left")
    for column in ("prompt", "tokens", "bytes", "log-probability", "bits per byte"):
        justify = "left" if column == "prompt" else "right"
        width = 20 if column == "prompt" else None
        table.add_column(column, justify=justify, no_wrap=True, max_width=width)
    for found in scores:
        numbers = (f"{found.bytes:,}", f"{found.log_prob:,.1f}", f"{found.bits_per_byte:.3f}")
        table.add_row(repr(found.prompt[:60]), f"{len(found.tokens):,}", *numbers)
    return table

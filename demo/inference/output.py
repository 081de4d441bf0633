"""What infer.py prints of its texts: as they come, or a line of JSON for each."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo.checkpoints.checkpoint import Loaded
from demo.inference.texts import Options, PromptBatch, Result


class Speeds:
    """Tokens and seconds over several batches."""

    def __init__(self):
        self.prompts = self.prefill = self.decode = 0
        self.prefill_s = self.decode_s = 0.0

    def add(self, results: Sequence[Result]) -> None:
        self.prompts += len(results)
        self.prefill += sum(result.prompt_tokens for result in results)
        self.decode += sum(len(result.tokens) for result in results)
        self.prefill_s += max(result.prefill_s for result in results)
        self.decode_s += max(result.decode_s for result in results)

    def __str__(self) -> str:
        prompts = f"{self.prompts} prompts | " if self.prompts > 1 else ""
        # the first token of each prompt comes with the prefill
        prefill = _speed(self.prefill, self.prefill_s)
        decode = _speed(self.decode - self.prompts, self.decode_s)
        return (
            f"{prompts}prefill {number_of_tokens(self.prefill)}{prefill} | "
            f"decode {number_of_tokens(self.decode)}{decode}"
        )


def number_of_tokens(count: int) -> str:
    """So many tokens, or one token."""
    return f"{count:,} token{'s' * (count != 1)}"


def _speed(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""


def say(text: str, end: str = "\n") -> None:
    """Print at once."""
    print(text, end=end, flush=True)


def print_texts(
    loaded: Loaded, prompts: Sequence[bytes], batch_size: int, options: Options
) -> Speeds:
    """Each prompt and its continuation as it comes; several prompts under a header each."""
    sys.stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    speeds, number = Speeds(), 0
    for batch in _batches(loaded, prompts, batch_size, options):
        parts = _in_order(batch)
        for result in batch.results:
            number += 1
            if len(prompts) > 1:
                say(f"==> {number} of {len(prompts)} <==")
            say(result.prompt, end="")
            for piece in next(parts):
                say(piece, end="")
            say("\n" if number < len(prompts) else "")
        speeds.add(batch.results)
    if sys.stdout.isatty():
        print(file=sys.stderr)  # between the text and what is said about it
    return speeds


def print_json(
    loaded: Loaded, prompts: Sequence[bytes], batch_size: int, options: Options
) -> Speeds:
    """The fields of each `Result` as one line of JSON, as soon as its batch is complete."""
    speeds = Speeds()
    for batch in _batches(loaded, prompts, batch_size, options):
        for _ in batch:
            pass
        for result in batch.results:
            fields = dataclasses.asdict(result)
            fields["log_probs"] = [round(value, 6) for value in result.log_probs]
            for name in ("prefill_s", "decode_s"):
                fields[name] = round(fields[name], 6)
            say(json.dumps(fields))
        speeds.add(batch.results)
    return speeds


def readable(path: Path) -> str:
    """A path as it is seen from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _batches(loaded, prompts, batch_size, options) -> Iterator[PromptBatch]:
    for start in range(0, len(prompts), batch_size):
        yield PromptBatch(loaded, prompts[start : start + batch_size], options)


def _in_order(batch: PromptBatch) -> Iterator[Iterator[str]]:
    """For each prompt its pieces: as they come for the first that is not complete, and what had
    to wait for the others."""
    steps = iter(batch)
    waiting: list[list[str]] = [[] for _ in batch.results]

    def pieces(index: int) -> Iterator[str]:
        yield from waiting[index]
        while batch.results[index].finish is None:
            try:
                row, piece = next(steps)
            except StopIteration:
                return
            if row == index:
                yield piece
            else:
                waiting[row].append(piece)

    for index in range(len(batch.results)):
        yield pieces(index)

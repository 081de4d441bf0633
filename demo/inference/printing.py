"""What infer.py prints: texts as they come, or a line of JSON for each."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from demo.inference.scoring import Score, score_table
from demo.inference.text_generation import PromptBatch, Result

Results = list[list[Result]]  # by batch


def speed_line(batches: Results) -> str:
    """Tokens and tokens per second of prompts that went through the model batch by batch."""
    results = [result for batch in batches for result in batch]
    prompts = f"{len(results)} prompts | " if len(results) > 1 else ""
    prefill = sum(result.prompt_tokens for result in results)
    decode = sum(len(result.tokens) for result in results)
    prefill_s = sum(max(result.prefill_s for result in batch) for batch in batches)
    decode_s = sum(max(result.decode_s for result in batch) for batch in batches)
    # the first token of each prompt comes with the prefill
    return (
        f"{prompts}prefill {_tokens(prefill)}{_rate(prefill, prefill_s)} | "
        f"decode {_tokens(decode)}{_rate(decode - len(results), decode_s)}"
    )


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""


def print_texts(batches: Iterable[PromptBatch], prompts: int) -> Results:
    """Print each prompt and its continuation as it comes, under a header where there are several
    prompts."""
    sys.stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    done, number = [], 0
    for batch in batches:
        texts = []
        for result in batch.results:
            header = f"==> {number + 1} of {prompts} <==\n" if prompts > 1 else ""
            texts.append(("\n\n" if number else "") + header + result.prompt)
            number += 1
        for text in _in_order(batch, texts):
            print(text, end="", flush=True)
        done.append(batch.results)
    print(flush=True)
    if sys.stdout.isatty():
        print(file=sys.stderr)  # between the text and what is said about it
    return done


def print_json(batches: Iterable[PromptBatch]) -> Results:
    """Print the fields of each `Result` as a line of JSON, as soon as its batch is complete."""
    done = []
    for batch in batches:
        for result in batch.run():
            print(json.dumps(asdict(result)), flush=True)
        done.append(batch.results)
    return done


def print_measurement(measured: Any, output: str) -> None:
    """Print a `Speed` or a `Comparison` as a table, or as one line of JSON."""
    if output == "json":
        print(json.dumps(measured.record()))
    else:
        Console().print(measured.table())


def print_scores(scores: list[Score], output: str) -> None:
    """Print a table of what came of all prompts, or a line of JSON for each, token by token."""
    if output == "json":
        for score in scores:
            print(json.dumps(score.record()))
    else:
        Console().print(score_table(scores))


def _in_order(batch: PromptBatch, texts: list[str]) -> Iterator[str]:
    """The texts of a batch, which begin with `texts`, one after the other: the first that is not
    complete as it comes, while the others wait."""
    shown = 0
    yield texts[shown]
    texts[shown] = ""
    for index, piece in batch:
        texts[index] += piece
        while shown < len(texts):
            yield texts[shown]
            texts[shown] = ""
            if batch.results[shown].finish is None:
                break
            shown += 1
    yield "".join(texts)

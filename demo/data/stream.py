"""Training on a set that is read while it is trained on, and never stored.

Documents come in the order of the set, each process reads its own, and one whose text has a crc32
that is a multiple of `data.hold_out` is left to validation. A checkpoint keeps, for each process,
its position in the stream and the tokens that were read but not yet trained on. To see that it is
still the same stream one would have to read all of it; instead a checkpoint keeps the number of its
files, and checksums of its beginning and of the document that each process read last.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from demo.checkpoints.tokenizer import Tokenizer
from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.batches import Batch, Loader, check_keys, check_same, make_batch
from demo.data.corpus import Corpus, Documents, check_length, is_held_out
from demo.data.sources import read_stream
from demo.data.tokens import encode, token_dtype

if TYPE_CHECKING:
    import datasets


@dataclass(eq=False)
class StreamLoader(Loader):
    """Batches of rows that lie end to end in the training documents of a stream, which begins again
    when it is over.

    Args:
        stream: With a column `text`.
        tokenizer: Turns the documents into tokens.
        hold_out: One document in so many is left out.
        beginning: The crc32 of the documents that were read to find those for validation.

    Raises ConfigError when a process has no training documents, RunError as `read_stream` does.
    """

    stream: "datasets.IterableDataset"
    tokenizer: Tokenizer
    hold_out: int
    beginning: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rest: list[np.ndarray] = []  # tokens of documents, read but not yet trained on
        # The document read last: its crc32, and as `place` the stream's state_dict just before it.
        self._last: dict[str, Any] | None = None

    def batches(self) -> Iterator[Batch]:
        documents = self._documents()
        size = self.rows * self.sequence_length
        while True:
            while sum(map(len, self._rest)) <= size:  # the last target is one token more
                self._rest.append(next(documents))
            found = Documents.of(self._rest, token_dtype(self.tokenizer))
            row_starts = np.arange(0, size, self.sequence_length)
            self._rest = [found.tokens[size:]]  # of one document: it was read for the last target
            yield make_batch(found, row_starts, self.sequence_length, self.reset_state)

    def state_dict(self) -> dict[str, Any]:
        """The state of all processes. Each has to call it, though only the first writes it."""
        rest = [torch.from_numpy(tokens.astype(np.int64)) for tokens in self._rest]
        everyone = self.gather({"last": self._last, "rest": rest})
        return {
            "position": self.position,
            "beginning": self.beginning,
            "shards": self.stream.num_shards,
            "processes": everyone[:: len(everyone) // self.world_size],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = state["processes"][self.rank]
        self.position, self._last = state["position"], own["last"]
        dtype = token_dtype(self.tokenizer)
        self._rest = [tokens.numpy().astype(dtype) for tokens in own["rest"]]

    def check_has_text(self) -> None:
        """Raises ConfigError when a process has nothing to train on. The first process, which
        prints errors, checks all of them."""
        for rank in self._ranks_to_check():
            if not any(self._texts(rank)):
                raise self._no_text(rank)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when `state`, of a run to resume, is of another stream. The first
        process, which prints errors, checks all of them."""
        check_keys(state, ["beginning", "position", "processes", "shards"])
        count = len(state["processes"])
        check_same("the number of processes of a stream", count, self.world_size, f"use {count}")
        check_same("the number of files of the stream", state["shards"], self.stream.num_shards)
        check_same("the crc32 of the stream's beginning", state["beginning"], self.beginning)
        for rank in self._ranks_to_check():
            last = state["processes"][rank]["last"]
            _, text = next(self._texts(rank, last["place"]), (None, b""))
            what = f"the crc32 of the document that process {rank} read last"
            check_same(what, last["crc32"], zlib.crc32(text))

    def _ranks_to_check(self) -> range:
        return range(self.world_size if self.rank == 0 else 0)

    def _documents(self) -> Iterator[np.ndarray]:
        """The tokens of this process's training documents after the one that was read last, and
        then of all of them, again and again."""
        place, known = (self._last["place"], 1) if self._last else (None, 0)
        while True:
            found = bool(known)
            for before, text in islice(self._texts(self.rank, place), known, None):
                self._last, found = {"place": before, "crc32": zlib.crc32(text)}, True
                yield np.array(encode(self.tokenizer, text), token_dtype(self.tokenizer))
            if not found:
                raise self._no_text(self.rank)
            place, known = None, 0

    def _texts(
        self, rank: int, place: dict[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
        """The training documents of a process from `place` on, each after its own place. A place is
        a state_dict of the stream, None at its beginning."""
        from datasets.distributed import split_dataset_by_node

        stream = split_dataset_by_node(self.stream, rank, self.world_size)
        if place is not None:
            stream.load_state_dict(place)
        for text in read_stream(stream, self.rank):
            if text and not is_held_out(zlib.crc32(text), self.hold_out):
                yield place, text
            place = stream.state_dict()

    def _no_text(self, rank: int) -> ConfigError:
        return ConfigError(
            "data.name must be a set with training text for each process, got none for process "
            f"{rank} of {self.world_size}; use fewer, or data.streaming=false"
        )


def validation_corpus(
    stream: "datasets.IterableDataset", config: DataConfig, tokenizer: Tokenizer
) -> tuple[Corpus, int]:
    """The first held-out documents of a stream, until they have more than `config.val_tokens`
    tokens, as a corpus that has none for training. And the crc32 of all that was read to find them.
    Raises ConfigError, and RunError as `read_stream` does."""
    if config.val_tokens is None:
        raise ConfigError(
            "data.val_tokens must be a number with data.streaming=true, got null: a stream has no "
            "end to look for; use for example data.val_tokens=65536"
        )
    texts, documents, tokens, beginning = [], [], 0, 0
    for text in read_stream(stream):
        beginning = zlib.crc32(text, beginning)
        if text and is_held_out(zlib.crc32(text), config.hold_out):
            texts.append(text)
            documents.append(encode(tokenizer, text))
            tokens += len(documents[-1])
            if tokens > config.val_tokens:
                break
    val_text, dtype = b"".join(texts), token_dtype(tokenizer)
    val = Documents.of(documents, dtype, len(val_text))
    check_length(val, config, "validation", len(documents))
    return Corpus(Documents.of([], dtype), val, val_text), beginning

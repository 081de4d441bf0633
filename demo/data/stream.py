"""Training on a set that is read while it is trained on, and never stored.

Documents come in the order of the set, each process reads its own, and one whose text has a crc32
that is a multiple of `data.hold_out` is left to validation. The position in the stream, and what
was read of it but not yet trained on, go into a checkpoint, for each process. So do the
number of its files and checksums of its beginning and of the document before each place: nobody can
look over all of a stream to see that it is the same one.
"""

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from demo.checkpoints.tokenizer import Tokenizer
from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.batches import ANOTHER_TEXT, Batch, check_loader_state, make_batch
from demo.data.corpus import (
    Corpus,
    Documents,
    check_length,
    encode,
    is_held_out,
    token_dtype,
)
from demo.data.sources import read_stream

if TYPE_CHECKING:
    import datasets


class StreamLoader:
    """Batches of rows that lie end to end in the training documents of a stream, again from its
    beginning when it is over.

    Args:
        stream: With a column `text`.
        tokenizer: What makes tokens of it.
        hold_out: One document in so many is left out.
        batch_size, sequence_length, steps, rank, world_size, reset_state: As for
            `demo.data.batches.TrainLoader`, which also says what it yields.
        beginning: A checksum of the first documents.
    """

    def __init__(
        self,
        stream: "datasets.IterableDataset",
        tokenizer: Tokenizer,
        hold_out: int,
        batch_size: int,
        sequence_length: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        reset_state: bool = False,
        beginning: int = 0,
    ) -> None:
        assert batch_size % world_size == 0
        self.stream, self.tokenizer = stream, tokenizer
        self.hold_out, self.beginning = hold_out, beginning
        self.rows, self.sequence_length = batch_size // world_size, sequence_length
        self.steps, self.reset_state = steps, reset_state
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._rest: list[np.ndarray] = []  # documents, read but not yet trained on
        self._last: dict[str, Any] | None = None  # the document read last: its place and checksum

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        documents = self._documents()
        needed = self.rows * self.sequence_length + 1
        while self.position < self.steps:
            while sum(map(len, self._rest)) < needed:
                self._rest.append(next(documents))
            found = Documents.of(self._rest, self._rest[0].dtype)
            begins = self.sequence_length * np.arange(self.rows)
            batch = make_batch(found, begins, self.sequence_length, self.reset_state)
            # The last target is the next batch's first input.
            cut = self.rows * self.sequence_length
            ends = found.starts[1:]
            self._rest = np.split(found.tokens[cut:], ends[(ends > cut) & (ends < ends[-1])] - cut)
            self.position += 1
            yield batch
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Of all processes, which all have to ask: the first alone writes the checkpoint."""
        rest = [torch.from_numpy(tokens.astype(np.int64)) for tokens in self._rest]
        return {
            "position": self.position,
            "beginning": self.beginning,
            "shards": self.stream.num_shards,
            "processes": self._gather({"last": self._last, "rest": rest}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = state["processes"][self.rank]
        self.position, self._last = state["position"], own["last"]
        dtype = token_dtype(self.tokenizer)
        self._rest = [tokens.numpy().astype(dtype) for tokens in own["rest"]]

    def check(self, state: dict[str, Any] | None) -> None:
        """Raises ConfigError when a process would have nothing to train on, or when `state`, of
        the run that is to go on, is not one in this stream. The first process looks for all: it is
        the one that prints."""
        if state is None:
            without = (rank for rank in self._own_ranks() if not any(self._texts(rank, None)))
            if (rank := next(without, None)) is not None:
                raise self._no_text(rank)
            return
        check_loader_state(state, {"position", "beginning", "shards", "processes"})
        count = len(state["processes"])
        if count != self.world_size:
            raise ConfigError(
                "resume with data.streaming=true must have as many processes as the run that is "
                f"resumed, {count}, got {self.world_size}; use {count}, or start another run from "
                "its weights with checkpoint="
            )
        if state["shards"] != self.stream.num_shards:
            raise ConfigError(
                "the stream must have as many files as that of the run that is resumed, "
                f"{state['shards']}, got {self.stream.num_shards}; {ANOTHER_TEXT}"
            )
        if state["beginning"] != self.beginning:
            raise ConfigError(
                "the stream must begin like that of the run that is resumed, with crc32 "
                f"{state['beginning']:08x}, got {self.beginning:08x}; {ANOTHER_TEXT}"
            )
        for rank in self._own_ranks():
            last = state["processes"][rank]["last"]
            found = next(self._texts(rank, last["place"]), (None, b""))[1]
            if zlib.crc32(found) != last["crc32"]:
                raise ConfigError(
                    "the stream must have the document that process "
                    f"{rank} of the run that is resumed read last, with crc32 {last['crc32']:08x}, "
                    f"where it was, got {zlib.crc32(found):08x}; {ANOTHER_TEXT}"
                )

    def _own_ranks(self) -> range:
        return range(self.world_size if self.rank == 0 else 0)

    def _gather(self, own: Any) -> list[Any]:
        """What each process has, by rank."""
        every = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(every, own)
        return every

    def _documents(self) -> Iterator[np.ndarray]:
        """The tokens of this process's training documents, after the one that was read last."""
        dtype = token_dtype(self.tokenizer)
        known = self._last is not None  # of a run that goes on: its tokens are there already
        while True:
            found, begins = known, self._last["place"] if known else None
            for place, text in islice(self._texts(self.rank, begins), known, None):
                self._last, found = {"place": place, "crc32": zlib.crc32(text)}, True
                yield np.array(encode(self.tokenizer, text), dtype)
            if not found:
                raise self._no_text(self.rank)
            known = False

    def _no_text(self, rank: int) -> ConfigError:
        return ConfigError(
            "data.name must be a set with training text for each process, got none for process "
            f"{rank} of {self.world_size}; use fewer, or data.streaming=false"
        )

    def _texts(self, rank: int, place: dict | None) -> Iterator[tuple[dict | None, bytes]]:
        """The training documents of a process from `place` on, None for the beginning, and the
        place of each."""
        from datasets.distributed import split_dataset_by_node

        reading = split_dataset_by_node(self.stream, rank, self.world_size)
        if place is not None:
            reading.load_state_dict(place)
        for text in read_stream(reading, self.rank):
            if text and not is_held_out(text, self.hold_out):
                yield place, text
            place = reading.state_dict()


def validation_corpus(
    stream: "datasets.IterableDataset", config: DataConfig, tokenizer: Tokenizer
) -> tuple[Corpus, int]:
    """The first held-out documents of a stream, `config.val_tokens` of their tokens, with no
    documents for training; and a checksum of all that was read of it for them. Raises
    ConfigError."""
    if config.val_tokens is None:
        raise ConfigError(
            "data.val_tokens must be a number with data.streaming=true, got null: a stream has no "
            "end to look for; use for example data.val_tokens=65536"
        )
    texts, documents, tokens, beginning = [], [], 0, 0
    for text in read_stream(stream):
        beginning = zlib.crc32(text, beginning)
        if text and is_held_out(text, config.hold_out):
            texts.append(text)
            documents.append(encode(tokenizer, text))
            tokens += len(documents[-1])
            if tokens > config.val_tokens:
                break
    held_out = b"".join(texts)
    dtype = token_dtype(tokenizer)
    val = Documents.of(documents, dtype, len(held_out))
    check_length(val, config, "validation", len(documents))
    return Corpus(Documents.of([], dtype), val, held_out), beginning

"""Training on a set that is read while it is trained on, and never stored.

Documents come in the order of the set, each process reads its own, and one whose text has a crc32
that is a multiple of `data.hold_out` is left to validation. The position in the stream, and what
was read of it but not yet trained on, go into a checkpoint, for each process.
"""

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.schema import ConfigError, DataConfig
from models.checkpoints.tokenizer import Tokenizer
from models.data.batches import Batch, make_batch
from models.data.corpus import Corpus, Documents, check_length, token_dtype
from models.data.sources import as_bytes

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
            `models.data.batches.TrainLoader`, which also says what it yields.
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
    ) -> None:
        assert batch_size % world_size == 0
        self.stream, self.tokenizer, self.hold_out = stream, tokenizer, hold_out
        self.rows, self.sequence_length = batch_size // world_size, sequence_length
        self.steps, self.reset_state = steps, reset_state
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._rest: list[np.ndarray] = []  # documents, read but not yet trained on
        self._place: dict[str, Any] | None = None  # where the stream goes on
        self._reading: Any = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        documents = self._documents()
        if self._place is None:
            self._rest += self._first(documents)
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
        place = self._place if self._reading is None else self._reading.state_dict()
        rest = [torch.from_numpy(tokens.astype(np.int64)) for tokens in self._rest]
        return {
            "position": self.position,
            "processes": self._gather({"place": place, "rest": rest}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when another number of processes read the stream apart."""
        states = state["processes"]
        if len(states) != self.world_size:
            raise ConfigError(
                "resume with data.streaming=true must have as many processes as the run that is "
                f"resumed, {len(states)}, got {self.world_size}; use {len(states)}, or start "
                "another run from its weights with checkpoint="
            )
        self.position, self._place = state["position"], states[self.rank]["place"]
        dtype = token_dtype(self.tokenizer)
        self._rest = [tokens.numpy().astype(dtype) for tokens in states[self.rank]["rest"]]

    def _gather(self, own: Any) -> list[Any]:
        """What each process has, by rank."""
        every = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(every, own)
        return every

    def _documents(self) -> Iterator[np.ndarray]:
        from datasets.distributed import split_dataset_by_node

        dtype = token_dtype(self.tokenizer)
        while True:
            # A stream that was once told its place would begin there again.
            self._reading = split_dataset_by_node(self.stream, self.rank, self.world_size)
            begins_anew = self._place is None
            if not begins_anew:
                self._reading.load_state_dict(self._place)
                self._place = None
            found = False
            for row in self._reading:
                text = as_bytes(row["text"])
                if text and not is_held_out(text, self.hold_out):
                    found = True
                    yield np.array(encode(self.tokenizer, text), dtype)
            if begins_anew and not found:
                return

    def _first(self, documents: Iterator[np.ndarray]) -> list[np.ndarray]:
        """The first of them. All processes raise ConfigError when one has none: the others would
        wait for it, and the first alone prints."""
        first = list(islice(documents, 1))
        without = [rank for rank, found in enumerate(self._gather(bool(first))) if not found]
        if without:
            raise ConfigError(
                "data.name must be a set with training text for each process, got none for process "
                f"{without[0]} of {self.world_size}; use fewer, or data.streaming=false"
            )
        return first


def validation_corpus(
    stream: "datasets.IterableDataset", config: DataConfig, tokenizer: Tokenizer
) -> Corpus:
    """The first held-out documents of a stream, `config.val_tokens` of their tokens, with no
    documents for training. Raises ConfigError."""
    if config.val_tokens is None:
        raise ConfigError(
            "data.val_tokens must be a number with data.streaming=true, got null: a stream has no "
            "end to look for; use for example data.val_tokens=65536"
        )
    texts, documents, tokens = [], [], 0
    for row in stream:
        text = as_bytes(row["text"])
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
    return Corpus(Documents.of([], dtype), val, held_out)


def is_held_out(text: bytes, one_in: int) -> bool:
    return zlib.crc32(text) % one_in == 0


def encode(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The tokens of a document and its end, if the tokenizer has one."""
    return tokenizer.encode(text) + ([] if tokenizer.eos is None else [tokenizer.eos])

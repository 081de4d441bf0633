"""From documents to batches: rows of consecutive tokens, in an order that follows from a seed.

The whole run is one list of batches: batch `i` is a function of the seed and of `i` alone. So the
position of the loader is one number, which goes into a checkpoint, and several processes read
their own rows of each batch, nothing twice. (A stream cannot be looked up: demo/data/stream.py.)
"""

import math
import zlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from demo.config.errors import ConfigError
from demo.data.corpus import Documents

VALIDATION_TOKENS = 8192  # in a batch


class Packed(NamedTuple):
    """Rows of which each document begins with an empty state.

    Attributes:
        tokens (torch.Tensor): int64 [rows, tokens + 1].
        offsets (numpy.ndarray): int32 [sequences + 1], `cu_seqlens` of the rows' inputs end to end.
            On the host, where the model reads it.
    """

    tokens: torch.Tensor
    offsets: np.ndarray


Batch = torch.Tensor | Packed

ANOTHER_TEXT = "put that text back, or start another run from its weights with checkpoint="


def check_loader_state(state: dict[str, Any], keys: set[str]) -> None:
    """Raises ConfigError when a loader's state in a checkpoint does not have these keys."""
    if set(state) != keys:
        raise ConfigError(
            "the position in the data must be one that this version can read, got the parts "
            f"{', '.join(sorted(state))} in the checkpoint, not {', '.join(sorted(keys))}; resume "
            "with the version that wrote it, or start another run from its weights with checkpoint="
        )


def make_batch(
    documents: Documents, begins: np.ndarray, sequence_length: int, reset_state: bool
) -> Batch:
    """The rows that begin at these tokens; a row carries one token more, the target of its last."""
    rows = [documents.tokens[begin : begin + sequence_length + 1] for begin in begins]
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    if not reset_state:
        return tokens
    starts, offsets = documents.starts, [np.zeros(1, np.int64)]
    for row, begin in enumerate(begins):
        first = np.searchsorted(starts, begin, "right")
        last = np.searchsorted(starts, begin + sequence_length, "left")
        inside = np.append(starts[first:last] - begin, sequence_length)
        offsets.append(np.unique(inside) + row * sequence_length)  # an empty document has no place
    return Packed(tokens, np.concatenate(offsets).astype(np.int32))


class TrainLoader:
    """Batches of training rows, epoch after epoch.

    An epoch visits every row of `sequence_length` tokens once, in random order; the rows begin at
    another offset in every epoch. A row carries one token more, the target of its last.

    Args:
        documents: The tokens to read.
        batch_size: Rows in a batch, over all processes.
        sequence_length: Tokens in a row.
        steps: Number of batches.
        seed: Of the order.
        rank, world_size: This process and how many there are; `batch_size` must be a multiple.
        reset_state: Whether a document begins with an empty state.

    Yields int64 tensors [batch_size / world_size, sequence_length + 1], in a `Packed` with
    `reset_state`.
    """

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        sequence_length: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        reset_state: bool = False,
    ) -> None:
        assert batch_size % world_size == 0
        self.documents, self.reset_state = documents, reset_state
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.steps, self.seed = steps, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        self._compare()
        while self.position < self.steps:
            batch = self.batch(self.position)
            # Before the yield: a checkpoint taken while this batch trains counts it as read.
            self.position += 1
            yield batch
        self.position = 0

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`."""
        share = self.batch_size // self.world_size
        first = index * self.batch_size + self.rank * share
        begins = np.array([self._begin(row) for row in range(first, first + share)])
        return make_batch(self.documents, begins, self.sequence_length, self.reset_state)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "text": self._text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def check(self, state: dict[str, Any] | None) -> None:
        """Raises ConfigError when `state`, of the run that is to go on, is not one in this text."""
        if state is None:
            return
        check_loader_state(state, {"position", "text"})
        if state["text"] != self._text:
            raise ConfigError(
                "the training tokens must be those of the run that is resumed, "
                f"{_in_words(state['text'])}, got {_in_words(self._text)}; {ANOTHER_TEXT}"
            )

    def _compare(self) -> None:
        """Raises ConfigError in every process when one of them, perhaps on another machine, has
        another text: each reads its own rows."""
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return
        texts = [self._text] * self.world_size
        torch.distributed.all_gather_object(texts, self._text)
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise ConfigError(
                    f"all processes must have the same training tokens, got {_in_words(texts[0])} "
                    f"in process 0 and {_in_words(text)} in process {rank}; give them the same "
                    "files, for data=stdlib the same Python"
                )

    @cached_property
    def _text(self) -> dict[str, int]:
        """What tells the documents from others."""
        crc = zlib.crc32(self.documents.starts, zlib.crc32(self.documents.tokens))
        return {"tokens": len(self.documents.tokens), "crc32": crc}

    def _begin(self, row: int) -> int:
        # Every epoch has the same number of rows, so that a row's epoch is a division.
        per_epoch = max(1, (len(self.documents.tokens) - 1) // self.sequence_length - 1)
        epoch, place = divmod(row, per_epoch)
        return self._begins(epoch, per_epoch)[place]

    def _begins(self, epoch: int, per_epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            spare = len(self.documents.tokens) - 1 - per_epoch * self.sequence_length
            offset = generator.integers(min(spare, self.sequence_length) + 1)
            self._epoch = epoch, offset + self.sequence_length * generator.permutation(per_epoch)
        return self._epoch[1]


def _in_words(text: dict[str, int]) -> str:
    return f"{text['tokens']} (crc32 {text['crc32']:08x})"


class ValidationLoader:
    """Rows of held-out text that lie end to end, or `max_tokens` of them spread evenly over it.

    Each of `world_size` processes gets its share of the rows, in as many batches as the others.

    Yields int64 tensors [about batch_size, sequence_length + 1], in a `Packed` with `reset_state`.
    Raises ConfigError when there are fewer rows than processes.
    """

    def __init__(
        self,
        documents: Documents,
        sequence_length: int,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        reset_state: bool = False,
        batch_size: int | None = None,
    ) -> None:
        batch_size = batch_size or max(1, VALIDATION_TOKENS // sequence_length)
        begins = np.arange(0, len(documents.tokens) - sequence_length, sequence_length)
        if max_tokens is not None and max_tokens < len(begins) * sequence_length:
            keep = max(1, max_tokens // sequence_length)
            begins = begins[np.linspace(0, len(begins) - 1, keep).round().astype(int)]
        if len(begins) < world_size:
            raise ConfigError(
                f"data.val_tokens must give each of {world_size} processes a row of "
                f"data.sequence_length={sequence_length} tokens, got {len(begins)} rows in "
                f"{len(documents.tokens)} held-out tokens with data.val_tokens="
                f"{'null' if max_tokens is None else max_tokens}; raise it, shorten the rows or "
                "lower data.hold_out"
            )
        # Processes that work in step need the same number of batches, if not of the same size, and
        # none of them empty.
        count = math.ceil(math.ceil(len(begins) / world_size) / batch_size)
        count = min(count, len(begins) // world_size)
        self.batches = np.array_split(np.array_split(begins, world_size)[rank], count)
        self.documents, self.sequence_length = documents, sequence_length
        self.reset_state = reset_state

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for begins in self.batches:
            yield make_batch(self.documents, begins, self.sequence_length, self.reset_state)

"""From documents to batches: rows of consecutive tokens, in an order that follows from a seed.

The whole run is one list of batches: batch `i` is a function of the seed and of `i` alone. So the
position of the loader is one number, which goes into a checkpoint, and each of several processes
reads its own rows of each batch. (A stream cannot be looked up: see demo/data/stream.py.)
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from demo.config.errors import ConfigError
from demo.data.corpus import Documents
from models.ranges import as_written

VALIDATION_TOKENS = 8192  # in a batch


class Packed(NamedTuple):
    """Rows in which each document begins with an empty state.

    Attributes:
        tokens (torch.Tensor): int64 [rows, sequence_length + 1].
        cu_seqlens (numpy.ndarray): int32 [sequences + 1], where each document or part of one begins
            in the rows' inputs laid end to end, and the end. On the host, where the model reads it.
    """

    tokens: torch.Tensor
    cu_seqlens: np.ndarray


Batch = torch.Tensor | Packed


def make_batch(
    documents: Documents, row_starts: np.ndarray, sequence_length: int, reset_state: bool
) -> Batch:
    """The rows that begin at these tokens; a row carries one token more, the target of its last."""
    rows = [documents.tokens[start : start + sequence_length + 1] for start in row_starts]
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    if not reset_state:
        return tokens
    ends = [np.zeros(1, np.int64)]
    for row, start in enumerate(row_starts):
        first = np.searchsorted(documents.starts, start, "right")
        last = np.searchsorted(documents.starts, start + sequence_length, "left")
        inside = np.append(documents.starts[first:last] - start, sequence_length)
        ends.append(np.unique(inside) + row * sequence_length)  # each once: a document may be empty
    return Packed(tokens, np.concatenate(ends).astype(np.int32))


@dataclass(eq=False, kw_only=True)
class Loader(ABC):
    """Batches of training rows for one of several processes, with a position to resume from.

    What it reads is up to a subclass: `TrainLoader` here, `StreamLoader` in demo/data/stream.py.

    Args:
        batch_size: Rows in a batch, over all processes.
        sequence_length: Tokens in a row.
        steps: Number of batches.
        rank, world_size: This process and how many there are that read different rows;
            `batch_size` must be a multiple.
        reset_state: Whether a document begins with an empty state.

    Yields int64 tensors [batch_size / world_size, sequence_length + 1], in a `Packed` with
    `reset_state`.
    """

    batch_size: int
    sequence_length: int
    steps: int
    rank: int = 0
    world_size: int = 1
    reset_state: bool = False
    position: int = field(default=0, init=False)  # how many batches have been read

    def __post_init__(self) -> None:
        assert self.batch_size % self.world_size == 0
        self.rows = self.batch_size // self.world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        batches = self.batches()
        while self.position < self.steps:
            batch = next(batches)
            # Before the yield: a checkpoint taken while this batch trains counts it as read.
            self.position += 1
            yield batch
        self.position = 0

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """From `position` on, without end."""

    def gather(self, own: Any) -> list[Any]:
        """What each process has, by its rank among all, of which neighbours may read the same rows.
        Every process has to call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [own] * self.world_size
        gathered = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, own)
        return gathered


@dataclass(eq=False)
class TrainLoader(Loader):
    """Batches of documents that lie in memory, epoch after epoch.

    An epoch visits every row of `sequence_length` tokens once, in random order; the rows begin at
    another offset in every epoch.

    Args:
        documents: The tokens to read.
        seed: Of the order.

    Raises ConfigError when the processes have different documents.
    """

    documents: Documents
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        # Every epoch has the same number of rows, so that a row's epoch is a division.
        self._epoch_rows = max(1, (len(self.documents.tokens) - 1) // self.sequence_length - 1)
        self._epoch: int | None = None

    def batches(self) -> Iterator[Batch]:
        checksums = self.gather(self._checksum)
        for rank, checksum in enumerate(checksums):
            if checksum != checksums[0]:
                raise ConfigError(
                    "all processes must have the same training tokens, got "
                    f"{_format(checksums[0])} in process 0 and {_format(checksum)} in process "
                    f"{rank}; give them the same files, for data=stdlib the same Python"
                )
        while True:
            yield self.batch(self.position)

    def batch(self, index: int) -> Batch:
        """This process's rows of batch `index`."""
        first = index * self.batch_size + self.rank * self.rows
        starts = np.array([self._row_start(row) for row in range(first, first + self.rows)])
        return make_batch(self.documents, starts, self.sequence_length, self.reset_state)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "text": self._checksum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when `state`, of a run to resume, is of other documents."""
        check_keys(state, ["position", "text"])
        check_same("the training tokens", _format(state["text"]), _format(self._checksum))

    @cached_property
    def _checksum(self) -> dict[str, int]:
        crc32 = zlib.crc32(self.documents.starts, zlib.crc32(self.documents.tokens))
        return {"tokens": len(self.documents.tokens), "crc32": crc32}

    def _row_start(self, row: int) -> int:
        epoch, index = divmod(row, self._epoch_rows)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            spare = len(self.documents.tokens) - 1 - self._epoch_rows * self.sequence_length
            offset = generator.integers(min(spare, self.sequence_length) + 1)
            order = generator.permutation(self._epoch_rows)
            self._epoch, self._row_starts = epoch, offset + self.sequence_length * order
        return self._row_starts[index]


def _format(checksum: dict[str, int]) -> str:
    return f"{checksum['tokens']} (crc32 {checksum['crc32']:08x})"


def check_keys(state: dict[str, Any], keys: list[str]) -> None:
    """Raises ConfigError when a loader's state in a checkpoint has other keys than these."""
    what, remedy = "the parts of the position in the data", "use the version that wrote it"
    check_same(what, ", ".join(sorted(state)), ", ".join(keys), remedy)


def check_same(what: str, before: Any, now: Any, remedy: str = "put that text back") -> None:
    """Raises ConfigError when `what` was another one in the run that is resumed."""
    if before != now:
        raise ConfigError(
            f"{what} must be as in the run that is resumed, {before}, got {now}; {remedy}, or "
            "start another run from its weights with checkpoint="
        )


@dataclass(eq=False)
class ValidationLoader:
    """Rows of held-out text that lie end to end, or `max_tokens` of them spread evenly over it.

    Each of `world_size` processes gets its own rows, in as many batches as the others.

    Yields int64 tensors [about batch_size, sequence_length + 1], in a `Packed` with `reset_state`.
    Raises ConfigError when there are fewer rows than processes.
    """

    documents: Documents
    sequence_length: int
    max_tokens: int | None = None
    rank: int = 0
    world_size: int = 1
    reset_state: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        length, tokens = self.sequence_length, len(self.documents.tokens)
        starts = np.arange(0, tokens - length, length)
        if self.max_tokens is not None and self.max_tokens < len(starts) * length:
            count = max(1, self.max_tokens // length)
            starts = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
        if len(starts) < self.world_size:
            raise ConfigError(
                f"data.val_tokens must give each of {self.world_size} processes a row of "
                f"data.sequence_length={length} tokens, got {len(starts)} rows in {tokens} "
                f"held-out tokens with data.val_tokens={as_written(self.max_tokens)}; raise it, "
                "shorten the rows or lower data.hold_out"
            )
        # Processes work in step: they need the same number of batches, if not of the same size, and
        # none of them empty.
        batch_size = self.batch_size or max(1, VALIDATION_TOKENS // length)
        most, fewest = math.ceil(len(starts) / self.world_size), len(starts) // self.world_size
        batches = min(math.ceil(most / batch_size), fewest)
        own = np.array_split(starts, self.world_size)[self.rank]
        self.row_starts = np.array_split(own, batches)

    def __len__(self) -> int:
        return len(self.row_starts)

    def __iter__(self) -> Iterator[Batch]:
        for starts in self.row_starts:
            yield make_batch(self.documents, starts, self.sequence_length, self.reset_state)

"""From documents to batches: rows of consecutive tokens, in an order that follows from a seed.

The whole run is one list of batches: batch `i` is a function of the seed and of `i` alone. So the
position of the loader is one number, which goes into a checkpoint, and several processes read
their own rows of each batch, nothing twice.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from models.corpus import Documents


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

    Yields int64 tensors [batch_size / world_size, sequence_length + 1].
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
    ) -> None:
        assert batch_size % world_size == 0
        self.tokens = documents.tokens
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.steps, self.seed = steps, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.position < self.steps:
            batch = self.batch(self.position)
            # Before the yield: a checkpoint taken while this batch trains counts it as read.
            self.position += 1
            yield batch
        self.position = 0

    def batch(self, index: int) -> torch.Tensor:
        """This process's rows of batch `index`."""
        share = self.batch_size // self.world_size
        first = index * self.batch_size + self.rank * share
        rows = [self._row(row) for row in range(first, first + share)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def _row(self, row: int) -> np.ndarray:
        # Every epoch has the same number of rows, so that a row's epoch is a division.
        per_epoch = max(1, (len(self.tokens) - 1) // self.sequence_length - 1)
        epoch, place = divmod(row, per_epoch)
        begin = self._begins(epoch, per_epoch)[place]
        return self.tokens[begin : begin + self.sequence_length + 1]

    def _begins(self, epoch: int, per_epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - per_epoch * self.sequence_length
            offset = generator.integers(min(spare, self.sequence_length) + 1)
            self._epoch = epoch, offset + self.sequence_length * generator.permutation(per_epoch)
        return self._epoch[1]


class ValidationLoader:
    """Rows of held-out text that lie end to end, or `max_tokens` of them spread evenly over it.

    Each of `world_size` processes gets its share of the rows, in as many batches as the others.

    Yields int64 tensors [up to batch_size, sequence_length + 1].
    """

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        sequence_length: int,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        begins = np.arange(0, len(documents.tokens) - sequence_length, sequence_length)
        if max_tokens is not None and max_tokens < len(begins) * sequence_length:
            keep = max(1, max_tokens // sequence_length)
            begins = begins[np.linspace(0, len(begins) - 1, keep).round().astype(int)]
        rows = np.stack([documents.tokens[b : b + sequence_length + 1] for b in begins])
        # Processes that work in step need the same number of batches, if not of the same size.
        count = math.ceil(math.ceil(len(rows) / world_size) / batch_size)
        share = torch.from_numpy(rows).tensor_split(world_size)[rank]
        self.batches = share.tensor_split(count)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch.long() for batch in self.batches)

"""Documents as tokens: those for training, and those that are held out for validation.

A crc32 says which documents are held out: of a file's path relative to the folder that was
searched, or of the text of a table's row. So the split depends neither on order nor on the machine.
Of a single document the end is held out.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from demo.checkpoints.tokenizer import ByteTokenizer, Tokenizer
from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.files import Files, find_all
from demo.data.sources import open_hub, read_files
from demo.data.tokens import texts, token_dtype, tokenize

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end.

    Attributes:
        tokens (numpy.ndarray): [tokens], of the smallest unsigned type that holds the vocabulary.
        starts (numpy.ndarray): [documents + 1] int64, where each document begins, and the end.
        text_size: Bytes of text that the tokens stand for; None for one each.
        size: The same, known.
    """

    tokens: np.ndarray
    starts: np.ndarray
    text_size: int | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def size(self) -> int:
        return self.tokens.size if self.text_size is None else self.text_size

    @property
    def bytes_per_token(self) -> float:
        return self.size / self.tokens.size if self.tokens.size else 1.0

    @classmethod
    def of(
        cls, documents: Sequence[Any], dtype: Any = np.uint8, text_size: int | None = None
    ) -> "Documents":
        """From each document's tokens."""
        starts = np.array([0, *map(len, documents)], dtype=np.int64).cumsum()
        tokens = np.concatenate([np.empty(0, dtype), *(np.asarray(d, dtype) for d in documents)])
        return cls(tokens, starts, text_size)


@dataclass(frozen=True)
class Corpus:
    """Attributes:
    val_text: The bytes that the tokens of `val` stand for.
    files: What they were read from, None for a set of the hub.
    """

    train: Documents
    val: Documents
    val_text: bytes
    files: Files | None = None


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Find, read, split and tokenize the documents that `config` names. Raises ConfigError."""
    tokenizer = tokenizer or ByteTokenizer()
    files = None if config.source == "hub" else find_all(config)
    table = open_hub(config) if files is None else read_files(files, config)
    sizes, checksums = _measure(table)
    count, cut = len(sizes), None
    if count == 1:
        tail = sizes[0] // config.hold_out
        cut, held_out = sizes[0] - tail, np.array([False, True])
        sizes = [cut, tail]
    else:
        held_out = np.array(choose_held_out(checksums, config.hold_out), bool)
    if isinstance(tokenizer, ByteTokenizer):
        rows = (
            (document, np.frombuffer(piece, np.uint8)) for document, _, piece in texts(table, cut)
        )
    else:
        rows = _token_rows(tokenize(table, tokenizer, cut))
    tokens = [[np.empty(0, token_dtype(tokenizer))] for _ in range(2)]  # for training, held out
    lengths = np.zeros(len(sizes), np.int64)
    for document, part in rows:
        tokens[int(held_out[document])].append(part)
        lengths[document] += len(part)
    parts = []
    for part, chosen in (("training", ~held_out), ("validation", held_out)):
        starts = np.concatenate([[0], lengths[chosen].cumsum()])
        size = int(np.array(sizes, np.int64)[chosen].sum())
        parts.append(Documents(np.concatenate(tokens.pop(0)), starts, size))
        check_length(parts[-1], config, part, count)
    val_text = b"".join(piece for document, _, piece in texts(table, cut) if held_out[document])
    return Corpus(*parts, val_text, files)


def _measure(table: "datasets.Dataset") -> tuple[list[int], list[int]]:
    """The bytes of each document, and the crc32 that says whether it is held out."""
    sizes, checksums = [], []
    for document, name, piece in texts(table):
        if document == len(sizes):
            sizes.append(0)
            checksums.append(zlib.crc32(name.encode()))  # 0 without a name
        sizes[-1] += len(piece)
        if not name:
            checksums[-1] = zlib.crc32(piece, checksums[-1])
    return sizes, checksums


def _token_rows(table: "datasets.Dataset") -> Iterator[tuple[int, np.ndarray]]:
    """The rows of `tokenize`, read where they lie."""
    for batch in table.with_format("arrow").iter(batch_size=1000):
        yield from zip(batch["document"].to_pylist(), arrays(batch["tokens"]), strict=True)


def check_length(documents: Documents, config: DataConfig, part: str, of: int) -> None:
    """Raises ConfigError when the documents are shorter than a row and the target of its last
    token."""
    if documents.tokens.size <= config.sequence_length:
        raise ConfigError(
            f"data.sequence_length must be below the number of {part} tokens, got "
            f"{config.sequence_length} with {documents.tokens.size} in {len(documents)} "
            f"of {of} documents; shorten it, add text or change data.hold_out"
        )


def is_held_out(checksum: int, one_in: int) -> bool:
    """Whether a document with this crc32 is for validation, whatever others there are."""
    return checksum % one_in == 0


def choose_held_out(checksums: list[int], one_in: int) -> list[bool]:
    """Which of the documents with these crc32 are for validation: those that `is_held_out` names.
    At least one is, with the smallest, and at least one is not, with the largest."""
    held_out = [is_held_out(checksum, one_in) for checksum in checksums]
    if checksums and not any(held_out):
        held_out[checksums.index(min(checksums))] = True
    elif checksums and all(held_out):
        held_out[checksums.index(max(checksums))] = False
    return held_out


def arrays(lists: Any) -> list[np.ndarray]:
    """The lists of a pyarrow column as arrays, without a copy in Python of each number."""
    found = []
    for chunk in lists.chunks:
        ends = chunk.value_lengths().to_numpy().cumsum()
        found += np.split(chunk.flatten().to_numpy(), ends[:-1])
    return found

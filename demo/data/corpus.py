"""Documents as tokens, those for training and those that are held out for validation.

A document is held out when a crc32 says so, of its path relative to the folder it was found
under, or of its text where it is a row of a table: the split depends neither on order nor on the
machine. Of a single document, the end is held out.
"""

import hashlib
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from demo.checkpoints.tokenizer import ByteTokenizer, Tokenizer
from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.sources import as_bytes, make_table, read_source

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end.

    Attributes:
        tokens (numpy.ndarray): [tokens], of the smallest unsigned type that holds the vocabulary.
        starts (numpy.ndarray): [documents + 1] int64, where each document begins, and the end.
        text_size: Bytes of text that the tokens stand for; None for one each.
    """

    tokens: np.ndarray
    starts: np.ndarray
    text_size: int | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def bytes_per_token(self) -> float:
        return 1.0 if self.text_size is None else self.text_size / max(1, self.tokens.size)

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
    """val_text: the bytes that `val` stands for."""

    train: Documents
    val: Documents
    val_text: bytes


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Find, read, split and tokenize the documents that `config` names. Raises ConfigError."""
    tokenizer = tokenizer or ByteTokenizer()
    table = read_source(config)
    if len(table) == 1:
        table = _cut(table, config.hold_out)
        held_out = np.array([False, True])
        text, text_lengths = _ragged(table.data.column("text"))
    else:
        text, text_lengths = _ragged(table.data.column("text"))
        names = table["name"] if "name" in table.column_names else [""] * len(table)
        begins = zip(text_lengths.cumsum() - text_lengths, text_lengths, strict=True)
        texts = (text[begin : begin + length] for begin, length in begins)
        keys = (name.encode() or own for name, own in zip(names, texts, strict=True))
        held_out = np.array(choose_held_out(keys, config.hold_out), dtype=bool)
    if isinstance(tokenizer, ByteTokenizer):
        tokens, lengths = text, text_lengths
    else:
        tokens, lengths = _ragged(tokenize(table, tokenizer).data.column("tokens"))
    parts = []
    for part in (~held_out, held_out):
        size = None if isinstance(tokenizer, ByteTokenizer) else int(text_lengths[part].sum())
        starts = np.concatenate([[0], lengths[part].cumsum()]).astype(np.int64)
        parts.append(Documents(tokens[np.repeat(part, lengths)], starts, size))
    corpus = Corpus(*parts, text[np.repeat(held_out, text_lengths)].tobytes())
    for part, documents in (("training", corpus.train), ("validation", corpus.val)):
        check_length(documents, config, part, len(table))
    return corpus


def check_length(documents: Documents, config: DataConfig, part: str, of: int) -> None:
    """Raises ConfigError when the documents have not one whole row."""
    if documents.tokens.size <= config.sequence_length:
        raise ConfigError(
            f"data.sequence_length must be below the number of {part} tokens, got "
            f"{config.sequence_length} with {documents.tokens.size} in {len(documents)} "
            f"of {of} documents; shorten it, add text or change data.hold_out"
        )


def is_held_out(key: bytes, one_in: int) -> bool:
    """Whether a document of this key is for validation, whatever others there are."""
    return zlib.crc32(key) % one_in == 0


def choose_held_out(keys: Iterable[bytes], one_in: int) -> list[bool]:
    """Which of the documents of these keys are for validation: those whose crc32
    is a multiple of `one_in`; at least one is, and at least one is not."""
    crc = [zlib.crc32(key) for key in keys]
    held_out = [value % one_in == 0 for value in crc]
    if crc and not any(held_out):
        held_out[crc.index(min(crc))] = True
    elif crc and all(held_out):
        held_out[crc.index(max(crc))] = False
    return held_out


def encode(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The tokens of a document and its end, if the tokenizer has one."""
    return tokenizer.encode(text) + ([] if tokenizer.eos is None else [tokenizer.eos])


def tokenize(table: "datasets.Dataset", tokenizer: Tokenizer) -> "datasets.Dataset":
    """A table with the column `tokens`, from the cache when table and tokenizer are not new. Each
    document ends with the tokenizer's end of a document, if it has one."""
    import datasets

    dtype = token_dtype(tokenizer)

    def encode_all(batch: dict[str, list]) -> dict[str, list]:
        return {"tokens": [encode(tokenizer, as_bytes(text)) for text in batch["text"]]}

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = sorted(Path(folder).iterdir())
        contents = b"\0".join(file.read_bytes() for file in files)
    state = f"{table._fingerprint} {dtype} {tokenizer.eos} ".encode() + contents
    return table.map(
        encode_all,
        batched=True,
        batch_size=100,
        remove_columns=table.column_names,
        features=datasets.Features({"tokens": datasets.List(datasets.Value(dtype))}),
        new_fingerprint=hashlib.sha256(state).hexdigest()[:16],
        desc="Tokenizing",
    )


def token_dtype(tokenizer: Tokenizer) -> str:
    """The name of the smallest unsigned integer type for the tokens."""
    sizes = {"uint8": 2**8, "uint16": 2**16, "uint32": 2**32}
    return next(name for name, size in sizes.items() if tokenizer.vocab_size <= size)


def _cut(table: "datasets.Dataset", hold_out: int) -> "datasets.Dataset":
    """The only document as two: its beginning, and its end for validation."""
    text = as_bytes(table[0]["text"])
    cut = len(text) - len(text) // hold_out
    fingerprint = hashlib.sha256(f"{table._fingerprint} {cut}".encode()).hexdigest()[:16]
    return make_table(_parts, {"parts": (text[:cut], text[cut:])}, fingerprint)


def _parts(parts: tuple[bytes, ...]) -> Iterable[dict[str, str | bytes]]:
    for text in parts:
        yield {"name": "", "text": text}


def _ragged(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """All values of an Arrow column of lists, strings or bytes, end to end, and how many there are
    in each row."""
    import pyarrow as pa

    values, lengths = [], [np.empty(0, np.int64)]
    for chunk in column.chunks:
        if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)):
            chunk = chunk.cast(pa.large_binary()).fill_null(b"")
            _, offsets, data = chunk.buffers()
            offsets = np.frombuffer(offsets, np.int64)[chunk.offset :][: len(chunk) + 1]
            data = np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
            values.append(data)
            lengths.append(np.diff(offsets))
        else:
            values.append(chunk.flatten().to_numpy())
            lengths.append(chunk.value_lengths().to_numpy().astype(np.int64))
    return np.concatenate(values or [np.empty(0, np.uint8)]), np.concatenate(lengths)

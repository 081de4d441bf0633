"""Documents as tokens: those for training, and those that are held out for validation.

A crc32 says which documents are held out: of a file's path relative to the folder that was
searched, or of the text of a table's row. So the split depends neither on order nor on the machine.
Of a single document the end is held out.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from demo.checkpoints.tokenizer import ByteTokenizer, Tokenizer
from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.sources import as_bytes, find_files, open_hub, read_files

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
    """val_text: the bytes that the tokens of `val` stand for."""

    train: Documents
    val: Documents
    val_text: bytes


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Find, read, split and tokenize the documents that `config` names. Raises ConfigError."""
    tokenizer = tokenizer or ByteTokenizer()
    if config.source == "hub":
        table = open_hub(config)
    else:
        table = read_files(*find_files(config), config.column)
    texts = [as_bytes(text) for text in table["text"][:]]
    count, tail = len(texts), None
    if count == 1:
        tail = len(texts[0]) // config.hold_out
        texts, held_out = cut(texts[0], tail), np.array([False, True])
    else:
        names = table["name"][:] if "name" in table.column_names else [""] * count
        keys = [name.encode() or text for name, text in zip(names, texts, strict=True)]
        held_out = np.array(choose_held_out(keys, config.hold_out), bool)
    if isinstance(tokenizer, ByteTokenizer):
        documents = [np.frombuffer(text, np.uint8) for text in texts]
    else:
        documents = arrays(tokenize(table, tokenizer, tail), "tokens")
    parts = []
    for part, chosen in (("training", ~held_out), ("validation", held_out)):
        size = sum(map(len, compress(texts, chosen)))
        own = list(compress(documents, chosen))
        parts.append(Documents.of(own, token_dtype(tokenizer), size))
        check_length(parts[-1], config, part, count)
    return Corpus(*parts, b"".join(compress(texts, held_out)))


def check_length(documents: Documents, config: DataConfig, part: str, of: int) -> None:
    """Raises ConfigError when the documents are shorter than a row and the target of its last
    token."""
    if documents.tokens.size <= config.sequence_length:
        raise ConfigError(
            f"data.sequence_length must be below the number of {part} tokens, got "
            f"{config.sequence_length} with {documents.tokens.size} in {len(documents)} "
            f"of {of} documents; shorten it, add text or change data.hold_out"
        )


def is_held_out(key: bytes, one_in: int) -> bool:
    """Whether a document with this key is for validation, whatever others there are."""
    return zlib.crc32(key) % one_in == 0


def choose_held_out(keys: Sequence[bytes], one_in: int) -> list[bool]:
    """Which of the documents with these keys are for validation: those that `is_held_out` names.
    At least one is, with the smallest crc32, and at least one is not, with the largest."""
    held_out = [is_held_out(key, one_in) for key in keys]
    if keys and not any(held_out):
        held_out[keys.index(min(keys, key=zlib.crc32))] = True
    elif keys and all(held_out):
        held_out[keys.index(max(keys, key=zlib.crc32))] = False
    return held_out


def cut(text: bytes, tail: int) -> list[bytes]:
    """A text without its last `tail` bytes, and these."""
    return [text[: len(text) - tail], text[len(text) - tail :]]


def encode(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The tokens of a document and its end, if the tokenizer has one."""
    return tokenizer.encode(text) + ([] if tokenizer.eos is None else [tokenizer.eos])


def tokenize(
    table: "datasets.Dataset", tokenizer: Tokenizer, tail: int | None = None
) -> "datasets.Dataset":
    """A table with the column `tokens`, from the cache when neither table nor tokenizer is new.

    Each document ends with the tokenizer's end of a document, if it has one. With `tail` the only
    document becomes two, of which the second is its last `tail` bytes.
    """
    import datasets

    tokens = datasets.List(datasets.Value(token_dtype(tokenizer)))
    return table.map(
        _tokenize_batch,
        fn_kwargs={"tokenizer": tokenizer, "tail": tail},  # the cache knows them by their hash
        batched=True,
        batch_size=100,
        remove_columns=table.column_names,
        features=datasets.Features({"tokens": tokens}),
        desc="Tokenizing",
    )


def _tokenize_batch(
    batch: dict[str, list], tokenizer: Tokenizer, tail: int | None
) -> dict[str, list]:
    texts = [as_bytes(text) for text in batch["text"]]
    if tail is not None:
        texts = cut(texts[0], tail)
    return {"tokens": [encode(tokenizer, text) for text in texts]}


def token_dtype(tokenizer: Tokenizer) -> str:
    """The name of the smallest unsigned integer type for the tokens."""
    sizes = {"uint8": 2**8, "uint16": 2**16, "uint32": 2**32}
    return next(name for name, size in sizes.items() if tokenizer.vocab_size <= size)


def arrays(table: "datasets.Dataset", column: str) -> list[np.ndarray]:
    """The lists of a column as arrays, without a copy in Python of each number."""
    import pyarrow.compute as pc

    lists = table.with_format("arrow")[:][column]
    lengths = pc.list_value_length(lists).to_numpy()
    return np.split(pc.list_flatten(lists).to_numpy(), lengths.cumsum()[:-1])

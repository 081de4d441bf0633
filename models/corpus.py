"""Text for training: which documents there are, read through `datasets` and its cache, and which of
them are held out for validation.

A document is a file, kept byte for byte (so CRLF, and text that is not UTF-8, survive). It is
held out when the crc32 of its path, relative to the folder it was found under, says so: the split
depends neither on order nor on the machine. Of a single document the end is held out.
"""

import glob
import hashlib
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import datasets
import numpy as np

from configs.schema import ConfigError, DataConfig

TEXT_SUFFIXES = (".txt", ".md", ".py")
# Not in every Python, or not prose or code that a person wrote to be read.
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib"}
    | {"lib2to3", "pydoc_data", "encodings", "turtledemo", "ensurepip", "distutils"}
)


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end.

    Attributes:
        tokens (numpy.ndarray): [tokens] uint8, the bytes of all documents.
        starts (numpy.ndarray): [documents + 1] int64, where each document begins, and the end.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def of(texts: Sequence[bytes]) -> "Documents":
        lengths = np.array([0, *map(len, texts)], dtype=np.int64)
        return Documents(np.frombuffer(b"".join(texts), dtype=np.uint8), lengths.cumsum())


@dataclass(frozen=True)
class Corpus:
    train: Documents
    val: Documents


def load_corpus(config: DataConfig) -> Corpus:
    """Find, read and split the documents that `config` names. Raises ConfigError."""
    folder, files = find_files(config)
    table = read_files(folder, files)
    texts, names = list(table["text"]), list(table["name"])
    held_out = [is_held_out(name, config.hold_out) for name in names]
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // config.hold_out
        train, val = [texts[0][:cut]], [texts[0][cut:]]
    else:
        train = [text for text, held in zip(texts, held_out, strict=True) if not held]
        val = [text for text, held in zip(texts, held_out, strict=True) if held]
    corpus = Corpus(Documents.of(train), Documents.of(val))
    for part, documents in (("training", corpus.train), ("validation", corpus.val)):
        if documents.tokens.size <= config.sequence_length:
            raise ConfigError(
                f"data.sequence_length must be below the number of {part} bytes, got "
                f"{config.sequence_length} with {documents.tokens.size} bytes in {len(documents)} "
                f"of {len(texts)} files; shorten it, add text or change data.hold_out"
            )
    return corpus


def find_files(config: DataConfig) -> tuple[Path, list[str]]:
    """The folder, and the sorted paths of the documents relative to it."""
    if config.name == "stdlib":
        folder = Path(config.path or sysconfig.get_path("stdlib"))
        suffixes, skip = (".py",), NOT_STDLIB
    elif config.path is None:
        raise ConfigError("data=text needs data.path, got none; name a file, a folder or a glob")
    else:
        folder, suffixes, skip = Path(config.path), TEXT_SUFFIXES, frozenset()
    if folder.is_file():
        return folder.parent, [folder.name]
    if folder.is_dir():
        found = [path for path in folder.rglob("*") if path.suffix in suffixes]
    else:
        found = [Path(path) for path in glob.glob(str(folder), recursive=True)]
        folder = Path(*takewhile(lambda part: not glob.has_magic(part), folder.parts))
    names = (path.relative_to(folder) for path in found if path.is_file())
    files = sorted(name.as_posix() for name in names if not skip.intersection(name.parts))
    if not files:
        raise ConfigError(
            f"data.path must hold files that end in {', '.join(suffixes)}, got {str(folder)!r} "
            f"({'none in it' if folder.exists() else 'it does not exist'}); give another path"
        )
    return folder, files


def read_files(folder: Path, files: list[str]) -> datasets.Dataset:
    """A table with one row per file, `name` and `text` (bytes), from the cache of `datasets` when
    neither the files' names nor their sizes or times of change are new."""
    state = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape"))
    for name in files:
        stat = (folder / name).stat()
        row = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        state.update(row.encode("utf-8", "surrogateescape"))
    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # it takes a second, and the run's own bar comes next
    try:
        return datasets.Dataset.from_generator(
            _rows,
            gen_kwargs={"folder": folder, "files": tuple(files)},
            features=datasets.Features(
                {"name": datasets.Value("string"), "text": datasets.Value("binary")}
            ),
            fingerprint=state.hexdigest()[:16],
        )
    finally:
        if was_on:
            datasets.enable_progress_bars()


def is_held_out(name: str, one_in: int) -> bool:
    """Whether the document of this name is for validation: one in `one_in` of all names is."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape")) % one_in == 0


def _rows(folder: Path, files: tuple[str, ...]) -> Iterator[dict[str, str | bytes]]:
    for name in files:
        printable = name.encode("utf-8", "backslashreplace").decode()
        yield {"name": printable, "text": (folder / name).read_bytes()}

"""Text for training: which documents there are, read through `datasets` and its cache, and which of
them are held out for validation.

A document is a file, kept byte for byte (so CRLF, and text that is not UTF-8, survive). It is
held out when the crc32 of its path, relative to the folder it was found under, says so: the split
depends neither on order nor on the machine. Of a single document, the end is held out.
"""

import glob
import hashlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.schema import ConfigError, DataConfig

if TYPE_CHECKING:
    import datasets

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
    texts = list(table["text"])
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // config.hold_out
        train, val = [texts[0][:cut]], [texts[0][cut:]]
    else:
        held_out = choose_held_out(table["name"], config.hold_out)
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
        why = "none there" if Path(config.path or folder).exists() else "no such path"
        raise ConfigError(
            f"data.path must hold files that end in {', '.join(suffixes)}, got {config.path!r} "
            f"({why}); give another path"
        )
    return folder, files


def read_files(folder: Path, files: list[str]) -> "datasets.Dataset":
    """A table with one row per file, `name` and `text` (bytes), from the cache of `datasets` when
    neither the files' names nor their sizes or times of change are new."""
    import datasets

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


def choose_held_out(names: Iterable[str], one_in: int) -> list[bool]:
    """Which of the documents of these names are for validation: those whose crc32 is a multiple of
    `one_in`; at least one is, and at least one is not."""
    crc = [zlib.crc32(name.encode()) for name in names]
    held_out = [value % one_in == 0 for value in crc]
    if not any(held_out):
        held_out[crc.index(min(crc))] = True
    elif all(held_out):
        held_out[crc.index(max(crc))] = False
    return held_out


def _rows(folder: Path, files: tuple[str, ...]) -> Iterator[dict[str, str | bytes]]:
    for name in files:
        printable = name.encode("utf-8", "backslashreplace").decode()
        yield {"name": printable, "text": (folder / name).read_bytes()}

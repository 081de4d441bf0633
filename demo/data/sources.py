"""Where text comes from: files, or the Hugging Face hub, read through `datasets` and its cache.

A table of documents has a column `text` (bytes, or strings of UTF-8), and for files `name`, the
path relative to the folder they were found under; it is empty for the rows of table files.
"""

import codecs
import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.config.errors import ConfigError, RunError
from demo.config.schema import DataConfig
from models.ranges import as_written

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ROWS_VERSION = 2  # of what `_rows` makes of a file: a new one leaves what is in the cache alone
# Not in every Python, or not prose or code that a person wrote to be read.
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib"}
    | {"lib2to3", "pydoc_data", "encodings", "turtledemo", "ensurepip", "distutils"}
)


def read_source(config: DataConfig) -> "datasets.Dataset":
    """The table of all documents that `config` names. Raises ConfigError."""
    if config.source == "hub":
        return open_hub(config)
    return read_files(*find_files(config), config.column)


def find_files(config: DataConfig) -> tuple[Path, list[str]]:
    """The folder, and the sorted paths of the documents relative to it."""
    if config.source == "stdlib":
        folder = Path(config.path or sysconfig.get_path("stdlib"))
        suffixes, skip = (".py",), NOT_STDLIB
    else:
        folder, skip = Path(config.path).expanduser(), frozenset()
        suffixes = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    if folder.is_file():
        return folder.parent, [folder.name]
    if folder.is_dir():
        found = _walk(folder, suffixes, skip)
    else:
        found = map(Path, glob.glob(str(folder), recursive=True))
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


def _walk(folder: Path, suffixes: tuple[str, ...], skip: frozenset[str]) -> Iterator[Path]:
    """The files that end so, without what is hidden; folders to skip are not even entered: what is
    installed beside the standard library may be a hundred times its size."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(parent, name)


def read_files(folder: Path, files: list[str], column: str) -> "datasets.Dataset":
    """The documents of files, from the cache when neither their names nor their sizes or times of
    change are new."""
    state = hashlib.sha256(f"{ROWS_VERSION}\0{column}\0".encode())
    state.update(str(folder.resolve()).encode("utf-8", "surrogateescape"))
    for name in files:
        stat = (folder / name).stat()
        row = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        state.update(row.encode("utf-8", "surrogateescape"))
    arguments = {"folder": folder, "files": tuple(files), "column": column}
    return make_table(_rows, arguments, state.hexdigest()[:16])


def make_table(
    rows: Callable[..., Iterator[dict]], arguments: dict[str, Any], fingerprint: str
) -> "datasets.Dataset":
    """A table of what the generator `rows` yields, kept in the cache under `fingerprint`."""
    import datasets

    features = {"name": datasets.Value("string"), "text": datasets.Value("binary")}
    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # it takes a second, and the run's own bar comes next
    try:
        with _quiet():
            return datasets.Dataset.from_generator(
                rows,
                gen_kwargs=arguments,
                features=datasets.Features(features),
                fingerprint=fingerprint,
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise
    finally:
        if was_on:
            datasets.enable_progress_bars()


def open_hub(config: DataConfig) -> Any:
    """The set that `config.name` means, or its stream, with its column named `text`."""
    import datasets

    try:
        with _quiet():
            opened = datasets.load_dataset(
                config.name, config.config, split=config.split, streaming=config.streaming
            )
            columns = opened.column_names or list(next(iter(opened)))
    except Exception as error:  # of `datasets`, the hub, the network and the files: many kinds
        raise ConfigError(
            f"data.name must be a text set that `datasets` can load, got {config.name!r} with "
            f"data.config={as_written(config.config)} and data.split={config.split!r} "
            f"({_reason(error)}); correct them, or look at the network"
        ) from error
    _check_column(config.column, columns, repr(config.name))
    if (feature := (opened.features or {}).get(config.column)) is not None:
        kind = getattr(feature, "dtype", type(feature).__name__)  # lists and objects have no dtype
        _check_kind(kind, config.column, columns, repr(config.name))
    opened = opened.select_columns(config.column)
    return opened if config.column == "text" else opened.rename_column(config.column, "text")


def read_stream(stream: Any, rank: int = 0) -> Iterator[bytes]:
    """The documents of a stream that `open_hub` opened. Raises RunError where it cannot be read; in
    a process other than the first, whose errors are not printed, what `datasets` raises."""
    try:
        for row in stream:
            yield as_bytes(row["text"])
    except Exception as error:  # of the network and of the files: many kinds
        if rank:
            raise
        raise RunError(
            f"data.name must be a set that can be read, got one that cannot ({_reason(error)}); "
            "look at the network and at that file, then go on with resume= if training had begun"
        ) from error


def as_bytes(text: Any) -> bytes:
    """A document of any column: strings as UTF-8, and nothing where the row has none."""
    if isinstance(text, bytes):
        return text
    return b"" if text is None else text.encode("utf-8", "surrogatepass")


def _rows(folder: Path, files: tuple[str, ...], column: str) -> Iterator[dict[str, str | bytes]]:
    has_text = False
    for name in files:
        suffix = Path(name).suffix.lower()
        if suffix in TABLE_SUFFIXES:
            for text in _table_rows(folder / name, suffix, column):
                has_text = True
                yield {"name": "", "text": text}
        else:
            text = (folder / name).read_bytes()
            has_text = has_text or bool(text)
            if suffix not in TEXT_SUFFIXES:
                _check_text(folder / name, text)
            printable = name.encode("utf-8", "backslashreplace").decode()
            yield {"name": printable, "text": text}
    if not has_text:
        where = str(folder / files[0] if len(files) == 1 else folder)
        raise ConfigError(
            f"data.path must hold files with text, got {where!r} without any; add some, or give "
            "another path"
        )


def _check_text(file: Path, text: bytes) -> None:
    """Refuse what is no text of any encoding, as git tells it: by a byte of 0 in its first 8000."""
    if 0 in text[:8000] and not text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(
            f"data.path must hold files of text, got {str(file)!r} with bytes of 0 in it; unpack "
            "or convert that file, or leave it out"
        )


def _table_rows(file: Path, suffix: str, column: str) -> Iterator[bytes]:
    """The texts of a table's rows, empty ones left out."""
    if file.stat().st_size == 0:
        raise _unreadable(file, "it is empty")
    try:
        for row in _load_rows(file, TABLE_SUFFIXES[suffix], column):
            _check_column(column, list(row), repr(str(file)))
            text = row[column]
            if not isinstance(text, str | bytes | None):
                _check_kind(type(text).__name__, column, list(row), repr(str(file)))
            if text:
                yield as_bytes(text)
    except ConfigError:
        raise
    except Exception as error:  # of `datasets` and the file: many kinds
        raise _unreadable(file, _reason(error)) from error


def _load_rows(file: Path, kind: str, column: str) -> Iterator[dict[str, Any]]:
    import datasets

    # Cells as they are written: not 7.0 for 007, and NA is a word.
    as_written = {"converters": {column: str}, "keep_default_na": False} if kind == "csv" else {}
    # An escaped name is not read as a pattern. Streaming stores no second copy.
    files = glob.escape(str(file))
    yield from datasets.load_dataset(
        kind, data_files=files, split="train", streaming=True, **as_written
    )


def _unreadable(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"data.path must hold files that are what their names say, got {str(file)!r} ({why}); "
        "repair or leave out that file"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what `datasets` and the hub log of an error or a new try: the error says it."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        raise ConfigError(
            f"data.column must be a column of {where}, got {column!r}; "
            f"use one of {', '.join(columns)}"
        )


def _check_kind(kind: str, column: str, columns: list[str], where: str) -> None:
    if kind not in ("string", "large_string", "binary", "large_binary"):
        others = ", ".join(name for name in columns if name != column)
        raise ConfigError(
            f"data.column must hold text, got {column!r} of {where}, which holds {kind}; "
            + (f"use another one of {others}" if others else "make strings of it")
        )


def _reason(error: Exception) -> str:
    while isinstance(error.__cause__, Exception):  # the first says most
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Where text comes from: files, or the Hugging Face hub, read through `datasets` and its cache.

Each source becomes a table with a document in each row. Its column `text` holds bytes, or strings
of UTF-8. Files also have a `name`, their path relative to the folder that was searched; it is empty
for the rows of table files (jsonl, parquet, csv).
"""

import codecs
import glob
import logging
import os
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.config.errors import ConfigError, RunError, first_line
from demo.config.schema import DataConfig
from models.ranges import as_written

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_FORMATS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # as `datasets` names them
ROWS_VERSION = 3  # of what `_generate_rows` makes of files: raise it when that changes
TEXT_KINDS = ("string", "large_string", "binary", "large_binary", "str", "bytes", "NoneType")
# Parts of the standard library that not every Python has, or that nobody wrote to be read.
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib"}
    | {"lib2to3", "pydoc_data", "encodings", "turtledemo", "ensurepip", "distutils"}
)


def find_files(config: DataConfig) -> tuple[Path, list[str]]:
    """The folder to search, and the sorted paths of its documents relative to it."""
    if config.source == "stdlib":
        folder = Path(config.path or sysconfig.get_path("stdlib"))
        suffixes, skip = (".py",), NOT_STDLIB
    else:
        folder, skip = Path(config.path).expanduser(), frozenset()
        suffixes = (*TEXT_SUFFIXES, *TABLE_FORMATS)
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
    """The files with these suffixes, hidden ones left out. Folders to skip are not even entered:
    what is installed beside the standard library may be a hundred times its size."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(parent, name)


def read_files(folder: Path, names: list[str], column: str) -> "datasets.Dataset":
    """The documents of files, from the cache when no name, size or time of change is new."""
    import datasets
    from datasets.fingerprint import Hasher

    stats = ((folder / name).stat() for name in names)
    changes = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    state = (ROWS_VERSION, str(folder.resolve()), names, changes, column)
    features = {"name": datasets.Value("string"), "text": datasets.Value("binary")}
    try:
        with _quiet(progress_bars=False):  # it takes a second, and the run's own bar comes next
            return datasets.Dataset.from_generator(
                _generate_rows,
                gen_kwargs={"folder": folder, "names": tuple(names), "column": column},
                features=datasets.Features(features),
                fingerprint=Hasher.hash(state),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


def open_hub(config: DataConfig) -> "datasets.Dataset | datasets.IterableDataset":
    """The set, or the stream, that `config` names, with `text` as its only column. Raises
    ConfigError."""
    import datasets

    try:
        with _quiet():
            opened = datasets.load_dataset(
                config.name, config.config, split=config.split, streaming=config.streaming
            )
            kinds = _kinds(opened.features or next(iter(opened)))
    except Exception as error:  # the network, the hub, and whatever a file's reader raises
        raise ConfigError(
            f"data.name must be a text set that `datasets` can load, got {config.name!r} with "
            f"data.config={as_written(config.config)} and data.split={config.split!r} "
            f"({_reason(error)}); correct them, or look at the network"
        ) from error
    if kinds.get(config.column) not in TEXT_KINDS:
        raise _wrong_column(config.column, kinds, config.name)
    opened = opened.select_columns(config.column)
    return opened if config.column == "text" else opened.rename_column(config.column, "text")


def read_stream(stream: "datasets.IterableDataset", rank: int = 0) -> Iterator[bytes]:
    """The documents of a stream that `open_hub` opened.

    Raises RunError when the stream cannot be read. A process other than the first raises what
    `datasets` does, with its traceback: a RunError would be printed by the first alone.
    """
    try:
        for row in stream:
            yield as_bytes(row["text"])
    except Exception as error:  # the network, and whatever a file's reader raises
        if rank:
            raise
        raise RunError(
            f"data.name must be a set that can be read, got one that cannot ({_reason(error)}); "
            "look at the network and at that file, then go on with resume= if training had begun"
        ) from error


def as_bytes(text: str | bytes | None) -> bytes:
    """A document of any column: strings as UTF-8, and nothing where the row has none."""
    if isinstance(text, bytes):
        return text
    return b"" if text is None else text.encode("utf-8", "surrogatepass")


def _generate_rows(
    folder: Path, names: tuple[str, ...], column: str
) -> Iterator[dict[str, str | bytes]]:
    """The rows of `read_files`. Raises ConfigError when none of them has text."""
    has_text = False
    for name in names:
        file = folder / name
        if file.suffix.lower() in TABLE_FORMATS:
            rows = ({"name": "", "text": text} for text in _read_table(file, column))
        else:
            printable = name.encode("utf-8", "backslashreplace").decode()
            rows = [{"name": printable, "text": _read_text(file)}]
        for row in rows:
            has_text = has_text or bool(row["text"])
            yield row
    if not has_text:
        where = str(folder / names[0] if len(names) == 1 else folder)
        raise ConfigError(
            f"data.path must hold files with text, got {where!r} without any; add some, or give "
            "another path"
        )


def _read_text(file: Path) -> bytes:
    """All of a file. One with another suffix must not look binary, which git too tells by a byte of
    0 among the first 8000."""
    text = file.read_bytes()
    utf16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if file.suffix.lower() not in TEXT_SUFFIXES and 0 in text[:8000] and not utf16:
        raise ConfigError(
            f"data.path must hold files of text, got {str(file)!r} with bytes of 0 in it; unpack "
            "or convert that file, or leave it out"
        )
    return text


def _read_table(file: Path, column: str) -> Iterator[bytes]:
    """The text of each row that has some."""
    import datasets

    kind = TABLE_FORMATS[file.suffix.lower()]
    # Cells as they are written: not 7.0 for 007, and NA is a word.
    options = {"converters": {column: str}, "keep_default_na": False} if kind == "csv" else {}
    if file.stat().st_size == 0:
        raise _damaged(file, "it is empty")
    try:
        rows = datasets.load_dataset(
            kind,
            data_files=glob.escape(str(file)),  # else brackets in a name would be a pattern
            split="train",
            streaming=True,  # which stores no second copy
            **options,
        )
        for row in rows:
            if column not in row or not isinstance(row[column], str | bytes | None):
                raise _wrong_column(column, _kinds(row), str(file))
            if row[column]:
                yield as_bytes(row[column])
    except ConfigError:
        raise
    except Exception as error:  # whatever the reader of such a file raises
        raise _damaged(file, _reason(error)) from error


def _damaged(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"data.path must hold files that are what their names say, got {str(file)!r} ({why}); "
        "repair or leave out that file"
    )


@contextmanager
def _quiet(progress_bars: bool = True) -> Iterator[None]:
    """Silences what `datasets` and the hub log of errors and retries: our own error says it."""
    import datasets

    hide_bars = not progress_bars and datasets.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub")}
    if hide_bars:
        datasets.disable_progress_bars()
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if hide_bars:
            datasets.enable_progress_bars()


def _kinds(columns: Mapping[str, Any]) -> dict[str, str]:
    """The type of each column, from its feature in `datasets` or from a value in it."""
    return {name: getattr(held, "dtype", type(held).__name__) for name, held in columns.items()}


def _wrong_column(column: str, kinds: dict[str, str], where: str) -> ConfigError:
    others = ", ".join(name for name in kinds if name != column)
    what = f"which holds {kinds[column]}" if column in kinds else "which is not there"
    return ConfigError(
        f"data.column must be a column of {where!r} that holds text, got {column!r}, {what}; "
        + (f"use one of {others}" if others else "make strings of it")
    )


def _reason(error: Exception) -> str:
    """The type and first line of what an error was caused by, which says most."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"

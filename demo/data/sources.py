"""Where text comes from: files, or the Hugging Face hub, read through `datasets` and its cache.

Each source becomes a table whose column `text` holds bytes, or strings of UTF-8. A set of the hub
has a document in each row. Of files a row holds at most `PIECE` bytes of one, and its `name` is the
file's path, relative to the folder that was searched, where the text begins; it is empty where a
row of a table file (jsonl, parquet, csv) begins, and nothing where a document goes on.
"""

import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.config.errors import ConfigError, RunError, first_line
from demo.config.schema import DataConfig
from demo.data.files import PACKED, Files, extension, open_file, table_kind
from demo.data.tables import BadRow, NoColumn, pick, read_rows
from models.ranges import as_written

if TYPE_CHECKING:
    import datasets

PIECE = 2**16
ROWS_VERSION = 4  # of what `_generate_rows` makes of files: raise it when that changes
TEXT_KINDS = ("string", "large_string", "binary", "large_binary", "str", "bytes", "NoneType")


def read_files(found: Files, config: DataConfig) -> "datasets.Dataset":
    """The text of files, from the cache when no name, size or time of change is new."""
    import datasets
    from datasets.fingerprint import Hasher

    stats = [path.stat() for path in found.paths]
    changes = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    files = tuple((str(folder.resolve()), name) for folder, name in found.files)
    state = (ROWS_VERSION, files, changes, config.column, config.options)
    features = {"name": datasets.Value("string"), "text": datasets.Value("binary")}
    try:
        with quiet(progress_bars=False):  # it takes a second, and the run's own bar comes next
            return datasets.Dataset.from_generator(
                _generate_rows,
                gen_kwargs={"found": found, "config": config},
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
        with quiet():
            named = {"path": config.name, "name": config.config}
            if Path(config.name, "state.json").is_file():  # what save_to_disk of a Dataset writes
                named = {"path": "arrow", "data_files": f"{glob.escape(config.name)}/*.arrow"}
            opened = datasets.load_dataset(**named, split=config.split, streaming=config.streaming)
            kinds = _kinds(opened.features or next(iter(opened)))
            if config.column not in kinds and opened.features:  # doc.text, of what is inside doc
                kinds |= _kinds(opened.features.flatten())
    except Exception as error:  # the network, the hub, and whatever a file's reader raises
        raise ConfigError(
            f"data.name must be a text set that `datasets` can load, got {config.name!r} with "
            f"data.config={as_written(config.config)} and data.split={config.split!r} "
            f"({_reason(error)}); correct them, or look at the network"
        ) from error
    if kinds.get(config.column) not in TEXT_KINDS:
        raise _wrong_column(config.column, kinds, config.name)
    column, names = config.column, opened.column_names
    if names and column not in names:
        if not config.streaming:
            opened = opened.flatten()
        else:
            opened = opened.map(_inner, fn_kwargs={"column": column}, remove_columns=names)
    opened = opened.select_columns(column)
    return opened if column == "text" else opened.rename_column(column, "text")


def _inner(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {column: pick(row, column)[1]}


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


def pieces(text: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """A text in pieces of at most `PIECE` bytes, cut between characters where it is UTF-8, so that
    each can be decoded by itself. An empty text is one empty piece."""
    begin = 0
    while begin < len(text) or not begin:
        end = begin + PIECE
        if end < len(text):
            end -= next((back for back in range(4) if text[end - back] & 0xC0 != 0x80), 0)
        yield text[begin:end]
        begin = end


def _generate_rows(found: Files, config: DataConfig) -> Iterator[dict[str, str | bytes | None]]:
    """The rows of `read_files`. Raises ConfigError when none of them has text."""
    has_text = False
    for folder, name in found.files:
        file = folder / name
        if kind := table_kind(name):
            documents = (("", text) for text in _read_table(file, kind, config))
        else:
            printable = name.encode("utf-8", "backslashreplace").decode()
            documents = [(printable, _read_text(file))]
        for key, text in documents:
            has_text = has_text or bool(text)
            for number, piece in enumerate(pieces(text)):
                yield {"name": None if number else key, "text": piece}
    if not has_text:
        paths = found.paths
        where = str(paths[0] if len(paths) == 1 else found.files[0][0])
        raise ConfigError(
            f"data.path must hold files with text, got {where!r} without any; add some, or give "
            "another path"
        )


def _read_text(file: Path) -> bytes:
    try:
        if extension(file.name).endswith(PACKED):
            with open_file(file) as stream:
                return stream.read()
        return file.read_bytes()
    except OSError as error:
        raise _damaged(file, _reason(error)) from error


def _read_table(file: Path, kind: str, config: DataConfig) -> Iterator[bytes]:
    """The text of each row that has some."""
    if file.stat().st_size == 0:
        raise _damaged(file, "it is empty")
    column = config.column
    try:
        for value in read_rows(file, kind, column, config.options or {}):
            if not isinstance(value, str | bytes | None):
                raise _wrong_column(column, {column: type(value).__name__}, str(file))
            if value:
                yield as_bytes(value)
    except NoColumn as error:
        raise _wrong_column(column, dict.fromkeys(error.columns, ""), str(file)) from error
    except ConfigError:
        raise
    except BadRow as error:
        raise _damaged(file, str(error)) from error
    except Exception as error:  # whatever the reader of such a file raises
        raise _damaged(file, _reason(error)) from error


def _damaged(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"data.path must hold files that are what their names say, got {str(file)!r} ({why}); "
        "repair or leave out that file"
    )


@contextmanager
def quiet(progress_bars: bool = True) -> Iterator[None]:
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

"""Which files hold text or rows of it, which are skipped and why, and how one is opened."""

import codecs
import glob
import io
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path, PurePosixPath

from demo.config.errors import ConfigError
from demo.config.schema import DataConfig

TEXTS = (".txt", ".md", ".py")  # whatever bytes they hold
TABLES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")  # of which each row is a document
PACKED = (".gz", ".zst")
# Programs' sources and man pages (.1, .3pm): a file with such a name need not hold text.
SOURCES = re.compile(
    r"\.(asm|bash|c|cc|clj|cpp|cs|cuh?|cxx|el|erl|exs?|f|f90|fs|go|hh?|hpp|hs|java|jl|jsx?|kt|lisp|lua"
    r"|m|mli?|mm|php|pl|pm|ps1|pyi|pyx|r|rb|rs|s|scala|scm|sh|sql|swift|tex|tsx?|vb|[1-9][a-z]*)"
)
# Parts of the standard library that not every Python has, or that nobody wrote to be read.
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib"}
    | {"lib2to3", "pydoc_data", "encodings", "turtledemo", "ensurepip", "distutils"}
)
# How an array of objects begins, and a line with one: not one object over several lines.
JSON_ROWS = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*\{|\{[ \t]*\S)")
HEAD = 8000  # bytes, of which none is 0 in a file of text: git too tells by these


@dataclass
class Files:
    """What a search found.

    Attributes:
        files: The folder that was searched and a path relative to it, for each.
        skipped: How many were not taken, by the reason.
        searched: Whether anything but single files was named.
    """

    files: list[tuple[Path, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    searched: bool = False

    @property
    def kinds(self) -> dict[str, int]:
        """How many files there are of each extension, the most first."""
        return dict(Counter(extension(name) for _, name in self.files).most_common())

    @property
    def paths(self) -> list[Path]:
        return [folder / name for folder, name in self.files]


def find_all(config: DataConfig) -> Files:
    """The files of all paths of `config`, each once. Raises ConfigError."""
    found, seen = Files(), set()
    for path in [config.path] if isinstance(config.path, str | None) else config.path:
        folder, names = find_files(replace(config, path=path), found)
        files = [(folder, name) for name in names if (folder / name).resolve() not in seen]
        found.files += files
        seen |= {(folder / name).resolve() for _, name in files}
    return found


def find_files(config: DataConfig, found: Files | None = None) -> tuple[Path, list[str]]:
    """The folder to search for the only path of `config`, and the sorted paths of its files
    relative to it. Counts in `found` what it skips. Raises ConfigError."""
    found = found or Files()
    stdlib = config.source == "stdlib"
    where = Path(config.path or sysconfig.get_path("stdlib")).expanduser()
    if where.is_file():
        if table_kind(where.name) is None and not _holds_text(where):
            raise ConfigError(
                f"data.path must hold files of text, got {str(where)!r} with bytes of 0 in it; "
                "convert that file, or leave it out"
            )
        return where.parent, [where.name]
    found.searched = True
    skip = NOT_STDLIB if stdlib else frozenset()
    by_kind = where.is_dir() and not config.include
    if where.is_dir():
        folder, paths = where, _walk(where, skip, config.exclude, found.skipped)
    else:
        folder = Path(*takewhile(lambda part: not glob.has_magic(part), where.parts))
        paths = map(Path, glob.glob(str(where), recursive=True))
    names = []
    for path in filter(Path.is_file, paths):
        name = path.relative_to(folder).as_posix()
        if _matches(name, config.exclude):
            found.skipped["excluded"] += 1
        elif config.include and not _matches(name, config.include):
            found.skipped["not included"] += 1
        elif by_kind and not (_kind(name) == ".py" if stdlib else _is_known(path)):
            found.skipped[extension(name) or "without an extension"] += 1
        elif not _holds_text(path):
            found.skipped["binary"] += 1
        else:
            names.append(name)
    if not names and (others := found.skipped["not included"]):
        raise ConfigError(
            f"data.include must match a file in data.path, got {config.include!r}, which matches "
            f"none of {others}; give other patterns, or leave it out"
        )
    if not names:
        ends = ".py" if stdlib else f"{', '.join((*TEXTS, *TABLES))}, or are sources or man pages"
        why = "none there" if Path(config.path or folder).expanduser().exists() else "no such path"
        raise ConfigError(
            f"data.path must hold files that end in {ends}, got {config.path!r} ({why}); give "
            "another path" + ("" if stdlib else ", or patterns such as data.include=*.rst")
        )
    return folder, sorted(names)


def table_kind(name: str) -> str | None:
    """The extension of a file whose rows are documents, None for one that is a document itself."""
    return kind if (kind := _kind(name)) in TABLES else None


def extension(name: str) -> str:
    """In small letters, with that of a packed file: `.txt`, `.jsonl.gz`."""
    packed = PurePosixPath(name.lower()).suffix
    return _kind(name) + packed if packed in PACKED else packed


def open_file(file: Path) -> io.BufferedReader:
    """What a file holds, unpacked. Raises OSError, also for a damaged packed file."""
    import pyarrow

    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression))


def looks_like_rows(file: Path) -> str | None:
    """What kind of rows the beginning of a file of text seems to hold, if any."""
    head = _head(file)
    lines = head.decode("utf-8", "replace").splitlines()[: -1 if len(head) == HEAD else None]
    lines = [line for line in lines if line.strip()][:10]
    with suppress(ValueError, RecursionError):
        if lines and all(isinstance(json.loads(line), dict | list) for line in lines):
            return "JSON lines"
    tabs = {line.count("\t") for line in lines}
    if len(lines) > 2 and len(tabs) == 1 and tabs != {0} and not lines[0].startswith("\t"):
        return "columns between tabs"
    return None


def _walk(
    folder: Path, skip: frozenset[str], exclude: tuple[str, ...], skipped: Counter[str]
) -> Iterator[Path]:
    """All files but hidden ones. Folders to skip are not even entered: what is installed beside the
    standard library may be a hundred times its size."""
    for parent, folders, names in os.walk(folder):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        skipped["hidden"] += len(hidden)
        entered = []
        for name in folders:
            if name in skip or _matches(Path(parent, name).relative_to(folder).as_posix(), exclude):
                skipped["folders"] += 1
            elif name not in hidden:
                entered.append(name)
        folders[:] = entered
        yield from (Path(parent, name) for name in names if name not in hidden)


def _kind(name: str) -> str:
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in PACKED else path.suffix


def _is_known(file: Path) -> bool:
    kind = _kind(file.name)
    if kind == ".json":  # most are settings of some program
        return bool(JSON_ROWS.match(_head(file)))
    return kind in (*TEXTS, *TABLES) or bool(SOURCES.fullmatch(kind))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches a relative path, or the name of the file or of a folder in it."""
    parts = (name, *PurePosixPath(name).parts)
    return any(fnmatch(part, pattern.rstrip("/")) for pattern in patterns for part in parts)


def _holds_text(file: Path) -> bool:
    """Whether nothing tells that a file is neither text nor a table."""
    if _kind(file.name) in (*TEXTS, *TABLES):
        return True
    head = _head(file)
    return 0 not in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _head(file: Path) -> bytes:
    """The beginning of a file, of which nothing is there where it cannot be read."""
    with suppress(OSError), open_file(file) as stream:
        return stream.read(HEAD)
    return b""

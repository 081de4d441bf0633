"""The column of text of a table file, row by row. Nothing of another column is looked at."""

import io
import json
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from demo.config.errors import ConfigError, first_line
from demo.data.files import open_file

ROWS, CHUNK = 1000, 2**20  # of csv and parquet, and characters of json, at a time
SPACE = re.compile(r"\s*")


class NoColumn(Exception):
    """No row of a file has the column; `columns` has those that there are."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__()
        self.columns = columns


class BadRow(Exception):
    """A row that cannot be read; the message names its line."""


def read_rows(file: Path, kind: str, column: str, options: dict[str, Any]) -> Iterator[Any]:
    """The value of a column in each row, None where it has none.

    Args:
        kind: The extension of the file, unpacked.
        column: Its name, or dotted names of nested ones.
        options: For the reader of csv and tsv, `pandas.read_csv`, which is that of `datasets`.

    Raises NoColumn, BadRow, ConfigError for other options, and whatever pandas and pyarrow do.
    """
    if kind in (".csv", ".tsv"):
        yield from _csv(file, column, ({"sep": "\t"} if kind == ".tsv" else {}) | options)
        return
    columns: dict[str, None] = {}
    found = False
    for row in _parquet(file, column, columns) if kind == ".parquet" else _json(file, column):
        there, value = pick(row, column)
        found = found or there
        if not found:
            columns |= dict.fromkeys(row)
        yield value
    if not found and columns:
        raise NoColumn(list(columns))


def pick(row: dict[str, Any], column: str) -> tuple[bool, Any]:
    """Whether a row has a column, and its value."""
    if column in row:
        return True, row[column]
    for name in column.split("."):
        if not isinstance(row, dict) or name not in row:
            return False, None
        row = row[name]
    return True, row


def _csv(file: Path, column: str, options: dict[str, Any]) -> Iterator[Any]:
    import pandas

    # Cells as they are written: not 7.0 for 007, and NA is a word.
    given = {"dtype": str, "keep_default_na": False, **options}
    try:
        with open_file(file) as stream:
            columns = list(pandas.read_csv(stream, nrows=0, **given).columns)
        if column not in columns:
            raise NoColumn([str(name) for name in columns])
        with open_file(file) as stream:
            for rows in pandas.read_csv(stream, usecols=[column], chunksize=ROWS, **given):
                for cell in rows[column]:
                    yield cell if isinstance(cell, str) else None  # a row that ends before it
    except (TypeError, LookupError) as error:
        raise ConfigError(
            f"data.options must be those of pandas.read_csv, got {options} ({first_line(error)}); "
            "write for example data.options='{sep: \";\", encoding: latin-1}'"
        ) from error


def _parquet(file: Path, column: str, columns: dict[str, None]) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        columns |= dict.fromkeys(table.schema_arrow.names)
        for rows in table.iter_batches(batch_size=ROWS, columns=[column]):
            yield from rows.to_pylist()


def _json(file: Path, column: str) -> Iterator[dict[str, Any]]:
    """The rows of an array of objects, or of lines with one each, blank ones left out."""
    with open_file(file) as stream:
        if stream.peek(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            rows = _array(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
        else:
            rows = _lines(stream, column)
        for line, row in rows:
            if not isinstance(row, dict):
                raise _bad(line, f"a row must be an object, got {type(row).__name__}")
            yield row


def _lines(stream: io.BufferedReader, column: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            try:
                # An integer of another column may have more digits than Python converts.
                yield number, json.loads(text, parse_int=float)
            except RecursionError:  # another column is nested deeply
                yield number, _without_recursion(line, column)
        except UnicodeDecodeError as error:
            raise _bad(number, f"UnicodeDecodeError: {error}") from error
        except ValueError as error:
            raise _bad(number, error) from error


def _without_recursion(line: bytes, column: str) -> dict[str, Any]:
    from pyarrow import json as arrow
    from pyarrow import schema, string, struct

    name, *nested = column.split(".")
    kind = reduce(lambda inside, outer: struct({outer: inside}), reversed(nested), string())
    return arrow.read_json(
        io.BytesIO(line),
        read_options=arrow.ReadOptions(block_size=len(line) + 1),
        parse_options=arrow.ParseOptions(
            explicit_schema=schema({name: kind}), unexpected_field_behavior="ignore"
        ),
    ).to_pylist()[0]


def _array(stream: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """The items of one array, of which a part at a time is in memory."""
    decode = json.JSONDecoder(parse_int=float).raw_decode
    text, at, line, mark = "", 0, 1, "["  # `at` in `text` is in this line; `mark` must come next
    while True:
        try:
            begin = SPACE.match(text, at).end()
            if text[begin] == "]" and mark == ",":
                return
            if text[begin] != mark:
                raise ValueError(f"Expecting {mark!r}")
            begin = SPACE.match(text, begin + 1).end()
            if text[begin] == "]" and mark == "[":
                return
            row, end = decode(text, begin)
        except (IndexError, ValueError) as error:  # if it is not cut short by the end of `text`
            if not (more := stream.read(max(CHUNK, len(text) - at))):
                line += text.count("\n", at, getattr(error, "pos", len(text)))
                cut_short = isinstance(error, IndexError)
                raise _bad(line, "the array has no end" if cut_short else error) from error
            text, at = text[at:] + more, 0
        except RecursionError as error:
            raise _bad(line, "it is nested too deeply; write it as .jsonl") from error
        else:
            line += text.count("\n", at, begin)
            yield line, row
            line += text.count("\n", begin, end)
            at, mark = end, ","


def _bad(line: int, why: str | ValueError) -> BadRow:
    if isinstance(why, ValueError):
        why = getattr(why, "msg", first_line(why))  # without json's own lines, which begin anew
    return BadRow(f"line {line}: JSON parse error: {why}")

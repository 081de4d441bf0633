"""Which files are read: several paths, patterns, packed ones, man pages and sources."""

import gzip
import itertools
from pathlib import Path

import pyarrow as pa
import pytest

from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.corpus import load_corpus
from demo.data.files import find_all, looks_like_rows
from demo.data.sources import PIECE, pieces
from text_sets import settings

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")


def names(config: DataConfig) -> list[str]:
    return [name for _, name in find_all(config).files]


def put(folder: Path, *files: str, content: bytes = b"some text\n") -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def chosen(*overrides: str) -> DataConfig:
    return settings("data=text", *overrides).data


CHOICES = {
    "known kinds": (
        [],
        "a.c a.txt b.1.gz sub/e.py",
        {".rst": 2, ".bin": 1, ".json": 1, "hidden": 1},
    ),
    "include": (["data.include=*.rst"], "d.rst drafts/f.rst", {"not included": 6, "hidden": 1}),
    "exclude": (
        ["data.exclude=[drafts,sub/,*.c]"],
        "a.txt b.1.gz",
        {".rst": 1, ".bin": 1, ".json": 1, "hidden": 1, "folders": 2, "excluded": 1},
    ),
    "both": (
        ["data.include=*", "data.exclude=[*.c, *.txt, *.json]"],
        "b.1.gz d.rst drafts/f.rst sub/e.py",
        {"excluded": 3, "binary": 1, "hidden": 1},
    ),
    "a folder": (["data.include=sub"], "sub/e.py", {"not included": 7, "hidden": 1}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_files_of_a_folder_are_chosen_and_the_others_counted(case, tmp_path):
    put(tmp_path, "settings.json", content=b'{\n  "a": 1\n}')
    put(tmp_path, "a.txt", "a.c", "d.rst", "sub/e.py", "drafts/f.rst", ".git/g.txt")
    put(tmp_path, "c.bin", content=b"\0")
    (tmp_path / "b.1.gz").write_bytes(gzip.compress(b"man"))
    overrides, expected, skipped = CHOICES[case]
    found = find_all(chosen(f"data.path={tmp_path}", *overrides))
    assert [name for _, name in found.files] == expected.split()
    assert dict(+found.skipped) == skipped


def test_several_paths_are_searched_and_no_file_is_read_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a/b.txt", "a/c.txt", "d/b.txt", "d, e/f.txt", "g.log")
    assert names(chosen('data.path=[a, "d, e",d/b.txt,*.log]')) == [
        *("b.txt", "c.txt"), *("f.txt", "b.txt", "g.log")
    ]  # fmt: skip
    assert names(chosen("data.path=[a,a/b.txt,./a]")) == ["b.txt", "c.txt"]
    assert names(chosen("data.path=d, e")) == ["f.txt"]
    with pytest.raises(ConfigError, match=r"got 'none' \(no such path\)"):
        find_all(chosen("data.path=[a,none]"))
    with pytest.raises(ConfigError, match=r"data\.include must match .* none of 2; give other"):
        find_all(chosen("data.path=a", "data.include=*.rst"))


def test_what_is_named_like_a_man_page_or_source_must_hold_text(tmp_path):
    put(tmp_path, "ls.1", "x.3pm", "main.rs", "lib.so.1.txt", "Makefile")
    put(tmp_path, "lib.so.1", content=b"\x7fELF\0")
    found = find_all(chosen(f"data.path={tmp_path}"))
    assert found.kinds == {".1": 1, ".txt": 1, ".rs": 1, ".3pm": 1}
    assert dict(+found.skipped) == {"binary": 1, "without an extension": 1}


@pytest.mark.parametrize("kind", ["gz", "two gz", "zst", "two zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.TSV"])
def test_packed_files_are_read_as_what_they_hold(kind, name, tmp_path):
    rows = ["0123456789" * 3, "abcdefghi" * 3]
    text = {
        "txt": "".join(rows),
        "jsonl": "".join(f'{{"text": "{row}"}}\n' for row in rows),
        "json": '[{{"text": "{}"}}, {{"text": "{}"}}]'.format(*rows),
        "csv": "n,text\n1,{}\n2,{}\n".format(*rows),
        "tsv": "n\ttext\n1\t{}\n2\t{}\n".format(*rows),
    }[name.lower()[2:]].encode()
    pack = gzip.compress if "gz" in kind else pa.Codec("zstd").compress
    parts = [text[:40], text[40:]] if "two" in kind else [text]
    name += f".{kind[-3:].strip()}"
    (tmp_path / name).write_bytes(b"".join(bytes(memoryview(pack(part))) for part in parts))
    config = chosen(f"data.path={tmp_path}", "data.hold_out=2", "data.sequence_length=4")
    corpus = load_corpus(config)
    found = [corpus.train.tokens.tobytes().decode(), corpus.val_text.decode()]
    if name.startswith("a.txt"):
        assert "".join(found) == "".join(rows)
    else:
        assert sorted(found) == sorted(rows)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_packed_file_that_is_damaged_is_one_error(name, suffix, tmp_path):
    (tmp_path / f"{name}.{suffix}").write_bytes(gzip.compress(b"text\n" * 999)[:-9][::-1])
    with pytest.raises(
        ConfigError, match=r"must hold files that are what their names say.*OSError"
    ):
        load_corpus(chosen(f"data.path={tmp_path}"))


LOOKS = {
    "JSON lines": b'{"a": 1}\n\n["b"]\n' + b'{"cut": "here"}\n' * 600,
    "columns between tabs": b"a\tb\n1\t2\n3\t4\n",
}
NOTHING = {
    "prose": b"one\ntwo\nthree\n",
    "indented": b"\tif x:\n\t\ty\n\tz\n",
    "numbers": b"1\n2\n3\n",
    "one tab": b"a\tb\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", [*LOOKS, *NOTHING])
def test_text_that_looks_like_rows_is_noticed(kind, tmp_path):
    put(tmp_path, "a.txt", content={**LOOKS, **NOTHING}[kind])
    assert looks_like_rows(tmp_path / "a.txt") == (kind if kind in LOOKS else None)


@pytest.mark.parametrize(
    "unit",
    [b"a", "\u00e9".encode(), "\u20ac".encode(), "\U0001f600".encode(), b"\x80", b"\xf0\x9f"],
)
def test_pieces_are_cut_between_characters(unit):
    for before, size in itertools.product(range(4), [0, 1, PIECE, 2 * PIECE + 3]):
        text = (b"x" * before + unit * (size // len(unit) + 1))[:size]
        found = list(pieces(text))
        assert b"".join(found) == text
        assert max(map(len, found)) <= PIECE
        decoded = "".join(piece.decode("utf-8", "replace") for piece in found)
        assert decoded == text.decode("utf-8", "replace")

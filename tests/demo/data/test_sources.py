"""Files, tables and sets of the hub: which become documents, and which of them are held out."""

import os
import zlib
from itertools import product
from pathlib import Path

import pytest

from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.config.schema import DataConfig
from demo.data.corpus import Corpus, load_corpus
from demo.data.files import find_files
from demo.data.sources import open_hub
from text_sets import TEXTS, held_out, settings, write_table

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")
DOCUMENTS = sorted(text.encode() for text in TEXTS)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def of_files(path: Path) -> DataConfig:
    more = ["data.hold_out=2", "data.val_tokens=null", "data.sequence_length=4"]
    return settings("data=text", *more, path=path).data


def documents_of(corpus: Corpus) -> list[bytes]:
    return sorted(
        part.tokens[begin:end].tobytes()
        for part in (corpus.train, corpus.val)
        for begin, end in zip(part.starts, part.starts[1:], strict=False)
    )


def test_the_standard_library_is_split_by_whole_files():
    data = compose("train").data
    folder, files = find_files(data)
    assert not [name for name in files if "site-packages" in name or name.startswith("test/")]
    loaded = load_corpus(data)
    held_out = [name for name in files if zlib.crc32(name.encode()) % data.hold_out == 0]
    assert loaded.val.tokens.tobytes() == b"".join((folder / n).read_bytes() for n in held_out)
    assert len(loaded.train) + len(loaded.val) == len(files)
    assert 0.02 < loaded.val.tokens.size / loaded.train.tokens.size < 0.15


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"a\r\nb\r\n\r\n" * 9, id="crlf"),
        pytest.param(bytes(range(256)), id="not-utf8"),
        pytest.param(b"\xff\xfe" + "caf\u00e9 \U0001f600".encode("utf-16-le") * 9, id="utf16"),
        pytest.param(b"\0" * 99, id="nul"),
    ],
)
def test_bytes_survive(folder, text):
    for name in ("a.txt", "b.md", "c.py", "d.txt", "skipped.bin"):
        (folder / name).write_bytes(text)
    assert documents_of(load_corpus(of_files(folder))) == [text] * 4


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *product(("folder", "file"), ("a [1]", "b{x,y}", "c*?", "d=e, f", "\u00e9\u00e8")),
        *product(("glob",), ("b{x,y}", "d=e, f", "\u00e9\u00e8")),
    ],
)
def test_paths_of_all_kinds(folder, name, what):
    folder = folder / name
    folder.mkdir()
    for i in range(8):
        (folder / f"{name}{i}.txt").write_bytes(b"0123456789" * (i + 1))
    path = {"folder": folder, "file": folder / f"{name}7.txt", "glob": folder / "*.txt"}[what]
    loaded = load_corpus(of_files(path))
    expected = 80 if what == "file" else 360
    assert loaded.train.tokens.size + loaded.val.tokens.size == expected


def test_a_folder_is_searched_without_what_is_hidden(folder, monkeypatch):
    """Virtual environments, caches of editors, git; and capitals are as good as small letters."""
    monkeypatch.setenv("HOME", str(folder))
    for name in ("a.txt", "B.MD", ".venv/lib/c.py", ".d.py", "sub/.git/e.txt", "sub/f.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert find_files(of_files("~")) == (folder, ["B.MD", "a.txt", "sub/f.py"])


@pytest.mark.parametrize(
    ("source", "skipped"), [("stdlib", "site-packages"), ("text", ".venv")], ids=str
)
def test_what_is_skipped_is_not_searched(tmp_path, monkeypatch, source, skipped):
    """A hundred times as many files may be installed beside the standard library."""
    (tmp_path / skipped / "package").mkdir(parents=True)
    (tmp_path / "a.py").touch()
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (scanned.append(str(path)), scandir(path))[1])
    config = compose("train", [f"data={source}", f"data.path={tmp_path}"])
    assert find_files(config.data)[1] == ["a.py"]
    assert scanned == [str(tmp_path)]


def test_a_file_more_moves_no_other_between_training_and_validation(folder):
    for i in range(10):
        (folder / f"{i}.txt").write_bytes(b"%d" % i * 50)
    before = load_corpus(of_files(folder))
    (folder / "00.txt").write_bytes(b"x" * 50)
    after = load_corpus(of_files(folder))
    for part in ("train", "val"):
        kept = getattr(after, part).tokens.tobytes().replace(b"x", b"")
        assert kept == getattr(before, part).tokens.tobytes()


def test_a_second_start_is_served_from_the_cache_and_a_change_is_seen(folder, monkeypatch):
    for i in range(6):
        (folder / f"{i}.txt").write_bytes(b"abcdefgh")
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.append(self), read_bytes(self))[1])
    first, second = (documents_of(load_corpus(of_files(folder))) for _ in range(2))
    assert len(read) == 6
    assert first == second == [b"abcdefgh"] * 6
    (folder / "0.txt").write_bytes(b"ABCDEFGH")
    assert documents_of(load_corpus(of_files(folder))) == [b"ABCDEFGH", *first[1:]]
    assert len(read) == 12


def test_a_folder_without_text_is_one_error(folder):
    (folder / "a.rst").write_bytes(b"abc")
    with pytest.raises(ConfigError, match=r"\(none there\); give another path"):
        load_corpus(of_files(folder))


@pytest.mark.parametrize("name", ["a [b] {c}.jsonl", "a.parquet", "a.csv", "[1]/a.csv", "hub"])
def test_each_row_of_a_table_is_a_document_held_out_by_its_text(name, folder, hub):
    if name == "hub":
        config = settings("data=hub", name=hub).data
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        write_table(folder / name, TEXTS, "body")
        path = folder / name.partition("/")[0]  # the file, or the folder that it is in
        config = settings("data=text", path=path, column="body").data
    corpus = load_corpus(config)
    assert documents_of(corpus) == DOCUMENTS
    assert corpus.val_text == b"".join(text.encode() for text in TEXTS if held_out(text))


def test_a_folder_may_hold_files_of_all_kinds_and_rows_without_text(folder):
    write_table(folder / "rows.jsonl", [*TEXTS[20:], None, ""])
    write_table(folder / "others.parquet", TEXTS[:20])
    (folder / "notes.txt").write_bytes(b"\xff a text file\r\n")
    corpus = load_corpus(settings("data=text", path=folder).data)
    assert documents_of(corpus) == sorted([b"\xff a text file\r\n", *DOCUMENTS])
    held = [text.encode() for text in TEXTS if held_out(text)]
    assert all(text in corpus.val_text for text in held)  # whatever its file


# Beside the cases of tests/helpers/mistakes.py.
NOT_THERE = "column of .* that holds text, got 'text', which is not there; use one of txt"
DAMAGED = "must hold files that are what their names say"
EMPTY = "must hold files with text"


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        ("csv", b"txt\nabc\n", NOT_THERE),
        ("jsonl", b'{"text": "a"}\n{"text": {"b": 1}}\n', "holds text, .* which holds dict; make"),
        ("jsonl", b'{"text": ["abc"]}\n', "holds text, .* which holds list"),
        ("parquet", b"PAR1 this is none", DAMAGED),
        ("jsonl", b'{"text": "a"}\n\n["b"]\n', f"{DAMAGED}.*JSON parse error"),
        ("jsonl", b'{"text": "\xff"}\n', f"{DAMAGED}.*UnicodeDecodeError"),
        ("jsonl", b"", f"{DAMAGED}.*it is empty"),
        ("csv", b"", f"{DAMAGED}.*it is empty"),
        ("csv", b"text\n", EMPTY),
    ],
)
def test_a_table_that_cannot_be_read_is_one_error(suffix, content, says, tmp_path):
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        load_corpus(settings("data=text", path=file).data)
    assert "\n" not in str(error.value)
    assert file.name in str(error.value)


def test_a_cell_of_a_csv_is_what_is_written_there(folder):
    cells = ["007", "1.50", "NA", "null", "true", "two\nlines", 'a "b", c']
    quoted = ('"' + cell.replace('"', '""') + '"' for cell in cells)
    lines = [f"{number},{cell}" for number, cell in enumerate([*cells[:5], *quoted, ""])]
    (folder / "a.csv").write_text("\n".join(["n,text", *lines]) + "\n")
    found = documents_of(load_corpus(of_files(folder / "a.csv")))
    assert found == sorted(cell.encode() for cell in [*cells[:5], *cells])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "a"}, "data.name must be a text set that"),
        ({"split": "test"}, "data.name must be a text set that"),
        ({"column": "body"}, "that holds text, got 'body', which is not there; use one of n, text"),
        ({"column": "n"}, "holds text, got 'n', which holds int64; use one of text"),
        ({"name": "objects"}, "data.column .* holds text, got 'text', which holds"),
    ],
    ids=str,
)
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_set_that_cannot_be_read_is_one_error(streaming, values, says, hub, monkeypatch):
    monkeypatch.chdir(hub.parent)
    Path("objects").mkdir()
    Path("objects/a.jsonl").write_text('{"text": {"b": "c"}}\n' * 9)
    config = settings("data=hub", f"data.streaming={streaming}", **({"name": hub} | values))
    with pytest.raises(ConfigError, match=says) as error:
        open_hub(config.data)
    assert "\n" not in str(error.value)

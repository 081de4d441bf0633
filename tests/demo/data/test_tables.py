"""Of a table file the column of text alone is read, whatever the others hold."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from demo.config.errors import ConfigError
from demo.data import tables
from demo.data.corpus import load_corpus
from demo.data.files import Files
from demo.data.sources import open_hub, read_files
from demo.data.tables import read_rows
from text_sets import settings

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")

ROWS = [{"text": f"text {i} caf\u00e9"} for i in range(3)]
OTHERS = {
    "mixed types": ["1", '"n/a"', "[1, {}]"],
    "deep": ["1", "[" * 9999 + "]" * 9999, '{"a":' * 9999 + "1" + "}" * 9999],
    "lone surrogate": ['"\\ud800"', '"\\udfff\\ud800"', "null"],
    "huge number": ["1", "9" * 9999, "-1e999"],
    "same name inside": ['{"text": 1}', '{"text": []}', "[]"],
}


def texts_of(file: Path, **values) -> list[str]:
    config = settings("data=text", path=file).data
    for name, value in values.items():
        setattr(config, name, value)
    table = read_files(Files([(file.parent, file.name)]), config)
    return [row["text"].decode() for row in table]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n \r\n"], ids=ascii)
def test_nothing_of_another_column_matters(other, end, tmp_path):
    lines = [
        json.dumps(row)[:-1] + f', "score": {value}}}'
        for row, value in zip(ROWS, OTHERS[other], strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + end)
    assert texts_of(tmp_path / "a.jsonl") == [row["text"] for row in ROWS]


def test_a_column_may_have_other_types_in_a_csv_and_lone_surrogates_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text("n,text\n1,a\nx,b\n2.5,c\n")
    assert texts_of(tmp_path / "a.csv") == ["a", "b", "c"]
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}')
    (found,) = read_rows(tmp_path / "a.jsonl", ".jsonl", "text", {})
    assert found == "\ud800"


ARRAYS = {
    "one line": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=2),
    "with a mark": "\ufeff" + json.dumps(ROWS),
    "lines": "\n\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("form", ARRAYS)
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_json_is_an_array_or_lines(form, suffix, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", chunk)
    file = tmp_path / f"a{suffix}"
    file.write_text(ARRAYS[form], encoding="utf-8")
    assert list(read_rows(file, suffix, "text", {})) == [row["text"] for row in ROWS]


BAD = {
    "no object": ('{"text": "a"}\n\n["b"]\n', "line 3: JSON parse error: .*got list"),
    "cut short": ('{"text": "a"}\n\n\n{"text": "b\n', "line 4: JSON parse error: Invalid control"),
    "an array of another": ('[{"text": "a"},\n\n"b"]', "line 3: .*got str"),
    "an array without an end": ('[{"text": "a"},\n{"text": "b"}\n', "line 3: .*has no end"),
    "an array cut short": ('[{"text": "a"},\n{"text":\n"b\n', "line 3: .*Invalid control"),
    "an array without a comma": ('[{"text": "a"}\n{"text": "b"}]', "line 2: .*Expecting ','"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_read_is_named_by_its_line(case, tmp_path):
    text, says = BAD[case]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=f"'.*a.json' \\({says}"):
        texts_of(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_dotted_column_is_inside_another(name, tmp_path):
    rows = [{"doc": {"text": f"t{i}", "n": i}, "text": "other"} for i in range(3)]
    if name == "a.parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        lines = [*map(json.dumps, rows), '{"doc": null}', '{"doc": 3}', "{}"]
        lines.append('{"doc": {"text": "deep"}, "x": ' + "[" * 9999 + "]" * 9999 + "}")
        (tmp_path / name).write_text("\n".join(lines))
    found = texts_of(tmp_path / name, column="doc.text")
    assert found == ["t0", "t1", "t2"] + ["deep"] * (name != "a.parquet")
    if name != "a.parquet":
        (tmp_path / name).write_text("\n".join(lines[:-1]))
    with pytest.raises(ConfigError, match=r"got 'doc.x', which is not there; use one of doc"):
        texts_of(tmp_path / name, column="doc.x")


def test_options_are_those_of_pandas(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes("n;text\n1;caf\u00e9, a\n".encode("latin-1"))
    assert texts_of(file, options={"sep": ";", "encoding": "latin-1"}) == ["caf\u00e9, a"]
    (tmp_path / "a.tsv").write_text("n\ttext\n1\ta, b\n")
    assert texts_of(tmp_path / "a.tsv") == ["a, b"]
    for options, says in ({"color": 1}, "color"), ({"encoding": "x"}, "unknown encoding: x"):
        with pytest.raises(ConfigError, match=rf"data.options must be those of .*{says}"):
            texts_of(file, options=options)


def test_an_option_is_read_from_the_command_line():
    data = settings("data=text", 'data.options={sep: ";", encoding: latin-1}', path="a").data
    assert data.options == {"sep": ";", "encoding": "latin-1"}


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_set_of_save_to_disk_is_loaded(streaming, tmp_path):
    import datasets

    rows = [{"doc": {"text": f"text {i}"}} for i in range(99)]
    folder = tmp_path / "saved [1]"
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=2)
    streamed = f"data.streaming={streaming}"
    data = settings("data=hub", streamed, name=folder, column="doc.text").data
    assert [row["text"] for row in open_hub(data)] == [row["doc"]["text"] for row in rows]
    if streaming == "false":
        data.split = "train[:50%]"
        assert len(open_hub(data)) == 50
        assert len(load_corpus(data).train) > 30

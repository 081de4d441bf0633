"""Prompts: every byte of them survives, and a line that is wrong is named."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.config.schema import InferConfig
from demo.inference.prompts import read_prompts


def prompts(**given) -> InferConfig:
    return replace(compose("infer"), **given)


def test_a_prompt_that_is_not_utf8_is_read_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p").write_bytes(b"\xff\r\n\0")
    assert read_prompts(prompts(prompt_file="p")) == [b"\xff\r\n\0"]
    assert read_prompts(prompts(prompt=os.fsdecode(b"a\xff "))) == [b"a\xff "]


def test_a_file_has_a_prompt_in_each_line_that_is_not_blank(tmp_path):
    file = tmp_path / "p"
    file.write_bytes(b"  one \r\n\n \t\r\ntwo\x0b\xff\rthree\nfour")
    expected = [b"  one ", b"two\x0b\xff\rthree", b"four"]
    assert read_prompts(prompts(prompts_file=str(file))) == expected


def test_a_jsonl_file_has_a_prompt_of_any_lines_in_each_line(tmp_path):
    given = ["def f(x):\n    return ", " caf\u00e9 \U0001f600\r\n", '{"prompt": "x"}']
    lines = [json.dumps({"prompt": text, "tokens": [1]}) for text in given]
    lines[1:1] = ["", " \t\r", json.dumps({"prompt": given[1]}, ensure_ascii=False) + "\r"]
    file = tmp_path / "p.JSONL"
    file.write_bytes("\n".join(lines).encode())
    expected = [text.encode() for text in (given[0], given[1], given[1], given[2])]
    assert read_prompts(prompts(prompts_file=str(file))) == expected


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"prompt": "a"', "what is not JSON"),
        (b'{"prompt": "\xff"}', "what is not text in UTF-8"),
        (b'{"prompt": "\\ud800"}', "what is not text in UTF-8"),
        (b"[" * 9999, "what is not JSON"),
        (b'["a"]', "no prompt"),
        (b'{"prompt": ""}', 'prompt=""'),
        (b'{"prompt": null}', "prompt=null"),
        (b'{"prompt": ["a"]}', 'prompt=["a"]'),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_line_of_a_jsonl_file_that_is_wrong_is_named(line, got, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(ConfigError) as error:
        read_prompts(prompts(prompts_file=str(file)))
    assert f"got {got} in line 3 of {str(file)!r}; write" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_standard_input_that_is_closed_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"got '-' \(standard input is closed\); give another"):
        read_prompts(prompts(prompt_file="-"))

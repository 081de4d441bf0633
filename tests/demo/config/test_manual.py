"""--help: a manual made of the configs and of the comments in them."""

import subprocess
import sys

import pytest

from demo.config.command import CONFIG_DIR, compose
from demo.config.schema import all_keys
from small_runs import run


def printed(script, arguments, monkeypatch, capsys, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run([*arguments, "--help"], monkeypatch, capsys, script=script)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("train", []), ("train", ["model=mamba2"]), ("infer", ["norm=training"])],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_every_value_is_there_as_it_is_written_on_the_command_line(
    script, arguments, monkeypatch, capsys
):
    out = printed(script, arguments, monkeypatch, capsys)
    keys = all_keys(compose(script, arguments))
    sections = {key.rpartition(".")[0] for key in keys}
    for key in set(keys) - sections:
        assert f"\n    {key}: " in out


def test_meanings_are_those_of_the_files_that_were_composed(monkeypatch, capsys):
    out = printed("train", ["model=mamba2", "model.d_state=7"], monkeypatch, capsys)
    meanings = {line.split(":")[0].strip(): line for line in out.splitlines() if ": " in line}
    assert "    model.d_state: 7 " in out
    assert "Mamba2: gate first" in out
    assert "queries" not in meanings["model.head_dim"]
    assert "groups that share B and C" in out
    # of the file that the chosen one starts from
    assert "largest norm of the gradient" in meanings["optim.gradient_clip"]


def test_a_command_lists_its_own_groups(monkeypatch, capsys):
    out = printed("infer", [], monkeypatch, capsys)
    assert "  norm: inference, training\n" in out
    assert "optim:" not in out


@pytest.mark.parametrize("columns", [72, 100])
def test_values_fit_the_terminal(columns, monkeypatch, capsys):
    out = printed("train", [], monkeypatch, capsys, columns)
    values = [line for line in out.splitlines() if line.startswith("    ") and ": " in line]
    assert len(values) > 20
    assert max(map(len, values)) <= columns


def test_what_infer_takes_is_explained():
    text = (CONFIG_DIR / "infer.yaml").read_text(encoding="utf-8")
    lines = text.split("\nhydra:")[0].splitlines()
    values = [line for line in lines if line[:1].isalpha() and not line.startswith("defaults")]
    unexplained = {line.split(":")[0] for line in values if " # " not in line}
    assert not unexplained


def test_a_reader_of_the_manual_may_leave():
    command = [sys.executable, str(CONFIG_DIR.parent / "infer.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""

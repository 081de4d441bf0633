"""The examples of docs/inference.md do what they say."""

import re
import subprocess
from pathlib import Path

import pytest

from demo import Options, Result
from small_runs import run

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if "<" not in line]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that looks like the repository, where nothing is left."""
    for name in ("checkpoints", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(line, repository):
    given, pipe, command = line.rpartition(" | ")
    shell = ["bash", "-c"]
    stdin = subprocess.run([*shell, given], capture_output=True, check=True).stdout if pipe else b""
    words = subprocess.run([*shell, f"printf '%s\\0' {command}"], capture_output=True, check=True)
    python, script, *arguments = words.stdout.decode().split("\0")[:-1]
    assert (python, script) == ("python", "infer.py")
    code, out, err = run("infer", *arguments, stdin=stdin)
    assert code == 0, err
    assert len(out) > 20
    assert err.strip().count("\n") == 0
    assert sorted(path.name for path in repository.iterdir()) == ["checkpoints", "train.py"]


def test_the_library_examples_run(repository, capsys):
    names = {}
    for block in blocks("python"):
        exec(compile(block, "docs/inference.md", "exec"), names)
    out = capsys.readouterr().out
    assert "\n'def f(x):' -> '" in out
    assert "checkpoint must be a run folder" in out


def rows(heading: str) -> list[tuple[str, ...]]:
    """The cells of the tables below a heading, code marks removed."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip(" `") for cell in line.split("|")[1:-1]) for line in lines]


def test_the_tables_are_those_of_the_code():
    defaults = {name: getattr(Options(), name) for name in Options.__dataclass_fields__}
    values = {None: "null", (): "[]"}
    assert {name: default for name, default, _ in rows("How the text goes on")} == {
        name: values.get(value, str(value)) for name, value in defaults.items()
    }
    keys = [key for names, _ in rows("Many prompts") for key in names.split("`, `")]
    assert sorted(keys) == sorted(Result.__dataclass_fields__)

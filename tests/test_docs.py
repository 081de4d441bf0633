"""The examples of docs/inference.md, exactness.md and operator.md do what they say."""

import re
import subprocess
from pathlib import Path

import pytest

from demo import Options, Result
from small_runs import run

ROOT = Path(__file__).resolve().parent.parent
INFERENCE, EXACTNESS, OPERATOR = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("inference", "exactness", "operator")
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line
    for page in (INFERENCE, EXACTNESS)
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if "<" not in line
]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that looks like the repository, and in which a command must leave nothing."""
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
    counts = "exact=true" in line and "compare" not in line
    assert err.strip().count("\n") == counts
    if counts:
        assert err.endswith("log-probabilities equal the training forward's, bit for bit\n")
    assert sorted(path.name for path in repository.iterdir()) == ["checkpoints", "train.py"]


def printed_by_examples(page: str, capsys) -> str:
    """What the Python blocks of a page print when they run one after the other."""
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, "docs", "exec"), names)
    return capsys.readouterr().out


def test_the_library_examples_run(repository, capsys):
    out = printed_by_examples(INFERENCE, capsys)
    assert "\n'def f(x):' -> '" in out
    assert "checkpoint must be a run folder" in out


def test_the_example_of_exactness_runs(repository, capsys):
    printed_by_examples(EXACTNESS, capsys)


def test_the_operator_examples_run(capsys):
    assert printed_by_examples(OPERATOR, capsys) == blocks(OPERATOR, "text")[0]


def rows(heading: str) -> list[tuple[str, ...]]:
    """The cells of the tables below a heading of docs/inference.md, code marks removed."""
    part = INFERENCE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip(" `") for cell in line.split("|")[1:-1]) for line in lines]


def test_the_tables_are_those_of_the_code():
    defaults = {name: getattr(Options(), name) for name in Options.__dataclass_fields__}
    values = {None: "null", (): "[]"}
    assert {name: default for name, default, _ in rows("Sampling")} == {
        name: values.get(value, str(value)) for name, value in defaults.items()
    }
    keys = [key for names, _ in rows("Many prompts") for key in names.split("`, `")]
    assert sorted(keys) == sorted(Result.__dataclass_fields__)


def test_a_link_between_pages_leads_somewhere():
    """The file is there, and the heading where a link names one."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "NOTES.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, f"{page.name}: {target}"

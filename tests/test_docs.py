"""The documents do what they say: every `python` and `sh` block is run, except those that begin
with `# needs:` and what is lacking here."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from demo import Options, Result
from small_runs import SIX_STEPS, run
from text_sets import TEXTS, write_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "NOTES.md")
}
INFERENCE = PAGES["docs/inference.md"]


def blocks(page: str, language: str) -> list[str]:
    """Those of a page that can be run, or shown."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [block for block in found if not block.startswith("# needs: ")]


def test_a_block_that_is_not_run_says_why():
    for page, text in PAGES.items():
        assert not re.search(r"^(\t| {4})(python|pip|torchrun) ", text, re.MULTILINE), page
        languages = set(re.findall(r"^```([^\n]*)\n.*?^```$", text, re.MULTILINE | re.DOTALL))
        assert languages <= {"python", "sh", "text", ""}, page
    assert not re.search(r"^# needs: *$", "".join(PAGES.values()), re.MULTILINE)


COMMANDS = [
    (page, line)
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


@pytest.fixture
def repository(tmp_path, words, monkeypatch):
    """A folder that looks like the repository, beside what the examples read."""
    for name in ("checkpoints", "train.py", "infer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "words").symlink_to(words.parent)
    for name in ("notes/a.txt", "notes/b.py", "book/a.md", "linux/a.rst", "linux/drivers/b.rst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name + "".join(TEXTS), encoding="utf-8")
    write_table(tmp_path / "posts.jsonl", TEXTS, "body")
    csv = "n;text\n" + "".join(f"{n};{n} caf\u00e9s, {'x' * 40}\n" for n in range(40))
    (tmp_path / "a.csv").write_text(csv, encoding="latin-1")
    (tmp_path / "prompts.txt").write_text("import \ndef f(x):\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAINED_A_LITTLE = ["data=text", "data.path=notes", *SIX_STEPS]


def shortened(script: str, arguments: list[str]) -> list[str]:
    """The same with a small model, few steps, and little text, where the example does not say what
    text; but for the steps, what it says holds."""
    given = {argument.partition("=")[0]: argument for argument in arguments}
    few = [] if "--help" in given else TRAINED_A_LITTLE
    if script == "infer.py":
        few = ["max_new_tokens=20", *["bench_runs=1"] * ("compare=true" in arguments)]
    if "data" in given:
        few = few[2:]
    given.pop("optim.steps", None)
    return [*given.values(), *(value for value in few if value.partition("=")[0] not in given)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_a_command_runs(page, line, repository, own_cache_and_no_network):
    before = sorted(path.name for path in repository.iterdir())
    given, pipe, command = line.rpartition(" | ")
    shell = ["bash", "-c"]
    stdin = subprocess.run([*shell, given], capture_output=True, check=True).stdout if pipe else b""
    words = subprocess.run([*shell, f"printf '%s\\0' {command}"], capture_output=True, check=True)
    program, script, *arguments = words.stdout.decode().split("\0")[:-1]
    if program != "python" or script == "-m":
        few = TRAINED_A_LITTLE if "train.py" in line else []
        line = shlex.join([program, script, *arguments, *few])
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*shell, line], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return
    arguments = shortened(script, arguments)
    code, out, err = run(script.removesuffix(".py"), *arguments, stdin=stdin)
    assert code == 0, err
    assert len(out) > 20
    if script == "train.py":
        assert "--help" in arguments or list(repository.glob("runs/*/model.safetensors"))
        return
    counts = "exact=true" in line and "compare" not in line
    assert err.strip().count("\n") == counts
    if counts:
        assert err.endswith("log-probabilities equal the training forward's, bit for bit\n")
    assert sorted(path.name for path in repository.iterdir()) == before


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_examples_run(page, repository, capsys):
    """One after the other, and they print what the page says."""
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    out = capsys.readouterr().out
    if page in ("docs/operator.md", "docs/adopt-transformers.md"):
        assert out == "".join(blocks(page, "text"))
    if page == "docs/inference.md":
        assert "\n'def f(x):' -> '" in out
        assert "checkpoint must be a run folder" in out


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
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            other = ((ROOT / page).parent / name).resolve() if name else ROOT / page
            assert other.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, f"{page}: {target}"


def test_every_result_is_listed_with_its_command():
    rows = [line for line in PAGES["docs/benchmarks.md"].splitlines() if line.startswith("| [")]
    files = {name for row in rows for name in re.findall(r"\(\.\./(benchmarks/.*?)\)", row)}
    there = (ROOT / "benchmarks" / "results").rglob("*.*")
    assert files == {file.relative_to(ROOT).as_posix() for file in there}
    for row in rows:
        (module,) = re.findall(r"`python (?:-m )?(benchmarks[./]\w+)", row)
        assert importlib.util.find_spec(module.replace("/", ".")), row

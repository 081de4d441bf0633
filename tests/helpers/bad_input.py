"""The one line that answers a mistake, and the table of docs/bad-input.md, which
`python tests/helpers/bad_input.py` writes anew.
"""

import contextlib
import functools
import io
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "bad-input.md"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]

from mistakes import CASES, Bad  # noqa: E402
from small_runs import SIX_STEPS, run, train_in, write_checkpoint  # noqa: E402


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        left: The files that were not there before, are gone, or are not what they were.
    """

    code: int
    out: str
    err: str
    left: tuple[str, ...]


@functools.cache
def good_runs() -> tempfile.TemporaryDirectory:
    """A folder with a checkpoint in `runs/small`, and a run that was stopped in `runs/stopped`."""
    made = tempfile.TemporaryDirectory()
    runs = Path(made.name, "runs")
    write_checkpoint(runs / "small", "mamba2")
    with contextlib.redirect_stdout(io.StringIO()):
        train_in(runs, "model=mamba2", *SIX_STEPS).run.rename(runs / "stopped")
    (runs / "stopped/loss.png").unlink()
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@functools.cache
def answer(case: Bad) -> Answer:
    """Run the command in this process, in a copy of the good runs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        shutil.copytree(good_runs().name, folder, dirs_exist_ok=True)
        if case.change is not None:
            case.change(folder)
        before = files(folder)
        with contextlib.chdir(folder):
            code, *streams = run(case.script, *case.arguments, stdin=case.stdin)
        after = files(folder)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    texts = []
    for text in streams:
        text = text.replace(str(folder), "<folder>").replace(str(ROOT), "<repository>")
        # how much text the running Python's standard library holds
        text = re.sub(r"\d+ in \d+ of \d+ documents", "<n> in <n> of <n> documents", text)
        texts.append(re.sub(r"this host, [\d.]+ GiB", "this host, <n> GiB", text))
    return Answer(code, *texts, tuple(sorted(changed)))


# ------------------------------------------------------------------------------------- the table

HEAD = """# Bad input

What `train.py` and `infer.py` answer when something is wrong: one line on standard error that says
what was given, what must hold and, where that leaves it open, what to do; exit code 2; nothing is
left behind. Nothing of a checkpoint is ever run as code. This page is written by
`python tests/helpers/bad_input.py` from what the commands say, and `tests/test_bad_input.py` fails
where it is out of date.
"""


def table() -> str:
    """The text of docs/bad-input.md."""
    text = HEAD
    for heading, group in CASES.items():
        described = any(case.what for case in group)
        columns = ["given", "command", "answer"] if described else ["command", "answer"]
        text += f"\n## {heading}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        for case in group:
            cells = [f"`{case.command}`", f"`{answer(case).err.strip()}`"]
            cells = [cell.replace("|", "\\|") for cell in ([case.what] * described) + cells]
            text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(f"{sum(map(len, CASES.values()))} cases in {TABLE.relative_to(ROOT)}")

"""Every bad input is answered with one line, runs no code and leaves nothing; docs/bad-input.md."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from bad_input import TABLE, answer, table
from demo.config.command import command
from mistakes import CASES, RUN, Bad

ALL = [case for group in CASES.values() for case in group]


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.what or 'value'}: {case.command}")
def test_one_line_and_nothing_left(case):
    found = answer(case)
    assert found.code == 2
    assert found.err.startswith(f"{case.script}.py: error: ")
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert found.left == ()


def test_there_are_enough_cases_and_none_is_there_twice():
    assert len(ALL) >= 100
    assert len({(case.what, case.command) for case in ALL}) == len(ALL)


def test_the_table_is_what_the_commands_say():
    written = TABLE.read_text(encoding="utf-8").splitlines()
    for line, expected in zip(written, table().splitlines(), strict=False):
        assert line == expected, "write it anew with: python tests/helpers/bad_input.py"
    assert written == table().splitlines()


def test_the_same_folder_is_good_without_the_mistake():
    """So that each answer is about what its case did."""
    assert answer(Bad(f"infer checkpoint={RUN} max_new_tokens=1")).code == 0
    resumed = answer(Bad("train resume=runs/stopped"))
    assert resumed.code == 0
    assert "runs/stopped/loss.png" in resumed.left


@pytest.mark.parametrize(
    ("script", "argument", "says"),
    [
        ("train", "modle=fla", b"there is no key 'modle'; did you mean model?"),
        ("infer", "checkpoint=broken.ckpt", b"checkpoint must be a run folder"),
    ],
)
def test_the_command_itself_says_the_same_line(script, argument, says, tmp_path):
    (tmp_path / "broken.ckpt").write_bytes(b"broken")
    file = Path(__file__).parent.parent / f"{script}.py"
    done = subprocess.run(
        [sys.executable, str(file), argument],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}.py: error: ".encode())
    assert says in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""
    assert [path.name for path in tmp_path.iterdir()] == ["broken.ckpt"]


KEYS = [
    "seed", "model", "norm", "norm.path", "max_new_tokens", "top_k", "optim.betas", "data", "size"
]  # fmt: skip
VALUES = (
    "", "null", "1", "-1", "1.5", "nan", "inf", "1e999", "true", "[]", "{}", "[1,2]", "{a: 1}",
    "a,b", "'", "'a b'", "a b", "${x}", "${seed}", "???", "fla", "x=y", "a:b", "\\", "(", "}",
    "range(1,3)", "@", "$", "~", "\n", "\u00e9", "\0", "--", "9" * 30,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_command_line_is_taken_or_answered_with_one_line(seed, tmp_path, monkeypatch, capsys):
    """Hydra's composition alone: nothing is trained or generated."""
    monkeypatch.chdir(tmp_path)
    random = Random(seed)
    for _ in range(100):
        script = random.choice(["train", "infer"])
        arguments = ["-m"] * (random.random() < 0.2)
        for _ in range(random.randint(1, 2)):
            prefix = random.choice(["", "", "", "+", "++", "~"])
            arguments.append(f"{prefix}{random.choice(KEYS)}={random.choice(VALUES)}")
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        code = 0
        try:
            command(script)(lambda config: None)()
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        if code:
            assert (code, out) == (2, ""), arguments
            assert err.startswith(f"{script}.py: error: "), arguments
            assert err.count("\n") == 1, arguments

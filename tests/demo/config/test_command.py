"""--help, --cfg and how a command ends."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from demo.config.command import command
from demo.config.errors import ConfigError
from demo.config.overrides import CONFIG_DIR, all_keys, compose_values
from small_runs import SIX_STEPS, run

ROOT = CONFIG_DIR.parent


def printed(script, *arguments):
    code, out, err = run(script, *arguments)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("train", []), ("train", ["model=mamba2", "model.d_state=7"]), ("infer", ["norm=training"])],
    ids=["train", "mamba2", "infer"],
)
@pytest.mark.parametrize("columns", [72, 100])
def test_help_has_every_value_as_it_is_written_on_the_command_line(
    script, arguments, columns, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = printed(script, *arguments, "--help")
    keys = all_keys(compose_values(script, arguments).values)
    sections = {key.rpartition(".")[0] for key in keys}
    for key in set(keys) - sections:
        assert f"\n    {key}: " in out
    assert f"python {script}.py" in out
    values = [line for line in out.splitlines() if line.startswith("    ") and ": " in line]
    assert max(map(len, values)) <= columns


def test_help_explains_values_as_the_composed_files_do(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = printed("train", "--help", "model=mamba2", "model.d_state=7")
    meanings = {line.split(":")[0].strip(): line for line in out.splitlines() if ": " in line}
    assert "    model.d_state: 7 " in out
    assert "\n  Mamba2: gate before RMSNorm" in out
    assert "queries" not in meanings["model.head_dim"]
    assert "groups that share B and C" in out
    # of the file that the chosen one starts from
    assert "largest norm of the gradient" in meanings["optim.gradient_clip"]


def test_help_lists_the_groups_of_its_own_command():
    out = printed("infer", "--help")
    assert "  norm: inference, training\n" in out
    assert "\n  which text\n    prompt: null " in out
    assert "optim:" not in out


def test_cfg_prints_the_composed_config_of_each_job():
    out = printed("infer", "--cfg", "job", "prompt=a: ${b}")
    assert yaml.safe_load(out) == compose_values("infer", ["prompt=a: ${b}"]).values
    out = printed("train", "-c", "job", "-m", "seed=4,5")
    assert [job["seed"] for job in yaml.safe_load_all(out)] == [4, 5]


@pytest.mark.parametrize("script", ["train", "infer"])
def test_help_and_mistakes_are_answered_within_a_second(script, tmp_path):
    """Nothing heavy is imported for them. (Seconds of the processor: tests run side by side.)"""
    code = (
        "import sys\n"
        f"import {script}\n"
        "try:\n"
        f"    {script}.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'lightning', 'datasets', 'matplotlib', 'triton'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    for argument, expected in (("--help", 0), ("sed=1", 2)):
        seconds = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, "-c", code, argument],
                cwd=tmp_path, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert (done.returncode, bool(done.stderr)) == (expected, bool(expected)), done.stderr
        assert min(seconds) < 1  # 0.6 on two cores
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ConfigError("a\n   b"), 2, "train.py: error: a b\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["mistake", "interrupted"],
)
def test_how_a_command_ends(raised, code, said, monkeypatch, capsys):
    def main(config):
        raise raised

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        command("train")(main)()
    assert (left.value.code, capsys.readouterr().err) == (code, said)


def test_a_fault_of_ours_is_not_taken_for_the_users(monkeypatch):
    def main(config):
        raise ValueError("ours")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ValueError, match="ours"):
        command("train")(main)()


FULL = Path("/dev/full")
WRITERS = {
    "training": ("train", SIX_STEPS),
    "help": ("train", ["--help"]),
    "cfg": ("train", ["--cfg", "job"]),
    "text": ("infer", ["model=mamba2", "max_new_tokens=3"]),
    "bench": ("infer", ["model=mamba2", "max_new_tokens=3", "bench=true"]),
}


@pytest.mark.skipif(not FULL.exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("case", WRITERS)
def test_an_output_that_takes_no_more_is_one_line(case, tmp_path):
    script, arguments = WRITERS[case]
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    with FULL.open("wb") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    says = f"{script}.py: error: standard output must take the text, got an error (No "
    assert line.startswith(says)
    # There was no room for the table at the end alone.
    assert len(list(tmp_path.glob("runs/*/loss.png"))) == (case == "training")


def test_a_reader_may_leave():
    process = [sys.executable, str(Path(ROOT, "infer.py")), "--help"]
    with subprocess.Popen(process, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141  # 128 + SIGPIPE

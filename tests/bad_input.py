"""What users get wrong, and the one line that answers it: the cases of test_bad_input.py and the
table of docs/bad-input.md. `python tests/bad_input.py` writes that table anew.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "bad-input.md"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]

from small_runs import SIX_STEPS, write_checkpoint  # noqa: E402


@dataclass(frozen=True)
class Bad:
    """A command line, and what was done before in a folder with two good runs.

    Attributes:
        script: "train" or "infer".
        arguments: Of the command line.
        what: What `change` did, in words.
        change: Gets the folder.
        stdin: What standard input holds.
    """

    script: str
    arguments: tuple[str, ...]
    what: str = ""
    change: Callable[[Path], object] | None = None
    stdin: bytes = b""

    @property
    def command(self) -> str:
        return f"python {self.script}.py {shlex.join(self.arguments)}"


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


# ------------------------------------------------------------------------------------- the cases

RUN, WEIGHTS, CONFIG = "runs/small", "runs/small/model.safetensors", "runs/small/config.yaml"
LAST, STOPPED = "runs/stopped/last.ckpt", "runs/stopped/config.yaml"
PUBLISHED = {
    "model_type": "mamba2",
    "num_heads": 4,
    "head_dim": 16,
    "hidden_size": 32,
    "state_size": 16,
    "n_groups": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}


class RunsCode:
    """A pickle of it makes a file where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("code-of-the-checkpoint-ran",)


def write(name: str, data: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def edit(name: str, how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(how((folder / name).read_bytes()))


def replace(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def other(data: bytes) -> bytes:
        assert old in data, f"{name} must hold {old!r}: there is nothing to spoil"
        return data.replace(old, new)

    return edit(name, other)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at:][1:]


def several(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes]


def published(**keys: object) -> Callable[[Path], None]:
    """A folder as transformers writes it, without weights."""
    return write("published/config.json", json.dumps({**PUBLISHED, **keys}))


def infer(*arguments: str, stdin: bytes = b"") -> Bad:
    return Bad("infer", arguments, stdin=stdin)


def checkpoint(what: str, change: Callable[[Path], object], name: str = RUN) -> Bad:
    return Bad("infer", (f"checkpoint={name}",), what, change)


def resume(what: str, change: Callable[[Path], object], *more: str) -> Bad:
    return Bad("train", ("resume=runs/stopped", *more), what, change)


def nothing(folder: Path) -> None:
    pass


INFER_VALUES = [
    infer("modle=fla"),
    infer("+colour=red"),
    infer("model=rwkv"),
    infer("norm=fast"),
    infer("norm.path=fast"),
    infer("norm=null"),
    infer("data=stdlib"),
    infer("temperature=0.5,1"),
    infer("prompt="),
    infer("prompt=a", "prompt_file=b"),
    infer("max_new_tokens=0"),
    infer("max_new_tokens=many"),
    infer("temperature=-1"),
    infer("temperature=nan"),
    infer("top_k=0"),
    infer("top_p=1.5"),
    infer("repetition_penalty=0"),
    infer("stop="),
    infer('stop=["a", b]'),
    infer("seed=-1"),
    infer("device=tpu"),
    infer("output=xml"),
    infer("batch_size=0"),
    infer("compare=perhaps"),
    infer("compare=true", "bench=true"),
    infer("bench=true", "prompts_file=-"),
    infer("bench_runs=0"),
    infer("prompt"),
    infer("--foo"),
    infer("-m", "model=fla,mamba2"),
]

FILES = [
    Bad("infer", ("prompt_file=missing.txt",), "a file that is not there"),
    Bad("infer", ("prompt_file=runs",), "a folder"),
    Bad("infer", ("prompt_file=-",), "nothing on standard input"),
    Bad("infer", ("prompts_file=-",), "blank lines alone", stdin=b"\n  \r\n"),
    Bad("infer", ("prompts_file=missing.txt",), "a file that is not there"),
    Bad(
        "infer",
        ("prompts_file=p.jsonl",),
        "a second line that is not JSON",
        write("p.jsonl", '{"prompt": "a"}\nimport\n'),
    ),
    Bad(
        "infer",
        ("prompts_file=p.jsonl",),
        "a line without a prompt",
        write("p.jsonl", '{"text": "import"}\n'),
    ),
    Bad("train", ("data.path=missing",), "a folder that is not there"),
    Bad("train", ("data=text", "data.path=*.rst"), "a glob that nothing matches"),
    Bad("train", ("runs_dir=file/runs",), "a file in the way", write("file", "")),
]

CHECKPOINTS = [
    checkpoint("a folder that is not there", nothing, "missing"),
    checkpoint("a file of five bytes", write("broken.ckpt", b"bytes"), "broken.ckpt"),
    checkpoint("a pickle that would run code", write("a.ckpt", pickle.dumps(RunsCode())), "a.ckpt"),
    Bad("infer", ("model=fla", f"checkpoint={RUN}"), "a run of model=mamba2", nothing),
    checkpoint("no `config.yaml`", lambda folder: (folder / CONFIG).unlink()),
    checkpoint("no `model.safetensors`", lambda folder: (folder / WEIGHTS).unlink()),
    checkpoint("weights that are empty", write(WEIGHTS, b"")),
    checkpoint("weights cut in half", edit(WEIGHTS, lambda data: data[: len(data) // 2])),
    checkpoint("a bit of a weight flipped", edit(WEIGHTS, lambda data: flip(data, -1000))),
    checkpoint("a bit of a weight's name flipped", edit(WEIGHTS, lambda data: flip(data, 75))),
    checkpoint("weights of model=fla", lambda folder: other_weights(folder)),
    checkpoint("weights that are a pickle", write(WEIGHTS, pickle.dumps(RunsCode()))),
    checkpoint(
        "a config that would run code",
        write(CONFIG, "model: !!python/object/apply:os.mkdir [code-of-the-checkpoint-ran]\n"),
    ),
    checkpoint("a config cut short", write(CONFIG, "model: {name: mamba2")),
    checkpoint("a config that is not text", write(CONFIG, b"\xff\xfe\0")),
    checkpoint("a config without a model", write(CONFIG, "seed: 1\n")),
    checkpoint(
        "a config of other sizes",
        replace(CONFIG, b"hidden_size: 32", b"hidden_size: 64"),
    ),
    checkpoint(
        "a config of a size that no machine has the memory for",
        replace(CONFIG, b"hidden_size: 32", b"hidden_size: 2000000"),
    ),
    checkpoint(
        "a config of a size that no number has the digits for",
        replace(CONFIG, b"d_state: ", b"d_state: 9" + b"9" * 30),
    ),
    checkpoint(
        "a config of a billion layers",
        replace(CONFIG, b"num_layers: 2", b"num_layers: 1000000000"),
    ),
    checkpoint(
        "a config that lacks a size",
        replace(CONFIG, b"  hidden_size: 32\n", b""),
    ),
    checkpoint(
        "a config of an unknown size",
        replace(CONFIG, b"hidden_size: 32", b"hidden_size: 32\n  depth: 3"),
    ),
    checkpoint("a config that is a list", write(CONFIG, "- model\n")),
    checkpoint(
        "a config of a word for a size",
        replace(CONFIG, b"hidden_size: 32", b"hidden_size: wide"),
    ),
    checkpoint(
        "a config of no layers",
        replace(CONFIG, b"num_layers: 2", b"num_layers: 0"),
    ),
    checkpoint("a damaged `tokenizer.json`", write(f"{RUN}/tokenizer.json", '{"version": ')),
    checkpoint("a `config.json` of another model", published(model_type="llama"), "published"),
    checkpoint("a `config.json` cut short", write("published/config.json", "{"), "published"),
    checkpoint("published, without weights", published(), "published"),
    checkpoint(
        "published, of a size that no machine has the memory for",
        several(
            published(hidden_size=2_000_000, num_heads=250_000),
            lambda folder: shutil.copy(folder / WEIGHTS, folder / "published"),
        ),
        "published",
    ),
    checkpoint(
        "published, its weights cut short",
        several(published(), write("published/model.safetensors", b"\x10")),
        "published",
    ),
    checkpoint(
        "published, its weights a pickle that would run code",
        several(published(), write("published/pytorch_model.bin", pickle.dumps(RunsCode(), 2))),
        "published",
    ),
    checkpoint(
        "published, its weights no pickle",
        several(published(), write("published/pytorch_model.bin", "bytes")),
        "published",
    ),
    checkpoint(
        "weights alone",
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "model.safetensors"),
        "model.safetensors",
    ),
    resume("a run that is not there", lambda folder: shutil.rmtree(folder / "runs/stopped")),
    resume("no `config.yaml`", lambda folder: (folder / "runs/stopped/config.yaml").unlink()),
    resume("a run that is complete", write("runs/stopped/loss.png", b"")),
    resume("cut in half", edit(LAST, lambda data: data[: len(data) // 2])),
    resume("a bit flipped", edit(LAST, lambda data: flip(data, len(data) // 2))),
    resume("a pickle that would run code", write(LAST, pickle.dumps(RunsCode(), 2))),
    resume("without the state of the optimiser", lambda folder: without_optimizer(folder / LAST)),
    resume(
        "a config of other sizes",
        replace(STOPPED, b"hidden_size: 32", b"hidden_size: 64"),
    ),
    resume(
        "a config of a size that no machine has the memory for",
        replace(STOPPED, b"hidden_size: 32", b"hidden_size: 2000000"),
    ),
    resume(
        "a config that lacks a value",
        replace(STOPPED, b"  weight_decay: 0.1\n", b""),
    ),
    resume("metrics that are no table", write("runs/stopped/metrics.csv", "\0\n1\n")),
    resume("of another learning rate", nothing, "optim.learning_rate=1"),
]


def other_weights(folder: Path) -> None:
    write_checkpoint(folder / "other", "fla")
    os.replace(folder / "other/model.safetensors", folder / WEIGHTS)
    shutil.rmtree(folder / "other")


def without_optimizer(file: Path) -> None:
    import torch

    state = torch.load(file, weights_only=True)
    del state["optimizer_states"]
    torch.save(state, file)


def train_values() -> list[Bad]:
    """Those of the tests of train.py and of its configs; what needs no GPU to be wrong."""
    from test_configs import BAD as keys
    from test_train import BAD as values

    lines = dict.fromkeys([*((argument,) for argument, _ in keys), *(tuple(a) for a, _ in values)])
    listed = {case.arguments for case in FILES}
    return [Bad("train", line) for line in lines if line not in listed and line != ("trainer=gpu",)]


@functools.cache
def cases() -> dict[str, list[Bad]]:
    """By the headings of the table."""
    return {
        "Keys and values of train.py": train_values(),
        "Keys and values of infer.py": INFER_VALUES,
        "Files": FILES,
        "Checkpoints and runs": CHECKPOINTS,
    }


# ----------------------------------------------------------------------------------- the answers


@functools.cache
def good_runs() -> tempfile.TemporaryDirectory:
    """A folder with a checkpoint in `runs/small`, and a run that was stopped in `runs/stopped`."""
    import train
    from configs.command import compose

    made = tempfile.TemporaryDirectory()
    runs = Path(made.name, "runs")
    write_checkpoint(runs / "small", "mamba2")
    config = compose(
        "train",
        [
            "model=mamba2",
            *SIX_STEPS,
            f"runs_dir={runs}",
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(config).run.rename(runs / "stopped")
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
    script = importlib.import_module(case.script)
    here, arguments, stdin = Path.cwd(), sys.argv, sys.stdin
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        shutil.copytree(good_runs().name, folder, dirs_exist_ok=True)
        if case.change is not None:
            case.change(folder)
        before = files(folder)
        os.chdir(folder)
        sys.argv = [f"{case.script}.py", *case.arguments]
        sys.stdin = io.TextIOWrapper(io.BytesIO(case.stdin))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                script.main()
        except SystemExit as left:
            code = left.code
        finally:
            os.chdir(here)
            sys.argv, sys.stdin = arguments, stdin
        after = files(folder)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    texts = []
    for stream in (out, err):
        stream.seek(0)
        text = stream.read().replace(str(folder), "<folder>").replace(str(ROOT), "<repository>")
        # how much text the running Python's standard library holds
        text = re.sub(r"\d+ in \d+ of \d+ documents", "<n> in <n> of <n> documents", text)
        texts.append(re.sub(r"this host, [\d.]+ GiB", "this host, <n> GiB", text))
    return Answer(code, *texts, tuple(sorted(changed)))


# ------------------------------------------------------------------------------------- the table

HEAD = """# Bad input

What `train.py` and `infer.py` answer when something is wrong: one line on standard error that says
what was given, what must hold and what to do; exit code 2; nothing is left behind. Nothing of a
checkpoint is ever run as code. This page is written by `python tests/bad_input.py` from what the
commands say, and `tests/test_bad_input.py` fails where it is out of date.
"""


def table() -> str:
    """The text of docs/bad-input.md."""
    text = HEAD
    for heading, group in cases().items():
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
    print(f"{sum(map(len, cases().values()))} cases in {TABLE.relative_to(ROOT)}")

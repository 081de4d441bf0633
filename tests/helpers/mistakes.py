"""What users get wrong: the cases of test_bad_input.py and of docs/bad-input.md."""

import json
import os
import pickle
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from small_runs import write_checkpoint


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


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}


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


def train(*arguments: str) -> Bad:
    return Bad("train", arguments)


def infer(*arguments: str, stdin: bytes = b"") -> Bad:
    return Bad("infer", arguments, stdin=stdin)


def checkpoint(what: str, change: Callable[[Path], object], name: str = RUN) -> Bad:
    return Bad("infer", (f"checkpoint={name}",), what, change)


def resume(what: str, change: Callable[[Path], object], *more: str) -> Bad:
    return Bad("train", ("resume=runs/stopped", *more), what, change)


def nothing(folder: Path) -> None:
    pass


TRAIN_VALUES = [
    train("modle=fla"),
    train("model=mamba"),
    train("model=[fla,mamba2]"),
    train("model={}"),
    train("optim={steps: 5}"),
    train("model=fla", "size=mamba2_1m"),
    train("-m", "model=fla,mamba2", "size=fla_1m"),
    train("-m", "seed=range(0,0)"),
    train("-m", "seed=glob(*)"),
    train("--cfg", "job", "modle=fla"),
    train("norm=infrence"),
    train("norm=inference"),
    train("model.num_head=2"),
    train("model.num_heads=0"),
    train("model.head_dim=1.5"),
    train("model.name=rwkv"),
    train("model.norm_eps=0"),
    train("model.norm_eps=nan"),
    train("optim.learning_rate=inf"),
    train("optim.steps=0"),
    train("optim.steps=many"),
    train("optim.steps=null"),
    train("optim.betas=[0.9]"),
    train("optim.betas=[0.9,1.0]"),
    train("optim.min_learning_rate=1"),
    train("data.source=web"),
    train("data.name=a/b"),
    train("data.streaming=true"),
    train("data.split=test"),
    train("data.column=body"),
    train("data.path="),
    train("~data.path"),
    train("optim.warmup_steps=9999"),
    train("trainer.accumulate=0"),
    train("data.sequence_length=0"),
    train("data.hold_out=1"),
    train("data=stdlb"),
    train("trainer=tpu"),
    train("trainer.precision=fp8"),
    train("seed=-1"),
    train("seed=a(b"),
    train("seed"),
    train("mamba2"),
    train("ten_minutes"),
    train("trainer"),
    train("--model=fla"),
    train("--foo"),
    train("--cfg"),
    train("+colour=red"),
    train("optim.lr=0.1"),
    train("tokenizer=null"),
    train("runs_dir="),
    train("resume="),
    train("experiment=huge"),
    train("model=mamba2", "model.norm_groups=7"),
    train("model=mamba2", "model.head_dim=48"),
    train("model.num_v_heads=3"),
    train("data=text"),
    train("data=hub"),
    train("-m", "data=stdlib,text", "data.path=null"),
    train("data=text", "data.path="),
    train("data=text", "data.split=test"),
    train("model.hidden_size=1000000000"),
    train("model.conv_size=10000000"),
    train("model=mamba2", "model.num_layers=1000000000"),
    train("model.vocab_size=1" + "0" * 30),
    train("data.sequence_length=100000000"),
    train("trainer=cpu", "trainer.precision=16-mixed"),
]

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
    infer("bench_runs=3"),
    infer("bench=true", "stop=x"),
    infer("compare=true", "temperature=2"),
    infer("prompt"),
    infer("hello"),
    infer("checkpoint="),
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
    Bad(
        "train", ("data=text", "data.path=a.gz"), "a file that is no text", write("a.gz", b"\x1f\0")
    ),
    Bad(
        "train",
        ("data=text", "data.path=a.jsonl"),
        "a line cut short",
        write("a.jsonl", '{"text":'),
    ),
    Bad("train", ("data=text", "data.path=a.jsonl"), "an empty file", write("a.jsonl", "")),
    Bad("train", ("data=text", "data.path=a.txt"), "an empty file", write("a.txt", "")),
    Bad(
        "train",
        ("data=text", "data.path=a.jsonl"),
        "rows without text",
        write("a.jsonl", '{"text": ""}\n{"text": null}\n'),
    ),
    Bad(
        "train",
        ("data=text", "data.path=a.jsonl"),
        "rows without the column",
        write("a.jsonl", '{"body": "b"}\n'),
    ),
    Bad(
        "train",
        ("data=text", "data.path=a.jsonl"),
        "a row with an object for its text",
        write("a.jsonl", '{"text": {"a": 1}}\n'),
    ),
    Bad(
        "train",
        ("tokenizer=t.json",),
        "a tokenizer of some words only",
        write("t.json", json.dumps({"version": "1.0", "model": WORDS})),
    ),
    Bad(
        "train",
        ("runs_dir=file", "-m", "seed=1,2"),
        "a file in the way of a sweep",
        write("file", ""),
    ),
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
    Bad("train", ("resume=runs/small",), "weights alone", nothing),
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


# By the headings of the table.
CASES = {
    "Keys and values of train.py": TRAIN_VALUES,
    "Keys and values of infer.py": INFER_VALUES,
    "Files": FILES,
    "Checkpoints and runs": CHECKPOINTS,
}

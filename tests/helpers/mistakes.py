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

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """A command line in a folder with two good runs, one of which was stopped.

    Attributes:
        typed: "train" or "infer", and the arguments as in a shell.
        what: What `change` did, in words.
        change: Spoils something; gets the folder.
        stdin: What standard input holds.
    """

    typed: str
    what: str = ""
    change: Change | None = None
    stdin: bytes = b""

    @property
    def script(self) -> str:
        return self.typed.partition(" ")[0]

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.typed)[1:]

    @property
    def command(self) -> str:
        return f"python {self.script}.py {shlex.join(self.arguments)}"


RUN, WEIGHTS, CONFIG = "runs/small", "runs/small/model.safetensors", "runs/small/config.yaml"
LAST, STOPPED = "runs/stopped/last.ckpt", "runs/stopped/config.yaml"
SIZES = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1}
PUBLISHED = {"model_type": "mamba2", **SIZES, "num_hidden_layers": 1, "vocab_size": 64}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}


class RunsCode:
    """A pickle of it makes a file where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("code-of-the-checkpoint-ran",)


def write(name: str, data: bytes | str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def edit(name: str, how: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(how((folder / name).read_bytes()))


def replace(name: str, old: bytes, new: bytes) -> Change:
    def other(data: bytes) -> bytes:
        assert old in data, f"{name} must hold {old!r}: there is nothing to spoil"
        return data.replace(old, new)

    return edit(name, other)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at:][1:]


def published(name: str = "", data: bytes | str = "", **keys: object) -> Change:
    """A folder as transformers writes it, with this file for its weights."""

    def change(folder: Path) -> None:
        write("published/config.json", json.dumps({**PUBLISHED, **keys}))(folder)
        if name:
            write(f"published/{name}", data)(folder)

    return change


def other_weights(folder: Path) -> None:
    write_checkpoint(folder / "other", "fla")
    os.replace(folder / "other/model.safetensors", folder / WEIGHTS)
    shutil.rmtree(folder / "other")


def code_in_a_checkpoint(folder: Path) -> None:
    """Laid out as torch.save does it: what looks at the pickle is torch itself."""
    import torch

    torch.save({"state_dict": RunsCode()}, folder / LAST)


def without_optimizer(folder: Path) -> None:
    import torch

    state = torch.load(folder / LAST, weights_only=True)
    del state["optimizer_states"]
    torch.save(state, folder / LAST)


TRAIN_VALUES = r"""
modle=fla
model=mamba
'model=[fla,mamba2]'
'optim={steps: 5}'
model=fla size=mamba2_1m
-m model=fla,mamba2 size=fla_1m
-m 'seed=range(0,0)'
--cfg job modle=fla
norm=inference
model.num_head=2
model.num_heads=0
model.head_dim=1.5
model.norm_eps=nan
optim.lr=0.1
optim.steps=many
optim.steps=null
optim.learning_rate=inf
'optim.betas=[0.9]'
optim.min_learning_rate=1
optim.warmup_steps=9999
optim.schedule=linear
optim.decay_steps=5
optim.schedule=constant optim.min_learning_rate=1e-4
optim.schedule=wsd optim.decay_steps=9999
trainer.precision=fp8
trainer.norm_linear_precision=int8
trainer.norm_linear_precision=fp8_emulated model.hidden_size=64
trainer.norm_linear_precision=fp8_emulated exact=true
trainer.compile=perhaps
exact=true trainer.compile=true
exact=true trainer=tp
trainer=tp
trainer=tp trainer.strategy=fsdp
trainer.loggers=tensorbord
seed=1,2
'seed=a(b'
seed
mamba2
--model=fla
--foo
+colour=red
'~data.path'
hydra.run.dir=here
-m hydra.sweep.dir=there seed=1,2
hydra/launcher=joblib
hydra.sweeper.params.seed=1,2
hydra/job_logging=disabled
hydra.job.chdir=true
hydra.verbose=true
+hydra=x
--config-name=mine
--info
runs_dir=
tokenizer=null
experiment=huge
model=mamba2 model.norm_groups=7
model=mamba2 model.head_dim=48
model.num_v_heads=3
data=text
data=hub
data.name=a/b
data.streaming=true
'data.include=*.rst'
data=text data.path=a data.options=3
data=text data.path=
model.hidden_size=1000000000
model.conv_size=10000000
model=mamba2 model.num_layers=1000000000
data.sequence_length=100000000
trainer=cpu trainer.precision=16-mixed
"""

INFER_VALUES = r"""
modle=fla
model=rwkv
data=stdlib
norm=fast
temperature=0.5,1
prompt=
prompt=a prompt_file=b
max_new_tokens=-1
max_new_tokens=0 temperature=1
max_new_tokens=0 bench=true
max_new_tokens=0 prompt=a
temperature=nan
top_p=1.5
stop=
'stop=["a", b]'
device=tpu
compare=true bench=true
bench=true prompts_file=-
bench_runs=3
compare=true temperature=2
hello
checkpoint=
"""

FILES = [
    Bad("infer prompt_file=missing.txt", "a file that is not there"),
    Bad("infer prompt_file=runs", "a folder"),
    Bad("infer prompt_file=-", "nothing on standard input"),
    Bad("infer prompts_file=-", "blank lines alone", stdin=b"\n  \r\n"),
    Bad(
        "infer prompts_file=p.jsonl",
        "a second line that is not JSON",
        write("p.jsonl", '{"prompt": "a"}\nimport\n'),
    ),
    Bad(
        "infer prompts_file=p.jsonl",
        "a line without a prompt",
        write("p.jsonl", '{"text": "import"}\n'),
    ),
    Bad("train data.path=missing", "a folder that is not there"),
    Bad("train data=text 'data.path=*.rst'", "a glob that nothing matches"),
    Bad("train data=text data.path=a.bin", "a file that is no text", write("a.bin", b"\x1f\0")),
    Bad("train data=text data.path=a.txt.gz", "a damaged file", write("a.txt.gz", b"\x1f\x8b")),
    Bad(
        "train data=text 'data.path=[a.txt,b]'",
        "of two paths one that is not there",
        write("a.txt", "a"),
    ),
    Bad(
        "train data=text data.path=. data.exclude=[runs,*.txt]",
        "a folder without text",
        write("a.txt", "a"),
    ),
    Bad("train data=text data.path=a.txt", "an empty file", write("a.txt", "")),
    *(
        Bad("train data=text data.path=a.jsonl", what, write("a.jsonl", text))
        for what, text in {
            "a line cut short": '{"text": "a"}\n\n{"text":',
            "rows without text": '{"text": ""}\n{"text": null}\n',
            "rows without the column": '{"body": "b"}\n',
            "a row with an object for its text": '{"text": {"a": 1}}\n',
        }.items()
    ),
    Bad(
        "train data=text data.path=a.csv 'data.options={separator: 1}'",
        "an option that there is not",
        write("a.csv", "text\na\n"),
    ),
    Bad(
        "train tokenizer=t.json",
        "a tokenizer of some words only",
        write("t.json", json.dumps({"version": "1.0", "model": WORDS})),
    ),
    Bad("train runs_dir=file/runs", "a file in the way", write("file", "")),
]

CHECKPOINTS = [
    Bad("infer checkpoint=missing", "a folder that is not there"),
    Bad("infer checkpoint=broken.ckpt", "a file of five bytes", write("broken.ckpt", b"bytes")),
    Bad(f"infer model=fla checkpoint={RUN}", "a run of model=mamba2"),
    Bad(
        "infer checkpoint=model.safetensors",
        "weights alone",
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "model.safetensors"),
    ),
    *(
        Bad(f"infer checkpoint={RUN}", what, change)
        for what, change in {
            "no `config.yaml`": remove(CONFIG),
            "no `model.safetensors`": remove(WEIGHTS),
            "weights cut in half": edit(WEIGHTS, half),
            "a bit of a weight flipped": edit(WEIGHTS, lambda data: flip(data, -1000)),
            "a bit of a weight's name flipped": edit(WEIGHTS, lambda data: flip(data, 75)),
            "weights of model=fla": other_weights,
            "weights that are a pickle": write(WEIGHTS, pickle.dumps(RunsCode())),
            "a config that would run code": write(
                CONFIG, "model: !!python/object/apply:os.mkdir [code-of-the-checkpoint-ran]\n"
            ),
            "a config cut short": write(CONFIG, "model: {name: mamba2"),
            "a config without a model": write(CONFIG, "seed: 1\n"),
            "a config of another model": write(CONFIG, "model: {name: rwkv}\n"),
            "a config of other sizes": replace(CONFIG, b"hidden_size: 32", b"hidden_size: 64"),
            "a config of a billion layers": replace(
                CONFIG, b"num_layers: 2", b"num_layers: 1000000000"
            ),
            "a config that lacks a size": replace(CONFIG, b"  hidden_size: 32\n", b""),
            "a config of an unknown size": replace(
                CONFIG, b"hidden_size: 32", b"hidden_size: 32\n  depth: 3"
            ),
            "a config of a word for a size": replace(
                CONFIG, b"hidden_size: 32", b"hidden_size: wide"
            ),
            "a config of no layers": replace(CONFIG, b"num_layers: 2", b"num_layers: 0"),
            "a damaged `tokenizer.json`": write(f"{RUN}/tokenizer.json", '{"version": '),
        }.items()
    ),
    *(
        Bad("infer checkpoint=published", what, change)
        for what, change in {
            "a `config.json` of another model": published(model_type="llama"),
            "a `config.json` cut short": write("published/config.json", "{"),
            "published, without weights": published(),
            "published, its weights cut short": published("model.safetensors", b"\x10"),
            "published, its weights a pickle that would run code": published(
                "pytorch_model.bin", pickle.dumps(RunsCode(), 2)
            ),
        }.items()
    ),
    Bad("train resume=runs/missing", "a run that is not there"),
    Bad("train resume=runs/small", "weights alone"),
    Bad("train resume=runs/stopped optim.learning_rate=1", "of another learning rate"),
    Bad("train resume=runs/stopped optim.steps=99", "of other steps, with a cosine"),
    *(
        Bad("train resume=runs/stopped", what, change)
        for what, change in {
            "a run that is complete": write("runs/stopped/loss.png", b""),
            "cut in half": edit(LAST, half),
            "a bit flipped": edit(LAST, lambda data: flip(data, len(data) // 2)),
            "a pickle that would run code": code_in_a_checkpoint,
            "without the state of the optimiser": without_optimizer,
            "a config of other sizes": replace(STOPPED, b"hidden_size: 32", b"hidden_size: 64"),
            "a config that lacks a value": replace(STOPPED, b"  weight_decay: 0.1\n", b""),
            "metrics that are no table": write("runs/stopped/metrics.csv", "\0\n1\n"),
        }.items()
    ),
]

# By the headings of the table.
CASES = {
    "Keys and values of train.py": [Bad(f"train {t}") for t in TRAIN_VALUES.split("\n") if t],
    "Keys and values of infer.py": [Bad(f"infer {t}") for t in INFER_VALUES.split("\n") if t],
    "Files": FILES,
    "Checkpoints and runs": CHECKPOINTS,
}

"""Small sets of texts, laid out like those that people train on, and configs that read them."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.config.command import compose
from small_runs import SIX_STEPS

TEXTS = [f'document {i}: caf\u00e9\r\n, with a comma "and quotes" {"x" * i}' for i in range(40)]
CODE = [
    "import os\n",
    "def f(x):\n    return x  # \u00e9\u20ac\U0001f600\n",
    "na\u00efve caf\u00e9",
]
TINY = [*SIX_STEPS, "optim.steps=3", "data.sequence_length=16"]


def byte_level(texts: Sequence[str] = CODE) -> Tokenizer:
    """Byte-level BPE, as GPT-2 and GPT-NeoX have: characters span tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_table(file: Path, texts: list[str], column: str = "text") -> None:
    table = datasets.Dataset.from_dict({"n": list(range(len(texts))), column: texts})
    if file.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in table)
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        getattr(table, {".parquet": "to_parquet", ".csv": "to_csv"}[file.suffix])(str(file))


def write_hub(folder: Path) -> Path:
    """A set laid out like one of the hub, in four files."""
    folder.mkdir(parents=True)
    for part in range(4):
        write_table(folder / f"train-{part:05d}-of-00004.jsonl", TEXTS[10 * part :][:10])
    return folder


def settings(*overrides: str, **values):
    """The data section; paths are set as they stand."""
    named = [f"data.{name}=x" for name in values]
    config = compose("train", ["data.sequence_length=16", "data.hold_out=4", *named, *overrides])
    for name, value in values.items():
        setattr(config.data, name, str(value))
    return config


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 4 == 0

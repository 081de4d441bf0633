"""Small sets of texts, laid out like those that people train on, and configs that read them."""

import json
import zlib
from pathlib import Path

import datasets
from small_runs import SIX_STEPS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.command import compose

TEXTS = [f'document {i}: caf\u00e9\r\n, with a comma "and quotes" {"x" * i}' for i in range(40)]
TINY = [*SIX_STEPS, "optim.steps=3", "data.sequence_length=16"]


def write_tokenizer(file: Path) -> Path:
    """A tokenizer.json: byte-level BPE with an end of a document, as the published ones have."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(TEXTS, trainer)
    library.save(str(file))
    return file


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
    config = compose("train", ["data.sequence_length=16", "data.hold_out=4", *overrides])
    for name, value in values.items():
        setattr(config.data, name, str(value))
    return config


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 4 == 0

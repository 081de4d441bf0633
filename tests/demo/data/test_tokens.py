"""A long document's tokens are those that the tokenizer gives for the whole, at a bounded cost."""

import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from demo.checkpoints.tokenizer import TextTokenizer
from demo.data import sources, tokens
from demo.data.corpus import load_corpus
from demo.data.tokens import _generate_tokens
from text_sets import byte_level, settings

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")

ROOT = Path(__file__).resolve().parents[3]
PIECE = 2**14  # in these tests
WORDS = [
    "import",
    "os",
    "def",
    "return",
    "na\u00efve",
    "caf\u00e9",
    "\u65e5\u672c\u8a9e",
    "\U0001f600",
    "x_1",
    "3.14159",
    "it's",
    "<|endoftext|>",
]
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", "\t", "\n    ", " \r\n", "\u00a0"]


def prose(size: int) -> str:
    draw = random.Random(0)
    text = ""
    parts = []
    while size > 0:
        parts.append(draw.choice(WORDS) + draw.choice(SPACES))
        size -= len(parts[-1].encode())
    return text.join(parts)


PROSE = prose(3 * PIECE)


def bpe(size: int = 400, **options) -> tuple[Tokenizer, trainers.BpeTrainer]:
    special = ["<|endoftext|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    return Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, **options)), trainer


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([PROSE[:20000]], trainer)
    return tokenizer


def gpt4() -> Tokenizer:
    """Digits in threes from the left, contractions, and spaces that look ahead."""
    tokenizer = byte_level([PROSE[:20000]])
    pattern = (
        r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def prefix_space() -> Tokenizer:
    tokenizer = byte_level([PROSE[:20000]])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def llama2() -> Tokenizer:
    """One word of the whole text, with a mark before it and a token at each end."""
    tokenizer, trainer = bpe(fuse_unk=True)
    mark = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(mark)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<0x01> $A <0x02>",
        special_tokens=[("<0x01>", 3), ("<0x02>", 4)],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # to learn words
    trained(tokenizer, trainer)
    tokenizer.pre_tokenizer = None
    return tokenizer


def whitespace() -> Tokenizer:
    """Of the quick tour of the tokenizers library: newlines and spaces are lost."""
    tokenizer, trainer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(tokenizer, trainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return trained(tokenizer, trainer)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    trained(tokenizer, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def wordlevel() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=9, special_tokens=["[UNK]"], show_progress=False)
    return trained(tokenizer, trainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": lambda: byte_level([PROSE[:20000]]),
    **{kind.__name__: kind for kind in (gpt4, prefix_space, llama2, whitespace)},
    **{kind.__name__: kind for kind in (unigram, wordpiece, wordlevel)},
}
KINDS = {name: cache(kind) for name, kind in KINDS.items()}
HARD = {
    "prose": PROSE,
    "one word": "import" + "ab" * PIECE + " os",
    "digits": "pi 3." + "".join(random.Random(0).choices("0123456789", k=2 * PIECE + 5)) + " os",
    "spaces": "import" + " " * (2 * PIECE + 3) + "os",
    "unknown": "import " + "\u2603" * PIECE + " os",  # a token may hold all of them
    "not utf8": (PROSE.encode()[: 2 * PIECE] + b"\xff\xe2\x82" * 999).decode(
        "utf-8", "surrogateescape"
    ),
}


def in_pieces(tokenizer: TextTokenizer, text: bytes) -> list[int]:
    import datasets

    table = datasets.Dataset.from_dict({"text": [text]})
    rows = list(_generate_tokens(table, tokenizer, None))
    assert {row["document"] for row in rows} == {0}
    assert len(text) < 2 * PIECE or len(rows) > 2
    return [int(token) for row in rows for token in row["tokens"]]


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_has_the_tokens_of_the_whole(kind, text, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", PIECE)
    tokenizer = TextTokenizer(KINDS[kind](), eos=0)
    document = HARD[text].encode("utf-8", "surrogateescape")
    assert in_pieces(tokenizer, document) == [*tokenizer.encode(document), 0]


@pytest.mark.parametrize("files", [1, 3])
def test_long_files_have_their_tokens_and_are_held_out_as_short_ones_are(
    files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sources, "PIECE", PIECE)
    monkeypatch.setattr(tokens, "LINE_EVERY", 0.0)
    texts = {f"{i}.txt": PROSE[1000 * i :].encode() for i in range(files)}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    tokenizer = TextTokenizer(KINDS["gpt4"](), eos=0)
    data = settings("data=text", "data.hold_out=3", path=tmp_path).data
    corpus = load_corpus(data, tokenizer)
    held_out = [crc32(name.encode()) % 3 == 0 for name in texts]
    if files == 1:
        (text,) = texts.values()
        at = len(text) - len(text) // 3
        texts, held_out = {0: text[:at], 1: text[at:]}, [False, True]
    assert set(held_out) == {True, False}
    for part, chosen in (corpus.train, False), (corpus.val, True):
        own = [text for text, held in zip(texts.values(), held_out, strict=True) if held == chosen]
        expected = [[*tokenizer.encode(text), 0] for text in own]
        assert part.tokens.tolist() == [*chain.from_iterable(expected)]
        assert np.diff(part.starts).tolist() == list(map(len, expected))
        assert part.size == sum(map(len, own))
    assert "tokenized 100% of" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [1, PIECE - 3, PIECE, 2 * PIECE - 5, 2 * PIECE + 7])
@pytest.mark.parametrize("kind", ["gpt4", "llama2"])
def test_a_document_may_begin_or_end_just_beside_a_piece(kind, cut, monkeypatch):
    import datasets

    monkeypatch.setattr(sources, "PIECE", PIECE)
    tokenizer, text = TextTokenizer(KINDS[kind](), eos=0), PROSE.encode()
    rows = _generate_tokens(datasets.Dataset.from_dict({"text": [text]}), tokenizer, cut)
    found = [[], []]
    for row in rows:
        found[row["document"]] += row["tokens"].tolist()
    assert found == [[*tokenizer.encode(part), 0] for part in (text[:cut], text[cut:])]


LOAD = """
import resource, sys
import datasets
from demo.checkpoints.tokenizer import load_tokenizer
from demo.config.command import compose
from demo.data.corpus import load_corpus
path, tokenizer, datasets.config.HF_DATASETS_CACHE = sys.argv[1:]
data = compose("train", ["data=text", f"data.path={path}"]).data
corpus = load_corpus(data, load_tokenizer(tokenizer))
used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("used", used - corpus.train.tokens.nbytes - corpus.val.tokens.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
def test_a_gigabyte_needs_less_than_two_beyond_its_tokens(kind, tmp_path):
    """Memory grows with the file at most as the file does: from 3 to 30 MB, and so to 1 GB."""
    byte_level([PROSE[:20000]]).save(str(tmp_path / "tokenizer.json"))
    source = kind if kind == "bytes" else tmp_path / "tokenizer.json"
    used = []
    for size in (3 * 10**6, 30 * 10**6):
        file = tmp_path / f"{size}.txt"
        file.write_bytes((PROSE.encode() * (1 + size // len(PROSE)))[:size])
        command = [sys.executable, "-c", LOAD, str(file), str(source), str(tmp_path / "cache")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        used.append(int(done.stdout.split("used ")[1]))
    per_byte = (used[1] - used[0]) / (27 * 10**6)
    assert used[0] + 10**9 * per_byte < 2 * 2**30

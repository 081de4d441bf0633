"""What a run says that it reads, and what it warns of."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo.checkpoints.tokenizer import TextTokenizer
from demo.data.report import _lost_text
from small_runs import FEW_STEPS, SMALL, run
from text_sets import TEXTS, byte_level, write_hub, write_table

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")
TINY = [*SMALL, *FEW_STEPS, "optim.steps=3", "data.sequence_length=16", "data.hold_out=4"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train in a folder of one's own: the four lines, the warnings, and data.json."""
    monkeypatch.chdir(tmp_path)

    def train(*overrides: str) -> tuple[list[str], list[str], dict]:
        code, out, err = run("train", *TINY, *overrides)
        assert code == 0, err
        (file,) = tmp_path.glob("runs/*/data.json")
        warnings = [line for line in err.splitlines() if "warning" in line]
        return out.splitlines()[:4], warnings, json.loads(file.read_text())

    return train


def test_what_was_read_is_four_lines_and_a_file(trained, tmp_path):
    (tmp_path / "text").mkdir()
    write_table(tmp_path / "text/a.jsonl", TEXTS)
    (tmp_path / "text/b.rst").touch()
    lines, warnings, values = trained("data=text", "data.path=text")
    size = sum(len(text.encode()) for text in TEXTS)
    held_out = values["held_out"]
    share = f"{held_out['bytes'] / size:.1%} of all bytes"
    assert lines == [
        "files      1 .jsonl; skipped: 1 .rst",
        f"documents  40, {size:,} bytes, {size:,} tokens",
        f"held out   {held_out['documents']} documents, {held_out['bytes']:,} bytes, {share}",
        f"training   3 steps, 96 tokens, {96 / (size - held_out['bytes']):.3g} epochs",
    ]
    assert warnings == []
    assert values["files"] == {".jsonl": 1}
    assert values["skipped"] == {".rst": 1}
    assert 3 < held_out["documents"] < 20
    assert values["epochs"] == pytest.approx(96 / (size - held_out["bytes"]))


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_of_a_stream_is_said_what_is_known(streaming, trained, tmp_path):
    write_hub(tmp_path / "owner" / "texts")
    lines, warnings, values = trained(
        "data=hub", "data.name=owner/texts", f"data.streaming={streaming}"
    )
    assert (lines[0], warnings) == ("files      owner/texts", [])
    assert values["documents"] == (None if streaming == "true" else 40)
    assert lines[1].startswith("documents  " + ("as they come" if streaming == "true" else "40, "))
    assert lines[3].startswith("training   3 steps, 96 tokens")


def whitespace() -> Tokenizer:
    """That of the quick tour of the tokenizers library."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def test_what_was_not_meant_is_a_line_and_the_table_says_what_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    write_table(tmp_path / "text/a.jsonl", TEXTS)
    (tmp_path / "text/a.jsonl").rename(tmp_path / "text/a.txt")
    for name in "bcd":
        (tmp_path / "text" / f"{name}.rst").touch()
    whitespace().save("tokenizer.json")
    code, out, err = run("train", *TINY, "data=text", "data.path=text", "tokenizer=tokenizer.json")
    assert code == 0
    start = "train.py: warning: "
    lost, rows, skipped = err.splitlines()
    assert lost.startswith(f"{start}bits per byte of this run cannot be compared with others")
    assert rows.startswith(f"{start}'text/a.txt' is read as text but looks like JSON lines")
    assert skipped.startswith(f"{start}most files are skipped, 3 of 4 (3 .rst); take them with")
    assert "loses text: not to be compared with other bits per byte" in out


def lower() -> Tokenizer:
    tokenizer = byte_level(TEXTS)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def metaspace() -> Tokenizer:
    """A space at the beginning does not come back, which changes no other byte."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "text", "lost"),
    [
        (byte_level, b"def f(x):\n    return X\n", None),
        (byte_level, b"a caf\xe9 in latin-1", ("a caf? in latin-", "a caf\ufffd in latin-")),
        (metaspace, b"  document 1 \n", None),
        (lower, b"some text with a Capital letter", (" with a Capital ", " with a capital ")),
        (whitespace, b"two\nlines", ("two\nlines", None)),
    ],
)
def test_text_that_does_not_come_back_is_noticed(kind, text, lost):
    found = _lost_text(TextTokenizer(kind()), text)
    if lost is None:
        assert found is None
    else:
        assert found[0] == lost[0]
        assert lost[1] in (None, found[1])

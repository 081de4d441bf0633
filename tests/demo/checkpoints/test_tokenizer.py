"""Tokenizers: what is written is read back, and a stream of tokens is the text of all of them."""

import json

import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo.checkpoints.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer, tokenizer_of
from text_sets import byte_level

TEXTS = {
    "ascii": b"def g(y):\n\treturn  y\n",
    "accents": "na\u00efve caf\u00e9 \u20ac".encode(),
    "emoji": "a\U0001f600\U0001f600b \U0001f468\u200d\U0001f469\u200d\U0001f467".encode(),
    "cjk": "\u65e5\u672c\u8a9e\u306e\u6587".encode(),
    "not_utf8": b"a\xff\xfeb\xc3",
    "empty": b"",
    "spaces": b"  a   b ",
}


def sentencepiece():
    """As in LLaMA and Mistral: spaces are marked, the first is dropped, other bytes fall back,
    and a text begins with a special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["import os\n", "def f(x):\n    return x\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece}


def tokenizer(kind):
    return ByteTokenizer() if kind == "bytes" else TextTokenizer(KINDS[kind]())


def test_bytes_are_the_tokens():
    assert ByteTokenizer().encode(b"\x00\xffa") == [0, 255, 97]
    assert (ByteTokenizer.vocab_size, ByteTokenizer.eos) == (256, None)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_text_comes_back_whole_and_in_pieces(kind, text):
    """Text that is UTF-8 survives; the rest comes back with U+FFFD in its place."""
    subject = tokenizer(kind)
    tokens = subject.encode(TEXTS[text])
    assert all(0 <= token < subject.vocab_size for token in tokens)
    whole = TEXTS[text].decode("utf-8", "replace")
    if kind != "sentencepiece":  # which drops spaces
        assert subject.decode(tokens) == whole
    stream = subject.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == subject.decode(tokens)
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)  # no half character comes out


@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
def test_stream_gives_text_as_soon_as_it_is_certain(kind):
    subject = tokenizer(kind)
    stream = subject.stream()
    text = ""
    for token in subject.encode(b"def g(y): return"):
        text += stream.push(token)
        assert text  # nothing in ASCII waits
    assert (text, stream.finish()) == ("def g(y): return", "")


def test_stream_ends_inside_a_character():
    for subject in (tokenizer("bytes"), tokenizer("byte_level")):
        stream = subject.stream()
        tokens = subject.encode("\u65e5".encode())[:2]
        assert [stream.push(token) for token in tokens] == ["", ""]
        assert set(stream.finish()) == {"\ufffd"}


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_saved_and_read_back(kind, tmp_path):
    subject = tokenizer(kind)
    subject.save(tmp_path)
    again = tokenizer_of(tmp_path)
    tokens = subject.encode(TEXTS["accents"])
    assert (type(again), again.vocab_size) == (type(subject), subject.vocab_size)
    assert again.encode(TEXTS["accents"]) == tokens
    assert again.decode(tokens) == subject.decode(tokens)
    assert not list(tmp_path.glob(".*"))
    for source in [] if kind == "bytes" else [tmp_path, tmp_path / "tokenizer.json"]:
        assert load_tokenizer(str(source)).encode(TEXTS["accents"]) == tokens


EOS = {
    "usual_name": (None, "<|endoftext|>"),
    "named": ({"eos_token": "x"}, "x"),
    "named_with_options": ({"eos_token": {"content": "x", "lstrip": False}}, "x"),
    "not_a_token": ({"eos_token": "nonsense"}, None),
    "damaged_options": ("[", "<|endoftext|>"),
}


@pytest.mark.parametrize("case", EOS)
def test_eos(case, tmp_path):
    """What the folder says ends a document, else the usual names; it survives another save."""
    options, expected = EOS[case]
    raw = byte_level()
    raw.save(str(tmp_path / "tokenizer.json"))
    if options is not None:
        content = options if isinstance(options, str) else json.dumps(options)
        (tmp_path / "tokenizer_config.json").write_text(content)
    subject = tokenizer_of(tmp_path)
    assert subject.eos == (None if expected is None else raw.token_to_id(expected))
    if subject.eos is not None:
        (tmp_path / "copy").mkdir()
        subject.save(tmp_path / "copy")
        assert tokenizer_of(tmp_path / "copy").eos == subject.eos


def test_saved_truncation_and_padding_do_not_apply(tmp_path):
    raw = byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = b"def f(x): return x, def f(x): return x"
    assert tokenizer_of(tmp_path).decode(tokenizer_of(tmp_path).encode(text)) == text.decode()


def test_transformers_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    subject = TextTokenizer(byte_level(), eos=0)
    subject.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("return x")["input_ids"] == subject.encode(b"return x")
    assert theirs.eos_token_id == subject.eos


BAD = {
    "no_file": ("gone/tokenizer.json/x", "'gone/tokenizer.json/x', where there is no such file"),
    "empty_folder": ("{folder}", "a folder with one or a hub id, got '{folder}'"),
    "binary": ("{folder}/binary.json", r"binary.json' must be a file of the tokenizers library"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source(case, tmp_path):
    source, message = (text.replace("{folder}", str(tmp_path)) for text in BAD[case])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(source)


def test_hub_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'owner/gone' is neither on this machine nor reached"):
        load_tokenizer("owner/gone")


def test_the_library_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer("bytes").vocab_size == 256

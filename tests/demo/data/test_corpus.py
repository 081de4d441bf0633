"""Documents as tokens, of bytes or of a tokenizer."""

import numpy as np
import pytest
import torch

import train
from demo.checkpoints.checkpoint import load
from demo.checkpoints.tokenizer import ByteTokenizer, load_tokenizer
from demo.data.corpus import load_corpus
from demo.data.sources import open_hub
from demo.data.tokens import encode, token_dtype, tokenize
from text_sets import TEXTS, TINY, held_out, settings, write_table

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")


def test_documents_become_tokens_that_end_and_the_text_they_stand_for_is_known(words, tmp_path):
    write_table(tmp_path / "a.jsonl", TEXTS)
    tokenizer = load_tokenizer(str(words))
    corpus = load_corpus(settings("data=text", path=tmp_path / "a.jsonl").data, tokenizer)
    train = [text for text in TEXTS if not held_out(text)]
    assert corpus.train.tokens.dtype == np.uint16
    documents = np.split(corpus.train.tokens, corpus.train.starts[1:-1])
    for text, tokens in zip(train, documents, strict=True):
        assert tokens[-1] == tokenizer.eos
        assert tokenizer.decode(tokens[:-1]) == text
    size = sum(len(text.encode()) for text in train)
    assert corpus.train.bytes_per_token == pytest.approx(size / corpus.train.tokens.size)
    assert 1.2 < corpus.train.bytes_per_token < 20


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_the_end_of_a_single_document_is_held_out(kind, words, tmp_path):
    text = "".join(TEXTS).encode()
    (tmp_path / "a.txt").write_bytes(text)
    tokenizer = load_tokenizer(str(words) if kind == "words" else kind)
    corpus = load_corpus(settings("data=text", path=tmp_path / "a.txt").data, tokenizer)
    assert corpus.val_text == text[-(len(text) // 4) :]
    assert corpus.val.tokens.tolist() == encode(tokenizer, corpus.val_text)
    assert corpus.train.tokens.tolist() == encode(tokenizer, text[: -(len(text) // 4)])


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65537, "uint32")]
)
def test_tokens_are_kept_in_the_smallest_type(size, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = size
    assert token_dtype(tokenizer) == dtype


def test_tokens_come_from_the_cache_unless_text_or_tokenizer_changed(words, hub, monkeypatch):
    tokenizer = load_tokenizer(str(words))
    calls = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text: (calls.append(1), encode(self, text))[1]
    )
    table = open_hub(settings("data=hub", name=hub).data)
    first = tokenize(table, tokenizer)["tokens"][:]
    assert len(calls) == 40
    assert tokenize(table, load_tokenizer(str(words)))["tokens"][:] == first
    assert len(calls) == 40
    tokenizer.eos = None
    assert tokenize(table, tokenizer)["tokens"][:] == [tokens[:-1] for tokens in first]


def test_bits_per_byte_mean_the_same_with_any_tokenizer_and_it_travels(words, hub, tmp_path):
    config = settings("data=hub", *TINY, "data.val_tokens=null", name=hub)
    config.tokenizer, config.runs_dir = str(words), str(tmp_path / "runs")
    summary = train.train(config)
    loaded = load(summary.run)
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size > 256
    held = [text for text in TEXTS if held_out(text)]
    documents = [[*loaded.tokenizer.encode(text.encode()), 0] for text in held]
    tokens = torch.tensor([token for document in documents for token in document])
    tokens = tokens[: 1 + (len(tokens) - 1) // 16 * 16]
    rows = tokens.unfold(0, 17, 16)
    with torch.no_grad():
        probability = loaded.model(rows[:, :-1])[0].double().softmax(-1)
    bits = -probability.gather(-1, rows[:, 1:, None]).log2().mean()
    per_byte = sum(map(len, documents)) / sum(len(text.encode()) for text in held)
    assert summary.after == pytest.approx(bits.item() * per_byte, rel=1e-4)

    stopped = settings("data=hub", *TINY, "data.val_tokens=null", name=hub)
    (summary.run / "loss.png").unlink()
    stopped.resume = str(summary.run)
    assert train.train(stopped).after == summary.after

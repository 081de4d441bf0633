"""Tables, the hub, tokenizers and streams: which text becomes which tokens."""

import json
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import SIX_STEPS, train_until
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

import train
from configs.command import compose
from configs.schema import ConfigError, RunError
from models.checkpoints.checkpoint import build_model, load
from models.checkpoints.tokenizer import ByteTokenizer, load_tokenizer
from models.data.batches import Packed, TrainLoader
from models.data.corpus import load_corpus, token_dtype, tokenize
from models.data.sources import open_hub
from models.data.stream import StreamLoader, validation_corpus
from models.training.lit import LitLanguageModel
from models.training.loading import load_data
from models.training.processes import Processes

TEXTS = [f'document {i}: caf\u00e9\r\n, with a comma "and quotes" {"x" * i}' for i in range(40)]


@pytest.fixture(autouse=True)
def own_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A tokenizer.json: byte-level BPE with an end of a document, as the published ones have."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(TEXTS, trainer)
    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    library.save(str(file))
    return file


def write_table(file: Path, texts: list[str], column: str = "text") -> None:
    table = datasets.Dataset.from_dict({"n": list(range(len(texts))), column: texts})
    if file.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in table)
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        getattr(table, {".parquet": "to_parquet", ".csv": "to_csv"}[file.suffix])(str(file))


@pytest.fixture
def hub(tmp_path) -> Path:
    """A set laid out like one of the hub, in four files."""
    folder = tmp_path / "owner" / "texts"
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


def documents_of(corpus) -> list[bytes]:
    return [
        part.tokens[begin:end].tobytes()
        for part in (corpus.train, corpus.val)
        for begin, end in zip(part.starts, part.starts[1:], strict=False)
    ]


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("place", ["file", "folder [1]"])
def test_each_row_of_a_table_is_a_document(suffix, place, tmp_path):
    folder = tmp_path / place
    folder.mkdir()
    file = folder / f"a [b] {{c}}{suffix}"
    write_table(file, TEXTS, "body")
    path = file if place == "file" else folder
    corpus = load_corpus(settings("data=text", path=path, column="body").data)
    assert sorted(documents_of(corpus)) == sorted(text.encode() for text in TEXTS)
    assert corpus.val_text == b"".join(text.encode() for text in TEXTS if held_out(text))


def test_rows_are_held_out_by_their_text_whatever_their_order_and_file(tmp_path):
    write_table(tmp_path / "one.jsonl", TEXTS)
    write_table(tmp_path / "other.parquet", TEXTS[::-1])
    one, other = (
        load_corpus(settings("data=text", path=tmp_path / name).data)
        for name in ("one.jsonl", "other.parquet")
    )
    assert sorted(documents_of(one)) == sorted(documents_of(other))
    assert sorted(one.val_text) == sorted(other.val_text)


def test_a_folder_may_hold_files_of_all_kinds_and_rows_without_text(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_table(folder / "rows.jsonl", [*TEXTS, None, ""])
    (folder / "notes.txt").write_bytes(b"\xff a text file\r\n")
    found = documents_of(load_corpus(settings("data=text", path=folder).data))
    assert sorted(found) == sorted([b"\xff a text file\r\n", *(text.encode() for text in TEXTS)])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"txt": "abc"}\n', "data.column must be a column of .*use one of txt"),
        ("b.jsonl", b'{"text": "abc', "what their names say"),
        ("c.parquet", b"PAR1 this is none", "what their names say"),
        ("d.csv", b"txt\nabc\n", "data.column must be a column of"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_error(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        load_corpus(settings("data=text", path=tmp_path / name).data)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


# ----------------------------------------------------------------------------------------- hub


def test_a_set_of_the_hub_is_split_by_the_text_of_its_rows(hub):
    corpus = load_corpus(settings("data=hub", name=hub).data)
    assert documents_of(corpus) == [
        text.encode() for held in (False, True) for text in TEXTS if held_out(text) == held
    ]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "data=hub needs data.name"),
        ({"name": "a"}, "data.name must be a text set that"),
        ({"split": "test"}, "data.name must be a text set that"),
        ({"column": "body"}, "data.column must be a column of .*use one of n, text"),
        ({"column": "n"}, "data.column must hold text"),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_set_that_cannot_be_read_is_one_error(streaming, values, says, hub, monkeypatch):
    monkeypatch.chdir(hub.parent)
    config = settings("data=hub", f"data.streaming={streaming}", **({"name": hub} | values))
    if not values:
        config.data.name = None
    with pytest.raises(ConfigError, match=says) as error:
        open_hub(config.data)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- tokenizers


def test_documents_become_tokens_that_end_and_the_text_they_stand_for_is_known(words, tmp_path):
    write_table(tmp_path / "a.jsonl", TEXTS)
    tokenizer = load_tokenizer(str(words))
    corpus = load_corpus(settings("data=text", path=tmp_path / "a.jsonl").data, tokenizer)
    train = [text for text in TEXTS if not held_out(text)]
    assert corpus.train.tokens.dtype == np.uint16
    for text, begin, end in zip(train, corpus.train.starts, corpus.train.starts[1:], strict=False):
        tokens = corpus.train.tokens[begin:end].tolist()
        assert tokens[-1] == tokenizer.eos
        assert tokenizer.decode(tokens[:-1]) == text
    size = sum(len(text.encode()) for text in train)
    assert corpus.train.bytes_per_token == pytest.approx(size / corpus.train.tokens.size)
    assert 1.2 < corpus.train.bytes_per_token < 20


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


TINY = [*SIX_STEPS, "optim.steps=3", "data.sequence_length=16"]


def test_bits_per_byte_mean_the_same_with_any_tokenizer_and_it_travels(words, hub, tmp_path):
    config = settings("data=hub", *TINY, "data.val_tokens=null", name=hub)
    config.tokenizer, config.runs_dir = str(words), str(tmp_path / "runs")
    summary = train.train(config)
    loaded = load(summary.run)
    assert loaded.model.vocab_size == loaded.tokenizer.vocab_size > 256
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

    stopped = settings("data=hub", *TINY, "data.val_tokens=null")
    (summary.run / "loss.png").unlink()
    stopped.resume = str(summary.run)
    assert train.train(stopped).after == summary.after


# --------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_with_reset_state_a_document_in_a_row_is_as_if_it_stood_alone(model, tmp_path):
    write_table(tmp_path / "a.jsonl", TEXTS)
    config = settings("data=text", f"model={model}", *TINY, path=tmp_path / "a.jsonl")
    documents = load_corpus(config.data).train
    torch.manual_seed(0)
    language_model = build_model(config.model, "training")
    loader = TrainLoader(documents, 4, 150, 3, seed=1, reset_state=True)
    plain = TrainLoader(documents, 4, 150, 3, seed=1)
    checked = 0
    for packed, tokens in zip(loader, plain, strict=True):
        assert isinstance(packed, Packed)
        assert torch.equal(packed.tokens, tokens)
        with torch.no_grad():
            flat = tokens[:, :-1].reshape(1, -1)
            together, _ = language_model(flat, cu_seqlens=torch.from_numpy(packed.offsets))
            for begin, end in zip(packed.offsets, packed.offsets[1:], strict=False):
                alone, _ = language_model(flat[:, begin:end])
                torch.testing.assert_close(together[:, begin:end], alone, atol=2e-5, rtol=1e-4)
                if begin % 150:
                    assert flat[0, begin:end][:9].tolist() == list(b"document ")[: end - begin]
                    checked += 1
            loss = F.cross_entropy(together[0], tokens[:, 1:].flatten())
            module = LitLanguageModel(language_model, config.optim)
            assert module.loss(packed).item() == pytest.approx(loss.item())
            assert module.loss(tokens).item() != pytest.approx(loss.item())
    assert checked > 15


# ------------------------------------------------------------------------------------- streams


def stream(hub, steps=12, rank=0, world_size=1, length=16, tokenizer=None, **values):
    data = settings("data=hub", "data.streaming=true", name=hub).data
    return StreamLoader(
        open_hub(data),
        tokenizer or ByteTokenizer(),
        4,
        2,
        length,
        steps,
        rank,
        world_size,
        **values,
    )


def test_a_stream_is_the_training_text_end_to_end_and_again(hub):
    text = b"".join(t.encode() for t in TEXTS if not held_out(t))
    steps = 2 * len(text) // 32 + 3
    targets = b"".join(bytes(batch[:, :-1].flatten().tolist()) for batch in stream(hub, steps))
    assert targets == (text * 3)[: len(targets)]


def test_processes_read_a_stream_apart_and_together_all_of_it(hub):
    lengths = {}
    for world_size in (2, 4, 3):
        seen = []
        for rank in range(world_size):
            loader = stream(hub, 1, rank, world_size) if world_size == 2 else None
            loader = loader or StreamLoader(
                open_hub(settings("data=hub", "data.streaming=true", name=hub).data),
                ByteTokenizer(), 4, world_size, 16, 1, rank, world_size,
            )  # fmt: skip
            documents = loader._documents()
            own = []
            while (text := bytes(next(documents).tolist())) not in own:
                own.append(text)
            seen += own
        lengths[world_size] = sorted(seen)
    expected = sorted(text.encode() for text in TEXTS if not held_out(text))
    assert lengths == {2: expected, 4: expected, 3: expected}


@pytest.mark.parametrize("stop", [1, 8, 45, 90])
@pytest.mark.parametrize("reset_state", [False, True])
def test_a_stream_goes_on_where_its_state_was_taken(stop, reset_state, hub, words, tmp_path):
    def flat(batch):
        if isinstance(batch, Packed):
            return [batch.tokens.tolist(), batch.offsets.tolist()]
        return batch.tolist()

    def loader():
        return stream(hub, 100, tokenizer=load_tokenizer(str(words)), reset_state=reset_state)

    whole = [flat(batch) for batch in loader()]
    first = loader()
    iterator = iter(first)
    begun = [flat(next(iterator)) for _ in range(stop)]
    torch.save(first.state_dict(), tmp_path / "state")
    second = loader()
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert begun + [flat(batch) for batch in second] == whole


def places(hub, monkeypatch, batches=9, **values):
    """The batches that each of two processes reads, and the state that the first then saves."""
    loaders, begun = [stream(hub, 40, rank, 2, **values) for rank in range(2)], []
    for loader in loaders:
        iterator = iter(loader)
        begun.append([next(iterator).tolist() for _ in range(batches)])
    own = []
    for loader in loaders:
        loader._gather = lambda mine: own.append(mine) or own
        state = loader.state_dict()
    return begun, state


def test_each_process_of_a_stream_goes_on_at_its_own_place(hub, tmp_path, monkeypatch):
    whole = [[batch.tolist() for batch in stream(hub, 40, rank, 2)] for rank in range(2)]
    begun, state = places(hub, monkeypatch)
    torch.save(state, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    for rank in range(2):
        loader = stream(hub, 40, rank, 2)
        loader.check(state)
        loader.load_state_dict(state)
        assert begun[rank] + [batch.tolist() for batch in loader] == whole[rank]
    for processes in (1, 4):
        loader = StreamLoader(loader.stream, ByteTokenizer(), 4, 4, 16, 40, 0, processes)
        with pytest.raises(ConfigError, match=f"is resumed, 2, got {processes}; use 2"):
            loader.check(state)


def test_a_stream_is_known_by_its_files_its_beginning_and_the_document_before_each_place(
    hub, monkeypatch
):
    _, state = places(hub, monkeypatch)
    for rank in range(2):
        stream(hub, 40, rank, 2).check(state)
    with pytest.raises(ConfigError, match=r"must begin like that of the run .* got 00000007; put"):
        stream(hub, 40, 0, 2, beginning=7).check(state)
    for rank, file in enumerate(sorted(hub.iterdir())[:2]):  # two of four for each process
        before = file.read_bytes()
        rest = before.partition(b"\n")[2]
        file.write_bytes(rest)  # all that comes after it moves up
        with pytest.raises(ConfigError, match=f"document that process {rank} of the run .* read"):
            stream(hub, 40, 0, 2).check(state)
        stream(hub, 40, 1, 2).check(state)  # the first process looks for both, and says so
        file.write_bytes(before)
    file.unlink()
    with pytest.raises(ConfigError, match=r"must have as many files as .* 4, got 3; put"):
        stream(hub, 40, 0, 2).check(state)


def test_the_first_process_says_that_another_has_no_text_to_train_on(tmp_path):
    texts = [text for text in TEXTS if not held_out(text)][:3]
    (tmp_path / "set").mkdir()
    write_table(tmp_path / "set" / "a.jsonl", texts)
    stream(tmp_path / "set", 9, 0, 2).check(None)
    write_table(tmp_path / "set" / "a.jsonl", texts[:1])
    stream(tmp_path / "set", 9).check(None)
    with pytest.raises(ConfigError, match="got none for process 1 of 2; use fewer"):
        stream(tmp_path / "set", 9, 0, 2).check(None)
    with pytest.raises(ConfigError, match="got none for process 1 of 2; use fewer"):
        next(iter(stream(tmp_path / "set", 9, 1, 2)))  # and does not look for ever


def test_a_file_of_a_stream_that_cannot_be_read_is_one_error(hub):
    max(hub.iterdir()).write_text('{"text": "abc')
    with pytest.raises(
        RunError, match=r"that can be read, got one that cannot \(.*\); look"
    ) as error:
        list(stream(hub, 999))
    assert "\n" not in str(error.value)
    with pytest.raises(Exception) as error:  # noqa: PT011  of datasets
        list(stream(hub, 999, 1, 2))
    assert not isinstance(error.value, RunError)


def test_a_stream_is_validated_on_the_first_documents_held_out(hub):
    config = settings("data=hub", *TINY, "data.streaming=true", "data.val_tokens=100", name=hub)
    corpus, _ = validation_corpus(open_hub(config.data), config.data, ByteTokenizer())
    expected = b"".join(text.encode() for text in TEXTS if held_out(text))
    assert len(corpus.val_text) > 100
    assert expected.startswith(corpus.val_text)
    data = load_data(config, ByteTokenizer(), Processes(1, 1, 0))
    assert sum(len(batch) for batch in data.held_out) == 100 // 16
    config.data.val_tokens = None
    with pytest.raises(ConfigError, match=r"data\.val_tokens must be a number"):
        load_data(config, ByteTokenizer(), Processes(1, 1, 0))


def stream_run(hub, words, folder, *more):
    overrides = ("data.streaming=true", "data.val_tokens=100", "trainer.checkpoint_every=4")
    made = settings("data=hub", *TINY, *overrides, *more, "optim.steps=12", name=hub)
    made.runs_dir, made.tokenizer = str(folder), str(words)
    return made


@pytest.mark.slow
def test_a_run_on_a_stream_goes_on_to_the_same_bits(hub, words, tmp_path, monkeypatch):
    whole = train.train(stream_run(hub, words, tmp_path / "whole"))
    train_until(7, stream_run(hub, words, tmp_path / "stopped"), monkeypatch)
    again = train.train(stream_run(hub, words, tmp_path / "stopped", "resume=auto"))
    assert again.after == whole.after
    expected = load(whole.run).model.state_dict()
    for name, tensor in load(again.run).model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_run_on_a_stream_does_not_go_on_in_another_one(hub, words, tmp_path, monkeypatch):
    run = train_until(7, stream_run(hub, words, tmp_path / "runs"), monkeypatch)
    before = {path: path.read_bytes() for path in run.iterdir()}
    first = min(hub.iterdir())
    first.write_bytes(first.read_bytes().replace(b"document", b"Document"))
    with pytest.raises(ConfigError, match="stream must begin like that of the run that is resu"):
        train.train(stream_run(hub, words, tmp_path / "runs", "resume=auto"))
    assert {path: path.read_bytes() for path in run.iterdir()} == before

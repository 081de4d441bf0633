"""Sets that are read while they are trained on: order, shares, going on, what is refused."""

import pytest
import torch

import train
from demo.checkpoints.checkpoint import load
from demo.checkpoints.tokenizer import ByteTokenizer, load_tokenizer
from demo.config.schema import ConfigError, RunError
from demo.data.batches import Packed
from demo.data.loaders import load_data
from demo.data.sources import open_hub
from demo.data.stream import StreamLoader, validation_corpus
from small_runs import train_until
from text_sets import TEXTS, TINY, held_out, settings, write_table

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")


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
    data = load_data(config, ByteTokenizer())
    assert sum(len(batch) for batch in data.held_out) == 100 // 16
    config.data.val_tokens = None
    with pytest.raises(ConfigError, match=r"data\.val_tokens must be a number"):
        load_data(config, ByteTokenizer())


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

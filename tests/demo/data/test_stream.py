"""Sets that are read while they are trained on: order, shares, resuming, what is refused."""

import re

import numpy as np
import pytest
import torch

import train
from demo.checkpoints.tokenizer import ByteTokenizer, load_tokenizer
from demo.config.errors import ConfigError, RunError
from demo.data.batches import Packed
from demo.data.loaders import load_data
from demo.data.sources import open_hub
from demo.data.stream import StreamLoader, validation_corpus
from small_runs import check_weights, train_until
from text_sets import TEXTS, TINY, held_out, settings, write_table

pytestmark = pytest.mark.usefixtures("own_cache_and_no_network")
TRAINED = [text.encode() for text in TEXTS if not held_out(text)]


def stream(hub, steps=40, rank=0, world_size=1, tokenizer=None, beginning=0, **more):
    data = settings("data=hub", "data.streaming=true", name=hub).data
    rows = {"batch_size": 2, "sequence_length": 16, "steps": steps}
    process = {"rank": rank, "world_size": world_size}
    tokenizer = tokenizer or ByteTokenizer()
    return StreamLoader(open_hub(data), tokenizer, 4, beginning, **{**rows, **process, **more})


def flat(batch):
    return [part.tolist() for part in (batch if isinstance(batch, Packed) else [batch])]


def saved(state, folder):
    """The state as it comes back from a checkpoint."""
    torch.save(state, folder / "state")
    return torch.load(folder / "state", weights_only=True)


def test_a_stream_is_the_training_text_end_to_end_and_again(hub):
    text, starts = b"".join(TRAINED), np.cumsum([0, *map(len, TRAINED * 3)])
    inputs = b""
    for batch in stream(hub, 2 * len(text) // 32 + 3, reset_state=True):
        own = starts - len(inputs)
        own = {0, 16, 32, *own[(own >= 0) & (own <= 32)].tolist()}
        assert batch.cu_seqlens.tolist() == sorted(own)
        inputs += bytes(batch.tokens[:, :-1].flatten().tolist())
    assert len(inputs) > 2 * len(text)
    assert inputs == (text * 3)[: len(inputs)]


@pytest.mark.parametrize("world_size", [2, 4, 3])
def test_processes_read_a_stream_apart_and_together_all_of_it(world_size, hub):
    steps = 2 * sum(map(len, TRAINED)) // 16  # more than once around
    seen = []
    for rank in range(world_size):
        loader = stream(hub, steps, rank, world_size, batch_size=world_size)
        inputs = b"".join(bytes(batch[0, :-1].tolist()) for batch in loader)
        seen += [text for text in TRAINED if text in inputs]
    assert sorted(seen) == sorted(TRAINED)


@pytest.mark.parametrize("stop", [1, 8, 45])  # of 17 for all of it
@pytest.mark.parametrize("reset_state", [False, True])
def test_a_stream_resumes_where_its_state_was_taken(stop, reset_state, hub, words, tmp_path):
    tokenizer = load_tokenizer(str(words))
    whole, first, second = (
        stream(hub, 60, tokenizer=tokenizer, reset_state=reset_state) for _ in range(3)
    )
    iterator = iter(first)
    begun = [flat(next(iterator)) for _ in range(stop)]
    second.load_state_dict(saved(first.state_dict(), tmp_path))
    assert begun + [flat(batch) for batch in second] == [flat(batch) for batch in whole]


@pytest.fixture
def stopped(hub, tmp_path):
    """The 9 batches that each of two processes read, and the state that is then saved."""
    loaders, begun = [stream(hub, rank=rank, world_size=2) for rank in range(2)], []
    for loader in loaders:
        iterator = iter(loader)
        begun.append([flat(next(iterator)) for _ in range(9)])
    states = [loader.state_dict() for loader in loaders]
    processes = [state["processes"][rank] for rank, state in enumerate(states)]
    return begun, saved({**states[0], "processes": processes}, tmp_path)


def test_each_process_of_a_stream_resumes_at_its_own_place(hub, stopped):
    begun, state = stopped
    for rank in range(2):
        loader = stream(hub, rank=rank, world_size=2)
        loader.check_state(state)
        loader.load_state_dict(state)
        whole = [flat(batch) for batch in stream(hub, rank=rank, world_size=2)]
        assert begun[rank] + [flat(batch) for batch in loader] == whole
    for processes in (1, 4):
        with pytest.raises(ConfigError, match=f"is resumed, 2, got {processes}; use 2"):
            stream(hub, world_size=processes, batch_size=4).check_state(state)


def test_a_stream_is_known_by_its_files_its_beginning_and_the_documents_read_last(hub, stopped):
    _, state = stopped
    for rank in range(2):
        stream(hub, rank=rank, world_size=2).check_state(state)
    with pytest.raises(ConfigError, match=r"stream's beginning must be as in .* got 7; put"):
        stream(hub, world_size=2, beginning=7).check_state(state)
    for rank, file in enumerate(sorted(hub.iterdir())[:2]):  # two of four for each process
        before = file.read_bytes()
        file.write_bytes(before.partition(b"\n")[2])  # all that comes after it moves up
        says = f"document that process {rank} read last must be as in the run that is resumed"
        with pytest.raises(ConfigError, match=says):
            stream(hub, world_size=2).check_state(state)
        stream(hub, rank=1, world_size=2).check_state(state)  # the first process looks for both
        file.write_bytes(before)
    file.unlink()
    with pytest.raises(ConfigError, match=r"number of files .* resumed, 4, got 3; put"):
        stream(hub, world_size=2).check_state(state)


def test_the_first_process_says_that_another_has_no_text_to_train_on(hub):
    texts = [text for text in TEXTS if not held_out(text)][:3]
    for file in sorted(hub.iterdir())[1:]:
        file.unlink()
    (file,) = hub.iterdir()
    write_table(file, texts)
    stream(hub, world_size=2).check_has_text()
    write_table(file, texts[:1])
    stream(hub).check_has_text()
    says = "got none for process 1 of 2; use fewer"
    with pytest.raises(ConfigError, match=says):
        stream(hub, world_size=2).check_has_text()
    with pytest.raises(ConfigError, match=says):
        next(iter(stream(hub, rank=1, world_size=2)))  # and does not look for ever


def test_a_file_of_a_stream_that_cannot_be_read_is_one_error(hub):
    max(hub.iterdir()).write_text('{"text": "abc')
    says = r"that can be read, got one that cannot \(.*\); look"
    with pytest.raises(RunError, match=says) as error:
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
    assert sum(len(batch) for batch in data.validation) == 100 // 16
    config.data.val_tokens = None
    with pytest.raises(ConfigError, match=re.escape("data.val_tokens must be a number")):
        load_data(config, ByteTokenizer())


@pytest.fixture
def run_on_stream(hub, words, tmp_path):
    """The config of a run on the stream `hub`, in a folder of runs."""

    def config(runs, *more):
        overrides = ("data.streaming=true", "data.val_tokens=100", "trainer.checkpoint_every=4")
        made = settings("data=hub", *TINY, *overrides, *more, "optim.steps=12", name=hub)
        made.runs_dir, made.tokenizer = str(tmp_path / runs), str(words)
        return made

    return config


@pytest.mark.slow
def test_a_resumed_run_on_a_stream_ends_with_the_same_bits(run_on_stream, monkeypatch):
    whole = train.train(run_on_stream("whole"))
    train_until(7, run_on_stream("stopped"), monkeypatch)
    again = train.train(run_on_stream("stopped", "resume=auto"))
    assert again.after == whole.after
    check_weights(again.run, whole.run)


def test_a_run_on_a_stream_is_not_resumed_on_another_one(hub, run_on_stream, monkeypatch):
    run = train_until(7, run_on_stream("runs"), monkeypatch)
    before = {path: path.read_bytes() for path in run.iterdir()}
    first = min(hub.iterdir())
    first.write_bytes(first.read_bytes().replace(b"document", b"Document"))
    with pytest.raises(ConfigError, match="stream's beginning must be as in the run that is resu"):
        train.train(run_on_stream("runs", "resume=auto"))
    assert {path: path.read_bytes() for path in run.iterdir()} == before

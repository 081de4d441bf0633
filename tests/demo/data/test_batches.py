"""Which tokens become which batch, for training and validation, in each of several processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from demo.config.errors import ConfigError
from demo.data.batches import Packed, TrainLoader, ValidationLoader
from demo.data.corpus import Documents, load_corpus
from demo.training.module import LitLanguageModel
from models.language_model import LanguageModel
from text_sets import TEXTS, TINY, settings, write_table


def counting(tokens: int) -> Documents:
    """A document in which every token is its own place."""
    return Documents(np.arange(tokens).astype(np.uint16), np.array([0, tokens]))


def loader_of(documents: Documents, batch_size: int, length: int, steps: int, **more):
    values = {"seed": 5, "batch_size": batch_size, "sequence_length": length, "steps": steps}
    return TrainLoader(documents, **{**values, **more})


def rows(loader: TrainLoader) -> list[list[list[int]]]:
    return [batch.tolist() for batch in loader]


def test_an_epoch_reads_every_row_of_consecutive_tokens_once_and_the_next_in_another_order():
    per_epoch = (203 - 1) // 10 - 1
    batches = list(loader_of(counting(203), 2, 10, per_epoch))
    for batch in batches:
        assert batch.dtype == torch.int64
        assert batch.shape == (2, 10 + 1)
        assert (batch.diff(dim=1) == 1).all()
    begins = torch.cat(batches)[:, 0].tolist()
    first, second = begins[:per_epoch], begins[per_epoch:]
    for epoch in (first, second):
        assert np.diff(sorted(epoch)).tolist() == [10] * (per_epoch - 1)
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("tokens", range(8, 40))
def test_an_epoch_leaves_out_fewer_tokens_than_two_rows(tokens):
    per_epoch = max(1, (tokens - 1) // 7 - 1)
    read = {token for (row,) in rows(loader_of(counting(tokens), 1, 7, per_epoch)) for token in row}
    assert tokens - len(read) < 2 * 7
    assert len(read) == per_epoch * 7 + 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_disjoint_rows_of_the_batch_that_one_process_reads(world_size):
    alone, *parts = (
        loader_of(counting(1000), 8, 5, 6, rank=rank, world_size=count)
        for rank, count in [(0, 1), *((rank, world_size) for rank in range(world_size))]
    )
    for index in range(6):
        together = torch.cat([part.batch(index) for part in parts])
        assert torch.equal(together, alone.batch(index))


def test_order_follows_from_the_seed_alone():
    one, same, other = (rows(loader_of(counting(1000), 4, 5, 9, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("stop", [1, 7, 60])
def test_a_loader_resumes_where_its_state_was_taken(stop):
    first, second = (loader_of(counting(300), 2, 9, 61) for _ in range(2))
    iterator = iter(first)
    begun = [next(iterator).tolist() for _ in range(stop)]
    second.load_state_dict(first.state_dict())
    assert begun + rows(second) == rows(loader_of(counting(300), 2, 9, 61))


@pytest.mark.parametrize("change", ["a token more", "another token", "another document"])
def test_a_loader_does_not_resume_on_another_text(change):
    state = loader_of(counting(300), 2, 9, 61).state_dict()
    tokens, starts = counting(300).tokens, counting(300).starts
    if change == "a token more":
        tokens = np.append(tokens, tokens[:1])
    elif change == "another token":
        tokens[7] += 1
    else:
        starts = np.array([0, 100, 300])
    loader_of(counting(300), 2, 9, 61).check_state(state)
    with pytest.raises(ConfigError, match=r"tokens must be as in .* resumed, 300 \(crc32 .*got"):
        loader_of(Documents(tokens, starts), 2, 9, 61).check_state(state)
    del state["text"]
    with pytest.raises(ConfigError, match=r"the parts of the position .*, got position, text"):
        loader_of(counting(300), 2, 9, 61).check_state(state)


@pytest.mark.parametrize("sharing", [1, 4])
def test_all_processes_read_the_same_text(sharing, monkeypatch):
    """Those that share a model too, which are one to the loader."""
    readers = {"world_size": 4 // sharing}
    loaders = [
        loader_of(counting(300 + rank // 2), 4, 9, 5, rank=rank // sharing, **readers)
        for rank in range(4)
    ]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)

    def gather(gathered, own):
        gathered[:] = [loader.state_dict()["text"] for loader in loaders]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for loader in loaders:
        says = r"got 300 \(crc32 .*\) in process 0 and 301 \(crc32 .*\) in process 2; give"
        with pytest.raises(ConfigError, match=says):
            next(iter(loader))
    loaders[2:] = loaders[:2]
    assert len(next(iter(loaders[0]))) == sharing


@pytest.mark.usefixtures("own_cache_and_no_network")
@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_with_reset_state_a_document_in_a_row_is_as_if_it_stood_alone(model, tmp_path):
    write_table(tmp_path / "a.jsonl", TEXTS)
    config = settings("data=text", f"model={model}", *TINY, path=tmp_path / "a.jsonl")
    documents = load_corpus(config.data).train
    torch.manual_seed(0)
    language_model = LanguageModel(config.model)
    loader, plain = (loader_of(documents, 4, 150, 3, reset_state=reset) for reset in (True, False))
    checked = 0
    for packed, tokens in zip(loader, plain, strict=True):
        assert isinstance(packed, Packed)
        assert torch.equal(packed.tokens, tokens)
        with torch.no_grad():
            flat = tokens[:, :-1].reshape(1, -1)
            together, _ = language_model(flat, cu_seqlens=torch.from_numpy(packed.cu_seqlens))
            for begin, end in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
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


def test_validation_rows_lie_end_to_end():
    batches = list(ValidationLoader(counting(100), 9, batch_size=4))
    targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    assert targets.tolist() == list(range(1, 100))
    assert [len(batch) for batch in batches] == [4, 4, 3]


def test_a_part_of_the_validation_rows_is_spread_over_all_of_them():
    begins = [
        row[0] for rows in ValidationLoader(counting(1001), 10, 50, batch_size=3) for row in rows
    ]
    assert begins == [0, 250, 500, 740, 990]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_validate_in_step_on_every_row_once(batch_size, processes):
    parts = [
        list(ValidationLoader(counting(100), 9, None, rank, processes, batch_size=batch_size))
        for rank in range(processes)  # of 11 rows
    ]
    assert len({len(part) for part in parts}) == 1
    begins = torch.cat([batch[:, 0] for part in parts for batch in part])
    assert begins.tolist() == list(range(0, 99, 9))


@pytest.mark.parametrize(
    ("max_tokens", "says"),
    [
        (None, "got 11 rows in 100 .*val_tokens=null;"),
        (27, "got 3 rows in 100 .*val_tokens=27; raise it"),
    ],
)
def test_fewer_validation_rows_than_processes_are_one_error(max_tokens, says):
    for rank in (0, 11):
        with pytest.raises(ConfigError, match=says):
            ValidationLoader(counting(100), 9, max_tokens, rank, 12)

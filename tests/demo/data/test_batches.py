"""Which tokens become which batch, for training and validation, in each of several processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from demo.checkpoints.checkpoint import build_model
from demo.config.schema import ConfigError
from demo.data.batches import Packed, TrainLoader, ValidationLoader
from demo.data.corpus import Documents, load_corpus
from demo.training.module import LitLanguageModel
from text_sets import TEXTS, TINY, settings, write_table


def counting(tokens: int) -> Documents:
    """Documents whose every pair of neighbours says where it stands."""
    place = np.arange(tokens)
    return Documents(
        np.where(place % 2, place // 2 % 251, place // 502).astype(np.uint8), np.array([0, tokens])
    )


def rows(loader: TrainLoader, batches: range) -> list[tuple[int, ...]]:
    return [tuple(row) for index in batches for row in loader.batch(index).tolist()]


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order():
    documents = Documents(np.arange(203) % 256, np.array([0, 203]))
    per_epoch = (203 - 1) // 10 - 1
    loader = TrainLoader(documents, 1, 10, 2 * per_epoch, seed=0)
    begins = [batch[0, 0].item() for batch in loader]
    first, second = begins[:per_epoch], begins[per_epoch:]
    for epoch in (first, second):
        assert len(set(epoch)) == per_epoch
        assert np.diff(sorted(epoch)).tolist() == [10] * (per_epoch - 1)
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("tokens", range(8, 40))
def test_an_epoch_leaves_out_fewer_tokens_than_two_rows(tokens):
    loader = TrainLoader(Documents(np.arange(tokens), np.array([0, tokens])), 1, 7, 1, seed=3)
    epoch = max(1, (tokens - 1) // 7 - 1)
    read = {token for row in rows(loader, range(epoch)) for token in row}
    assert tokens - len(read) < 2 * 7
    assert len(read) == epoch * 7 + 1


def test_a_row_is_consecutive_text_with_one_more_token():
    documents = Documents(np.arange(200).astype(np.uint8), np.array([0, 200]))
    for batch in TrainLoader(documents, 3, 7, 5, seed=1):
        assert batch.dtype == torch.int64
        assert batch.shape == (3, 8)
        assert (batch.diff(dim=1) == 1).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_disjoint_rows_of_the_batch_that_one_process_reads(world_size):
    documents = counting(1000)
    alone = TrainLoader(documents, 8, 5, 6, seed=3)
    shares = [TrainLoader(documents, 8, 5, 6, 3, rank, world_size) for rank in range(world_size)]
    for index in range(6):
        together = torch.cat([share.batch(index) for share in shares])
        assert torch.equal(together, alone.batch(index))


def test_order_follows_from_the_seed_alone():
    documents = counting(1000)
    assert rows(TrainLoader(documents, 4, 5, 9, seed=1), range(9)) == rows(
        TrainLoader(documents, 4, 5, 9, seed=1), range(9)
    )
    assert rows(TrainLoader(documents, 4, 5, 9, seed=1), range(9)) != rows(
        TrainLoader(documents, 4, 5, 9, seed=2), range(9)
    )


@pytest.mark.parametrize("stop", [1, 7, 60])
def test_a_loader_goes_on_where_its_state_was_taken(stop):
    def loader() -> TrainLoader:
        return TrainLoader(counting(300), 2, 9, 61, seed=5)

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    begun = [next(iterator).tolist() for _ in range(stop)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert begun + [batch.tolist() for batch in second] == whole


@pytest.mark.parametrize("change", ["a token more", "another token", "another document"])
def test_a_loader_does_not_go_on_in_another_text(change):
    documents = counting(300)
    first = TrainLoader(documents, 2, 9, 61, seed=5)
    tokens, starts = documents.tokens.copy(), documents.starts
    if change == "a token more":
        tokens = np.append(tokens, tokens[:1])
    elif change == "another token":
        tokens[7] += 1
    else:
        starts = np.array([0, 100, 300])
    second = TrainLoader(Documents(tokens, starts), 2, 9, 61, seed=5)
    with pytest.raises(ConfigError, match=r"tokens must be those of .* resumed, 300 \(crc32 .*got"):
        second.check(first.state_dict())


def test_all_processes_read_the_same_text(monkeypatch):
    loaders = [TrainLoader(counting(300 + rank // 2), 4, 9, 5, 0, rank, 4) for rank in range(4)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def gather(texts, own):
        texts[:] = [loader._text for loader in loaders]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for loader in loaders:
        says = r"got 300 \(crc32 .*\) in process 0 and 301 \(crc32 .*\) in process 2; give"
        with pytest.raises(ConfigError, match=says):
            next(iter(loader))
    loaders[2:] = loaders[:2]
    assert len(next(iter(loaders[0]))) == 1


@pytest.mark.usefixtures("own_cache_and_no_network")
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


def test_validation_rows_lie_end_to_end():
    documents = Documents(np.arange(100).astype(np.uint8), np.array([0, 100]))
    batches = list(ValidationLoader(documents, 9, batch_size=4))
    targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    assert targets.tolist() == list(range(1, 100))
    assert [len(batch) for batch in batches] == [4, 4, 3]


def test_a_part_of_the_validation_rows_is_spread_over_all_of_them():
    documents = Documents((np.arange(1001) // 10).astype(np.uint8), np.array([0, 1001]))
    begins = torch.cat([batch[:, 0] for batch in ValidationLoader(documents, 10, 50, batch_size=3)])
    assert begins.tolist() == [0, 25, 50, 74, 99]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_validate_in_step_on_every_row_once(batch_size, processes):
    documents = Documents(np.arange(100).astype(np.uint8), np.array([0, 100]))  # 11 rows
    parts = [
        list(ValidationLoader(documents, 9, None, rank, processes, batch_size=batch_size))
        for rank in range(processes)
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
    documents = Documents(np.arange(100).astype(np.uint8), np.array([0, 100]))
    for rank in (0, 11):
        with pytest.raises(ConfigError, match=says):
            ValidationLoader(documents, 9, max_tokens, rank, 12)

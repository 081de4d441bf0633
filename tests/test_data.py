"""Which bytes become which batch, and which files are held out."""

import zlib
from dataclasses import asdict
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from configs.command import compose
from configs.schema import ConfigError, DataConfig
from models.data import sources
from models.data.batches import TrainLoader, ValidationLoader
from models.data.corpus import Documents, load_corpus


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def counting(tokens: int) -> Documents:
    """Documents whose every pair of neighbours says where it stands."""
    place = np.arange(tokens)
    return Documents(
        np.where(place % 2, place // 2 % 251, place // 502).astype(np.uint8), np.array([0, tokens])
    )


def settings(path: Path | str, **values) -> DataConfig:
    defaults = asdict(compose("train", ["data=text"]).data)
    defaults |= {"hold_out": 2, "val_tokens": None, "sequence_length": 4, "path": str(path)}
    return DataConfig(**{**defaults, **values})


def rows(loader: TrainLoader, batches: range) -> list[tuple[int, ...]]:
    return [tuple(row) for index in batches for row in loader.batch(index).tolist()]


# ------------------------------------------------------------------------------------- batches


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


# ----------------------------------------------------------------------------------- documents


def test_the_standard_library_is_split_by_whole_files():
    data = compose("train").data
    folder, files = sources.find_files(data)
    assert not [name for name in files if "site-packages" in name or name.startswith("test/")]
    loaded = load_corpus(data)
    held_out = [name for name in files if zlib.crc32(name.encode()) % data.hold_out == 0]
    assert loaded.val.tokens.tobytes() == b"".join((folder / n).read_bytes() for n in held_out)
    assert len(loaded.train) + len(loaded.val) == len(files)
    assert 0.02 < loaded.val.tokens.size / loaded.train.tokens.size < 0.15


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"a\r\nb\r\n\r\n" * 9, id="crlf"),
        pytest.param(bytes(range(256)), id="not-utf8"),
        pytest.param(b"\xff\xfe" + "caf\u00e9 \U0001f600".encode("utf-16-le") * 9, id="utf16"),
        pytest.param(b"\0" * 99, id="nul"),
    ],
)
def test_bytes_survive(tmp_path, text):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a.txt", "b.md", "c.py", "d.txt", "skipped.bin"):
        (folder / name).write_bytes(text)
    loaded = load_corpus(settings(folder))
    assert loaded.train.tokens.tobytes() + loaded.val.tokens.tobytes() == text * 4
    assert np.diff(loaded.train.starts).tolist() == [len(text)] * len(loaded.train)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *product(("folder", "file"), ("a [1]", "b{x,y}", "c*?", "d=e, f", "\u00e9\u00e8")),
        *product(("glob",), ("b{x,y}", "d=e, f", "\u00e9\u00e8")),
    ],
)
def test_paths_of_all_kinds(tmp_path, name, what):
    folder = tmp_path / name
    folder.mkdir()
    for i in range(8):
        (folder / f"{name}{i}.txt").write_bytes(b"0123456789" * (i + 1))
    path = {"folder": folder, "file": folder / f"{name}7.txt", "glob": folder / "*.txt"}[what]
    loaded = load_corpus(settings(path))
    expected = 80 if what == "file" else 360
    assert loaded.train.tokens.size + loaded.val.tokens.size == expected


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(200)))
    loaded = load_corpus(settings(tmp_path / "book.txt", hold_out=10))
    assert loaded.train.tokens.tolist() == list(range(180))
    assert loaded.val.tokens.tolist() == list(range(180, 200))


def test_a_file_more_moves_no_other_between_training_and_validation(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_bytes(b"%d" % i * 50)
    before = load_corpus(settings(folder))
    (folder / "00.txt").write_bytes(b"x" * 50)
    after = load_corpus(settings(folder))
    for part in ("train", "val"):
        kept = getattr(after, part).tokens.tobytes().replace(b"x", b"")
        assert kept == getattr(before, part).tokens.tobytes()


def test_a_second_start_is_served_from_the_cache_and_a_change_is_seen(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_bytes(b"abcdefgh")
    read = []
    rows_of = sources._rows

    def counted(**arguments):
        read.append(1)
        yield from rows_of(**arguments)

    monkeypatch.setattr(sources, "_rows", counted)
    first = load_corpus(settings(folder))
    second = load_corpus(settings(folder))
    assert len(read) == 1
    assert np.array_equal(first.train.tokens, second.train.tokens)
    (folder / "0.txt").write_bytes(b"something else")
    third = load_corpus(settings(folder))
    assert len(read) == 2
    assert b"something else" in third.train.tokens.tobytes() + third.val.tokens.tobytes()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        pytest.param({"path": "missing"}, "no such path", id="missing"),
        pytest.param({"path": "."}, "none there", id="empty-folder"),
        pytest.param({"path": "*.txt"}, "no such path", id="empty-glob"),
        pytest.param({"path": "short.rst"}, "sequence_length must be below", id="short-file"),
        pytest.param({"path": None}, "needs data.path", id="no-path"),
    ],
)
def test_bad_data_is_one_error(tmp_path, monkeypatch, values, says):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "short.rst").write_bytes(b"abc")
    monkeypatch.chdir(folder)
    config = settings(".")
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=says) as error:
        load_corpus(config)
    assert "\n" not in str(error.value)

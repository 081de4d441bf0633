"""Files of a published checkpoint that are damaged, absurd, or would run code."""

import json
import os
import pickle

import pytest
import torch

from demo.checkpoints.published import load_published
from published_models import FLA, fla_weights, write


class RunsCode:
    """A pickle of it makes a folder where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("code-of-the-checkpoint-ran",)


BAD_PICKLES = {
    "code": (lambda f: torch.save(RunsCode(), f), "whose code was not run"),
    "plain_pickle": (
        lambda f: f.write_bytes(pickle.dumps(RunsCode(), 2)),
        "whose code was not run",
    ),
    "no_pickle": (lambda f: f.write_bytes(b"tensors"), "is cut short or damaged"),
    "empty": (lambda f: f.write_bytes(b""), "is cut short or damaged"),
    "cut": (
        lambda f: (torch.save(fla_weights(), f), f.write_bytes(f.read_bytes()[:5000])),
        "is cut short or damaged",
    ),
    "list": (lambda f: torch.save([torch.ones(2)], f), "must hold tensors by their names"),
    "training": (
        lambda f: torch.save({"model": fla_weights()}, f),
        "must hold tensors by their names",
    ),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_pickle_that_is_wrong_runs_nothing_and_nobody_is_told_to_run_it(
    case, tmp_path, monkeypatch
):
    change, message = BAD_PICKLES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLA))
    change(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message) as error:
        load_published(tmp_path)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 2_000_000, "must have shape"),
        ("vocab_size", 10**12, "must have shape"),
        ("hidden_size", 10**30, "must have numbers for sizes"),
        ("num_hidden_layers", 10**9, "weights for each of the 1000000000 layers"),
        ("num_hidden_layers", "two", "must have numbers for sizes"),
    ],
)
def test_absurd_sizes_are_found_before_anything_is_allocated(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_published(write(tmp_path, {**FLA, name: value}, fla_weights()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parts", [None, ["a"], {"a": 3}], ids=str)
def test_an_index_that_names_no_files(parts, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FLA))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ValueError, match="must name a file for each weight"):
        load_published(tmp_path)

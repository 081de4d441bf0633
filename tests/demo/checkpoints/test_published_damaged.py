"""A published folder that is damaged, absurd, of another model, or would run code: one line."""

import json

import pytest
import torch

from demo.checkpoints.checkpoint import load
from demo.checkpoints.tokenizer import TextTokenizer
from demo.config.errors import ConfigError
from mistakes import RunsCode
from published_models import FLA, fla_weights, write
from text_sets import byte_level

BYTES = {**FLA, "vocab_size": 256}
CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def config(**values):
    """The config with other values; one that is "gone" is left out."""
    values = {k: v for k, v in {**BYTES, **values}.items() if v != "gone"}
    return lambda folder: (folder / CONFIG).write_text(json.dumps(values))


def weights(change):
    """The weights, changed in place."""

    def write_changed(folder):
        changed = fla_weights(BYTES)
        change(changed)
        write(folder, BYTES, changed)

    return write_changed


def pickled(save):
    """A pickle instead of safetensors."""

    def write_pickle(folder):
        (folder / WEIGHTS).unlink()
        save(folder / PICKLE)

    return write_pickle


def index(files):
    def write_index(folder):
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))

    return write_index


def cut_pickle(file):
    torch.save(fla_weights(), file)
    file.write_bytes(file.read_bytes()[:5000])


# Beside the cases of tests/helpers/mistakes.py.
DAMAGED = {
    "no config": (lambda f: (f / CONFIG).unlink(), r"a published model's folder with config\.json"),
    "a JSON list": (content(CONFIG, b"[]"), "must hold a JSON object, got list"),
    "tokenizer": (content("tokenizer.json", b"{}"), r"tokenizer\.json' must be a file of"),
    "no tokenizer": (
        lambda folder: write(folder, FLA, fla_weights()),
        "has a vocabulary of 50 and not the 256 bytes",
    ),
    "too many tokens": (
        lambda folder: TextTokenizer(byte_level()).save(folder),
        r"at most the model's 256 tokens, got 2\d\d",
    ),
    "attention": (config(attn={"layers": [1]}), "attn must be one of"),
    "no convolution": (config(use_short_conv=False), "use_short_conv must be .*, got False"),
    "activation": (config(hidden_act="gelu"), "hidden_act must be .*, got 'gelu'"),
    "lacks a size": (config(head_dim="gone"), "'head_dim' is missing"),
    "a word for a size": (config(num_hidden_layers="two"), "sizes must be numbers"),
    "no number of layers": (config(num_hidden_layers=None), "num_layers must have a value"),
    "no layers": (config(num_hidden_layers=0), "num_layers must be at least 1, got 0"),
    "wide": (config(hidden_size=2_000_000), r"of shape \[256, 2000000\], got \[256, 24\]"),
    "many words": (config(vocab_size=10**12), r"of shape \[1000000000000, 24\], got"),
    "absurd": (config(hidden_size=10**30), "sizes that no tensors can have"),
    "deep": (config(num_hidden_layers=10**9), "num_layers must be at most .*, got 1000000000"),
    "weight missing": (
        weights(lambda w: w.pop("model.layers.1.attn.k_proj.weight")),
        r"the weight model.layers.1.attn.k_proj.weight of shape \[16, 24\], got none",
    ),
    "head missing": (weights(lambda w: w.pop("lm_head.weight")), "lm_head.weight .* got none"),
    "weight left over": (
        weights(lambda w: w.update({"model.layers.2.attn.A_log": torch.zeros(4)})),
        "no place for: model.layers.2.attn.A_log",
    ),
    "shape of a weight": (
        weights(lambda w: w.update({"model.layers.0.attn.v_conv1d.weight": torch.ones(64, 1, 3)})),
        r"v_conv1d.weight of shape \[64, 4\], got \[64, 3\]",
    ),
    "code": (pickled(lambda f: torch.save(RunsCode(), f)), "whose code was not run"),
    "empty pickle": (pickled(lambda f: f.write_bytes(b"")), "is cut short or damaged"),
    "cut pickle": (pickled(cut_pickle), "is cut short or damaged"),
    "list": (pickled(lambda f: torch.save([torch.ones(2)], f)), "must hold tensors by their names"),
    "state of training": (
        pickled(lambda f: torch.save({"model": fla_weights()}, f)),
        "must hold tensors by their names",
    ),
    "index of nothing": (index(None), "must name the file of each weight"),
    "index of numbers": (index({"a": 3}), "must name the file of each weight"),
    "index of no file": (index({"a": "gone.safetensors"}), r"gone\.safetensors' cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_one_line_says_what_is_wrong_and_nothing_runs(case, tmp_path, monkeypatch):
    damage, message = DAMAGED[case]
    folder, here = tmp_path / "published", tmp_path / "here"
    folder.mkdir(), here.mkdir()
    monkeypatch.chdir(here)
    write(folder, BYTES, fla_weights(BYTES))
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice: run the code
    assert not list(here.iterdir())

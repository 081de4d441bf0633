"""checkpoint.load: a run, what ships, a published folder, a hub id; each with its tokenizer."""

import os
import random
import re
import shutil

import pytest
import torch
import yaml

from demo.checkpoints import checkpoint, weights
from demo.checkpoints.checkpoint import BEST, CONFIG, SHIPPED, WEIGHTS, is_run_of, load
from demo.checkpoints.tokenizer import ByteTokenizer, TextTokenizer
from demo.config.errors import ConfigError
from models.language_model import LanguageModel
from published_models import FLA, fla_weights, mamba2, write, write_state_spaces
from small_runs import write_checkpoint
from text_sets import byte_level

UNLIMITED = (0.0, float("inf"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder that transformers wrote, of bytes, and its model."""
    model = mamba2(vocab_size=256, time_step_limit=UNLIMITED)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("tokens", ["bytes", "tokenizer"])
@pytest.mark.parametrize("name", ["fla", "mamba2"])
@pytest.mark.parametrize("file", ["", WEIGHTS, CONFIG])
def test_a_run_is_what_was_saved_whichever_file_names_it(name, tokens, file, tmp_path):
    tokenizer = None if tokens == "bytes" else TextTokenizer(byte_level())
    model = write_checkpoint(tmp_path / "run", name, seed=7, tokenizer=tokenizer)
    loaded = load(str(tmp_path / "run" / file))
    assert (loaded.name, loaded.folder) == (name, tmp_path / "run")
    assert loaded.model.config.vocab_size == model.config.vocab_size == loaded.tokenizer.vocab_size
    ids = torch.tensor([loaded.tokenizer.encode(b"import os")])
    assert torch.equal(loaded.model(ids)[0], model(ids)[0])


@pytest.mark.parametrize("name", ["fla", "mamba2"])
def test_without_a_run_what_ships_which_0_1_0_wrote(name, tmp_path):
    loaded = load(model=name, runs_dir=tmp_path)
    assert (loaded.folder, loaded.name) == (SHIPPED / name, name)
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert "mlp_size" not in (SHIPPED / name / CONFIG).read_text()  # a newer field
    assert load(runs_dir=tmp_path).name == "fla"


def test_the_newest_run_of_the_model_without_reading_the_older_ones(tmp_path, monkeypatch):
    for age, (name, model) in enumerate([("d", "mamba2"), ("c", "fla"), ("b", "fla")]):
        write_checkpoint(tmp_path / name, model)
        os.utime(tmp_path / name / WEIGHTS, (10**9 - age, 10**9 - age))
    read = []
    monkeypatch.setattr(
        checkpoint, "is_run_of", lambda run, model: read.append(run.name) or is_run_of(run, model)
    )
    assert load(model="fla", runs_dir=tmp_path).folder == tmp_path / "c"
    assert read == ["d", "c"]
    (tmp_path / "c" / CONFIG).write_text("model: [")
    assert load(model="fla", runs_dir=tmp_path).folder == tmp_path / "b"


@pytest.mark.parametrize("path", ["inference", "training"])
def test_ready_for_what_its_norm_path_is_for(path, published, run_folder):
    for folder in (published[0], run_folder):
        model = load(folder, norm_path=path).model
        assert {m.path for m in model.modules() if hasattr(m, "path")} == {path}
        assert model.training == (path == "training")
        assert {p.requires_grad for p in model.parameters()} == {path == "training"}


@pytest.mark.parametrize(
    ("named", "taken"),
    [("", BEST), (CONFIG, BEST), (BEST, BEST), (WEIGHTS, WEIGHTS), ("last.ckpt", WEIGHTS)],
)
def test_the_best_weights_are_those_of_the_run(named, taken, tmp_path):
    models = {WEIGHTS: write_checkpoint(tmp_path / "run", "mamba2", seed=1)}
    models[BEST] = write_checkpoint(tmp_path / "other", "mamba2", seed=2)
    shutil.move(tmp_path / "other" / WEIGHTS, tmp_path / "run" / BEST)
    (tmp_path / "run" / "last.ckpt").touch()
    loaded = load(tmp_path / "run" / named)
    assert loaded.weights == taken
    assert torch.equal(loaded.model.embedding.weight, models[taken].embedding.weight)


def test_a_published_model(published):
    folder, theirs = published
    for named in (folder, str(folder), folder / WEIGHTS):
        loaded = load(named, "mamba2")
        assert (loaded.name, loaded.folder) == ("mamba2", folder)
        assert isinstance(loaded.tokenizer, ByteTokenizer)
    tokens = torch.tensor([loaded.tokenizer.encode(b"import sys")])
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(loaded.model(tokens)[0], expected, rtol=0, atol=1e-4)


def test_a_hub_id_is_downloaded(published, tmp_path, monkeypatch):
    """From a stand-in for the hub: the weights are asked for in safetensors first."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        shutil.copytree(published[0], tmp_path / "cache", dirs_exist_ok=True)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("owner/name", "mamba2").folder == tmp_path / "cache"
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert {"*.safetensors", "*.safetensors.index.json"} <= set(patterns)
    assert not any("bin" in pattern for pattern in patterns)


def test_state_spaces_models_use_the_tokenizer_of_their_project(tmp_path, monkeypatch):
    write_state_spaces(tmp_path, vocab_size=50277)
    tokenizers = {"EleutherAI/gpt-neox-20b": ByteTokenizer()}
    monkeypatch.setattr("demo.checkpoints.published.load_tokenizer", tokenizers.__getitem__)
    assert load(tmp_path).tokenizer is tokenizers["EleutherAI/gpt-neox-20b"]


def test_another_model_than_asked(published, tmp_path):
    write(tmp_path, FLA, fla_weights())
    for folder, asked, found in ((published[0], "fla", "mamba2"), (tmp_path, "mamba2", "fla")):
        with pytest.raises(ConfigError, match=rf"of model={asked}, got '.*' of model={found}"):
            load(folder, asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mamba"}, "model must be one of fla, mamba2, got 'mamba'"),
        ({"norm_path": "fast"}, "norm_path must be one of training, inference, got 'fast'"),
        ({"checkpoint": "a/b/c"}, "got 'a/b/c', which does not exist; name"),
        ({"checkpoint": "runs"}, r"got 'runs', with no config\.yaml in it; name a folder"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_names_no_checkpoint(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=message) as error:
        load(**arguments)
    assert "\n" not in str(error.value)


# Beside the cases of tests/helpers/mistakes.py.
WRONG_CONFIGS = {
    "control": ("model: \0", "it is not YAML"),
    "nested": ("[" * 1000, "it is not YAML"),
    "date": ("2020-99-99", "it holds a value that cannot be read: month must be in 1..12"),
    "empty": ("", "it has no model section whose name is one of fla, mamba2"),
    "no name": ("model: {name: [fla]}", "model.name must be one of fla, mamba2, got ['fla']"),
    "interpolated": (
        "model: {name: fla, hidden_size: '${x}'}",
        "model.hidden_size must be a whole",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_is_wrong_says_so_without_pythons_words(case, run_folder):
    text, message = WRONG_CONFIGS[case]
    (run_folder / CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"wrote it, but {message}")) as error:
        load(run_folder)
    assert re.search("Error|Exception|Config|`", str(error.value)) is None
    assert "\n" not in str(error.value)


def _shape(name, wanted, got):
    return WEIGHTS, re.escape(f"the shape of {name} must be {wanted}, got {got};")


ABSURD = (CONFIG, "sizes that no tensors can have")
OTHER_SIZES = {
    "hidden_size": (2_000_000, *_shape("embedding.weight", [256, 2_000_000], [256, 32])),
    "vocab_size": (10**12, *_shape("embedding.weight", [10**12, 32], [256, 32])),
    "bias": (True, *_shape("blocks.0.mixer.in_proj.bias", [196], "none")),
    "conv_bias": (False, *_shape("blocks.0.mixer.conv_bias", "none", [128])),
    "tie_embeddings": (False, *_shape("head.weight", [256, 32], "none")),
    "d_state": (10**30, *ABSURD),
    "expand": (10**18, *ABSURD),
    "mlp_ratio": (1e300, *ABSURD),
    "norm_groups": (7, CONFIG, "norm_groups must divide expand"),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_sizes_that_are_not_those_of_the_weights_need_no_memory(name, run_folder, monkeypatch):
    config = yaml.safe_load((run_folder / CONFIG).read_text())
    config["model"][name], wrong, message = OTHER_SIZES[name]
    (run_folder / CONFIG).write_text(yaml.safe_dump(config))
    devices = []

    def watched(*arguments, **keys):
        devices.append(torch.get_default_device().type)
        return LanguageModel(*arguments, **keys)

    for module in (checkpoint, weights):
        monkeypatch.setattr(module, "LanguageModel", watched)
    with pytest.raises(ConfigError, match=message) as error:
        load(run_folder)
    assert f"checkpoint file {str(run_folder / wrong)!r} must be whole" in str(error.value)
    assert set(devices) <= {"meta"}


def test_any_flipped_bit_is_found(run_folder):
    whole = (run_folder / WEIGHTS).read_bytes()
    generator = random.Random(0)
    for _ in range(40):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (run_folder / WEIGHTS).write_bytes(data)
        with pytest.raises(ConfigError):
            load(run_folder)

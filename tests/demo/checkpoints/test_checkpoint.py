"""checkpoint.load: a run, what ships, a published folder, a hub id; each with its tokenizer."""

import os
import random
import re
import shutil

import pytest
import torch
import yaml
from transformers import Mamba2Config, Mamba2ForCausalLM

from demo.checkpoints import checkpoint
from demo.checkpoints.checkpoint import (
    CONFIG,
    SHIPPED,
    WEIGHTS,
    find_checkpoint,
    is_of,
    load,
    load_model,
)
from demo.checkpoints.tokenizer import ByteTokenizer, TextTokenizer
from demo.config.errors import ConfigError
from models.generation import generate
from models.language_model import LanguageModel
from published_models import FLA, fla_weights, mamba2, train, write
from small_runs import write_checkpoint
from text_sets import byte_level


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder that transformers wrote, of bytes, and its model."""
    torch.manual_seed(0)
    sizes = {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "state_size": 16}
    config = Mamba2Config(vocab_size=256, num_hidden_layers=2, n_groups=2, chunk_size=32, **sizes)
    model = Mamba2ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("tokens", ["bytes", "tokenizer"])
@pytest.mark.parametrize("name", ["fla", "mamba2"])
def test_a_run_with_its_tokenizer_and_vocabulary(name, tokens, tmp_path):
    tokenizer = None if tokens == "bytes" else TextTokenizer(byte_level())
    model = write_checkpoint(tmp_path / "run", name, tokenizer=tokenizer)
    loaded = load(tmp_path / "run")
    assert (loaded.name, loaded.folder) == (name, tmp_path / "run")
    assert loaded.model.config.vocab_size == model.config.vocab_size == loaded.tokenizer.vocab_size
    ids = torch.tensor([loaded.tokenizer.encode(b"import os")])
    assert torch.equal(loaded.model(ids)[0], model(ids)[0])


def test_the_newest_run_else_what_ships(tmp_path):
    assert load(runs_dir=tmp_path).folder == SHIPPED / "fla"
    shipped = load(model="mamba2", runs_dir=tmp_path)
    assert (shipped.folder, shipped.name) == (SHIPPED / "mamba2", "mamba2")
    assert isinstance(shipped.tokenizer, ByteTokenizer)
    write_checkpoint(tmp_path / "a", "mamba2")
    assert load(model="mamba2", runs_dir=tmp_path).folder == tmp_path / "a"


@pytest.mark.parametrize("path", ["inference", "training"])
def test_ready_for_what_its_norm_path_is_for(path, published, tmp_path):
    write_checkpoint(tmp_path / "run", "mamba2")
    for folder in (published[0], tmp_path / "run"):
        model = load(folder, norm_path=path).model
        assert (model.norm_path, model.training) == (path, path == "training")
        assert {p.requires_grad for p in model.parameters()} == {path == "training"}


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


@pytest.mark.slow
def test_a_published_model_with_its_tokenizer(tmp_path):
    """The same text from ours and from transformers' generate, for a model that was trained."""
    theirs = train(mamba2(time_step_limit=(0.0, float("inf"))).train(), 100)
    tokenizer = TextTokenizer(byte_level())
    theirs.resize_token_embeddings(tokenizer.vocab_size + 5)  # padded, as published models are
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    prompt = torch.tensor([loaded.tokenizer.encode(b"def f(x):")])
    expected = theirs.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    tokens = torch.cat(list(generate(loaded.model, prompt, 20, temperature=0)))
    text = tokenizer.tokenizer.decode(expected[0, prompt.shape[1] :].tolist())
    assert loaded.tokenizer.decode(tokens.tolist()) == text


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
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern for pattern in patterns)


def test_state_spaces_models_use_the_tokenizer_of_their_project(tmp_path, monkeypatch):
    from published_models import write_state_spaces

    write_state_spaces(tmp_path, vocab_size=50277)
    monkeypatch.setattr(
        "demo.checkpoints.published.load_tokenizer", lambda name: asked.append(name) or BYTES
    )
    asked, BYTES = [], ByteTokenizer()
    assert load(tmp_path).tokenizer is BYTES
    assert asked == ["EleutherAI/gpt-neox-20b"]


def truncated(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


BAD = {
    "truncated": (truncated, r"model\.safetensors cannot be read"),
    "no_weights": (without(WEIGHTS), r"must hold one of model\.safetensors"),
    "no_config": (
        without("config.json"),
        r"a published model's folder with config\.json, or a hub id",
    ),
    "not_json": (text("config.json", "{"), "cannot be read as JSON"),
    "other_model": (text("config.json", '{"model_type": "llama"}'), "got model_type='llama'"),
    "no_sizes": (text("config.json", '{"model_type": "mamba2"}'), "lacks 'num_heads'"),
    "damaged_tokenizer": (text("tokenizer.json", "{}"), r"tokenizer\.json' must be a file of"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_published_folder_that_cannot_be_read(case, published, tmp_path):
    change, message = BAD[case]
    shutil.copytree(published[0], tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_another_model_than_asked(published, tmp_path):
    write_checkpoint(tmp_path / "run", "fla")
    write(tmp_path, {**FLA, "vocab_size": 50}, fla_weights())
    for folder, asked, found in (
        (published[0], "fla", "mamba2"),
        (tmp_path, "mamba2", "fla"),
        (tmp_path / "run", "mamba2", "fla"),
    ):
        with pytest.raises(ConfigError, match=rf"of model={asked}, got '.*' of model={found}"):
            load(folder, asked)


def test_a_vocabulary_that_is_not_of_bytes_needs_a_tokenizer(tmp_path):
    write(tmp_path, FLA, fla_weights())
    with pytest.raises(ConfigError, match="has a vocabulary of 50 and not the 256 bytes"):
        load(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(published, tmp_path):
    shutil.copytree(published[0], tmp_path / "copy")
    TextTokenizer(byte_level()).save(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"at most the model's 256 tokens, got 2\d\d"):
        load(tmp_path / "copy")


WRONG_CONFIGS = {
    "tag": ("model: !!python/name:os.mkdir x", "its line 1 asks for more than plain values"),
    "cut": ("seed: 1\nmodel: {name: fla", "its line 2 is not YAML, or what it begins has no end"),
    "control": ("model: \0", "it is not YAML"),
    "date": ("2020-99-99", "it has no model section whose name is one of fla, mamba2"),
    "nested": ("[" * 5000, "it has no model section"),
    "empty": ("", "it has no model section"),
    "other": ("model: {name: rwkv}", "model.name must be one of fla, mamba2, got 'rwkv'"),
    "lacks": ("model: {name: fla}", "model.hidden_size must have a value, got none"),
    "unknown": ("model: {name: fla, depth: 2}", "there is no key 'model.depth'"),
    "word": (
        "model: {name: fla, hidden_size: wide}",
        "model.hidden_size must be a whole number",
    ),
    "interpolated": (
        "model: {name: fla, hidden_size: '${x}'}",
        "model.hidden_size must be a whole",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_is_wrong_says_so_without_pythons_words(case, tmp_path):
    text, message = WRONG_CONFIGS[case]
    write_checkpoint(tmp_path / "run", "mamba2")
    (tmp_path / "run" / CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"wrote it, but {message}")) as error:
        load(tmp_path / "run")
    assert re.search("Error|Exception|Config|`", str(error.value)) is None
    assert "\n" not in str(error.value)


ABSURD = {
    "hidden_size": (
        2_000_000,
        r"its embedding\.weight has shape \[256, 32\] and not \[256, 2000000\]",
    ),
    "vocab_size": (
        10**12,
        r"its embedding\.weight has shape \[256, 32\] and not \[1000000000000, 32\]",
    ),
    "d_state": (10**30, "no tensors have sizes as large as those asked for"),
    "num_layers": (10**9, r"it has too few tensors \(\d+\) for num_layers=1000000000"),
    "expand": (10**18, "no tensors have sizes as large as those asked for"),
    "mlp_ratio": (1e300, "no tensors have sizes as large as those asked for"),
    "bias": (True, r"it has no blocks\.0\.mixer\.in_proj\.bias"),
    "conv_bias": (False, r"the blocks\.0\.mixer\.conv_bias that it has is not asked for"),
    "tie_embeddings": (False, r"it has no head\.weight"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_sizes_that_are_not_those_of_the_weights_are_found_on_the_meta_device(
    name, tmp_path, monkeypatch
):
    """No model is built where it would need memory."""
    write_checkpoint(tmp_path / "run", "mamba2")
    file = tmp_path / "run" / CONFIG
    config = yaml.safe_load(file.read_text())
    config["model"][name], message = ABSURD[name]
    file.write_text(yaml.safe_dump(config))
    devices = []

    def watched(*arguments, **keys):
        devices.append(torch.get_default_device().type)
        return LanguageModel(*arguments, **keys)

    monkeypatch.setattr("demo.checkpoints.checkpoint.LanguageModel", watched)
    with pytest.raises(ConfigError, match=rf"those of the config\.yaml beside it: {message}"):
        load(tmp_path / "run")
    assert set(devices) <= {"meta"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 0, "model.num_layers must be at least 1, got 0"),
        ("norm_groups", 7, "its model section is wrong: norm_groups must divide expand"),
    ],
)
def test_sizes_that_no_model_has_are_the_configs_fault(name, value, message, tmp_path):
    write_checkpoint(tmp_path / "run", "mamba2")
    file = tmp_path / "run" / CONFIG
    config = yaml.safe_load(file.read_text())
    config["model"][name] = value
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "run")
    assert str(error.value).startswith(f"checkpoint file {str(file)!r} must be whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "mamba"}, "model must be one of fla, mamba2, got 'mamba'"),
        ({"norm_path": "fast"}, "norm_path must be one of training, inference, got 'fast'"),
    ],
    ids=["model", "norm_path"],
)
def test_a_name_that_load_does_not_know(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(**arguments)


@pytest.mark.parametrize("name", ["broken.ckpt", "weights.pt"])
def test_a_file_that_is_no_checkpoint(name, tmp_path):
    (tmp_path / name).write_bytes(b"broken")
    message = rf"a run folder with .*, got '.*{name}', a file that lies in no such folder; name"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["missing", "runs/missing", "a/b/c"])
def test_a_name_that_is_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=f"checkpoint must be a run folder.*got '{name}'"):
        load(name)


def test_the_norm_path_is_set_in_every_norm(run_folder):
    for path in ("inference", "training"):
        model = load_model(run_folder, path)
        assert {m.path for m in model.modules() if hasattr(m, "path")} == {path}


def test_the_newest_run_of_the_model_is_taken(tmp_path):
    for age, (name, model) in enumerate([("c", "fla"), ("b", "mamba2"), ("a", "fla")]):
        write_checkpoint(tmp_path / name, model)
        os.utime(tmp_path / name / WEIGHTS, (10**9 - age, 10**9 - age))
    assert find_checkpoint("fla", None, str(tmp_path)) == tmp_path / "c"
    assert find_checkpoint("mamba2", None, str(tmp_path)) == tmp_path / "b"
    (tmp_path / "c" / CONFIG).write_text("model: [")
    assert find_checkpoint("fla", None, str(tmp_path)) == tmp_path / "a"


def test_the_newest_run_is_found_without_reading_the_older_ones(tmp_path, monkeypatch):
    for age, model in enumerate(["mamba2", "fla", "fla", "fla"]):
        write_checkpoint(tmp_path / str(age), model)
        os.utime(tmp_path / str(age) / WEIGHTS, (10**9 - age, 10**9 - age))
    asked = []
    monkeypatch.setattr(
        checkpoint, "is_of", lambda folder, model: asked.append(folder.name) or is_of(folder, model)
    )
    assert find_checkpoint("fla", None, str(tmp_path)) == tmp_path / "1"
    assert asked == ["0", "1"]


@pytest.mark.parametrize("name", ["", WEIGHTS, CONFIG])
def test_a_checkpoint_is_named_by_its_folder_or_a_file_in_it(name, run_folder):
    assert find_checkpoint(None, str(run_folder / name), "runs") == run_folder


def test_a_saved_model_is_the_model(tmp_path):
    model = write_checkpoint(tmp_path / "run", "fla", seed=7)
    loaded = load_model(tmp_path / "run")
    tokens = torch.arange(60)[None]
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert not loaded.training


def test_any_flipped_bit_is_found(run_folder):
    whole = (run_folder / WEIGHTS).read_bytes()
    generator = random.Random(0)
    for _ in range(40):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (run_folder / WEIGHTS).write_bytes(data)
        with pytest.raises(ConfigError):
            load_model(run_folder)

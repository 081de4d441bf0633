"""Every file in configs/ composes, and every mistake is answered with one line before any work."""

import itertools
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gatednorm
import train
from demo.checkpoints.checkpoint import build_model
from demo.config import schema
from demo.config.command import CONFIG_DIR, command, compose
from demo.config.schema import (
    MODELS,
    NORM_PATHS,
    ConfigError,
    DataConfig,
    InferConfig,
    NormConfig,
    OptimConfig,
    TrainConfig,
    TrainerConfig,
    model_name,
)
from models.config import GatedDeltaNetConfig, Mamba2Config

ROOT = CONFIG_DIR.parent


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def run_command(name: str, arguments: list[str], monkeypatch, **keys) -> object:
    """The config that `name`.py would get from this command line."""
    seen = []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    command(name, **keys)(seen.append)()
    return seen[0]


@pytest.mark.parametrize(
    ("model", "data", "trainer"),
    list(itertools.product(options("model"), options("data"), options("trainer"))),
)
def test_every_option_composes(model, data, trainer):
    needed = {"text": ["data.path=notes/"], "hub": ["data.name=owner/name"]}.get(data, [])
    config = compose("train", [f"model={model}", f"data={data}", f"trainer={trainer}", *needed])
    assert type(config.model) is MODELS[model]
    assert config.data.source == data
    assert config.trainer.accelerator == (trainer if trainer in ("cpu", "gpu") else "auto")
    assert config.norm.path == "training"


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("model", options("model"))
def test_every_experiment_composes(model, experiment):
    config = compose("train", [f"model={model}", f"experiment={experiment}"])
    assert model_name(config.model) == model
    assert config != compose("train", [f"model={model}"])


@pytest.mark.parametrize("size", options("size"))
def test_every_size_fits_its_model(size):
    model, _, _ = size.partition("_")
    config = compose("train", [f"model={model}", f"size={size}"])
    with torch.device("meta"):
        parameters = build_model(config.model, "training").num_parameters()
    expected = {"small": 0.5e6, "1m": 1.1e6, "170m": 170e6}[size.partition("_")[2]]
    assert 0.9 < parameters / expected < 1.15


def test_a_sweep_may_ask_for_all_options_of_a_group(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "model=glob(*)"])
    seen = []
    command("train")(lambda config: seen.append(model_name(config.model)))()
    assert seen == ["fla", "mamba2"]


@pytest.mark.parametrize("norm", options("norm"))
def test_inference_takes_either_norm_path(norm):
    assert compose("infer", [f"norm={norm}"]).norm.path == norm
    assert compose("infer").norm.path == "inference"


def test_types_are_those_of_the_schema():
    config = compose("train", ["optim.learning_rate=1", "model.num_v_heads=4"])
    assert isinstance(config.optim.learning_rate, float)
    assert config.model.num_v_heads == 4
    assert config.model.mixer_args() == {
        "num_heads": 2,
        "head_dim": 64,
        "expand_v": 2.0,
        "num_v_heads": 4,
        "conv_size": 4,
        "conv_bias": False,
        "use_gate": True,
        "gate_activation": "silu",
        "allow_neg_eigval": False,
    }


DOCUMENTED = {
    GatedDeltaNetConfig: ["model/fla.yaml"],
    Mamba2Config: ["model/mamba2.yaml"],
    NormConfig: ["norm/training.yaml", "norm/inference.yaml"],
    DataConfig: ["data/stdlib.yaml", "data/text.yaml", "data/hub.yaml"],
    OptimConfig: ["optim/base.yaml"],
    TrainerConfig: ["trainer/auto.yaml"],
    TrainConfig: ["train.yaml"],
    InferConfig: ["infer.yaml"],
}


@pytest.mark.parametrize("kind", DOCUMENTED, ids=lambda kind: kind.__name__)
def test_every_value_is_explained_where_its_default_stands(kind):
    lines = [
        line
        for name in DOCUMENTED[kind]
        for line in (CONFIG_DIR / name).read_text(encoding="utf-8").splitlines()
    ]
    explained = {line.split(":")[0] for line in lines if re.match(r"\w+: .*# \w", line)}
    # The sections of train.yaml and infer.yaml are groups with files of their own.
    groups = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}
    groups -= {"model"} if kind is InferConfig else set()
    assert set(kind.__dataclass_fields__) - groups <= explained


def test_what_infer_does_not_read_has_the_default_of_its_yaml():
    config = compose("infer")
    unread = schema.UNMEASURED | schema.MEASURES
    assert unread == {key: getattr(config, key) for key in unread}


def test_the_norm_paths_are_the_librarys():
    """Written twice, so that --help need not import torch."""
    assert NORM_PATHS == gatednorm.NORM_PATHS


def test_a_config_error_of_the_main_function_is_one_line(monkeypatch, capsys):
    def main(config):
        raise ConfigError("a\n   b")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        command("train")(main)()
    assert capsys.readouterr().err == "train.py: error: a b\n"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("import ", "import "),
        ("'import '", "import "),
        ('"import "', "import "),
        ("def f(a, b=1): # c=${d}", "def f(a, b=1): # c=${d}"),
        ("it's", "it's"),
        ("'it\\'s'", "it's"),
        ("'a' + 'b'", "'a' + 'b'"),
        ("'", "'"),
        ("123", "123"),
        ("null", "null"),
        ("a\nb\n", "a\nb\n"),
        ("[1, 2", "[1, 2"),
        ("\\", "\\"),
        ("$x", "$x"),
        ("\u00e9\U0001f600", "\u00e9\U0001f600"),
    ],
)
def test_a_prompt_is_taken_as_it_stands(given, taken, monkeypatch):
    config = run_command("infer", [f"prompt={given}"], monkeypatch, texts=("prompt",))
    assert config.prompt == taken


@pytest.mark.parametrize("path", ["a (1).txt", "b,c", "d=e", "f[1]", "null", "'null'"])
def test_a_path_is_taken_as_it_stands(path, monkeypatch):
    config = run_command("train", [f"data.path={path}"], monkeypatch, names=("data.path",))
    assert config.data.path == {"null": None, "'null'": "null"}.get(path, path)


def written_commands() -> list[str]:
    """What the manual says to type after train.py, but for several runs at once."""
    texts = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md")
    ]
    blocks = [text for whole in texts for text in whole.split("```sh\n")[1:]]
    lines = "\n".join(block.partition("```")[0] for block in blocks).replace("\\\n", " ")
    lines = [line for line in lines.splitlines() if "train.py" in line and "infer.py" not in line]
    found = [line.partition("train.py")[2].strip() for line in lines]
    return [arguments for arguments in found if arguments[:2] != "-m" and "&&" not in arguments]


@pytest.mark.parametrize("arguments", written_commands())
def test_what_the_manual_says_composes(arguments, monkeypatch):
    typed = shlex.split(arguments, comments=True)
    if "--help" not in typed:
        assert run_command("train", typed, monkeypatch, names=train.NAMES).seed == 1


@pytest.mark.parametrize("script", ["train", "infer"])
def test_help_reads_like_a_manual_and_comes_at_once(script, tmp_path):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - began < 10  # 0.5 s on a quiet machine
    for word in (f"python {script}.py", "norm: inference, training", "seed: 1"):
        assert word in done.stdout
    assert done.stderr == ""
    assert list(Path(tmp_path).iterdir()) == []


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path):
    code = (
        "import sys, train, infer\n"
        "heavy = {'torch', 'lightning', 'datasets', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""Every file of configs/ composes, and a command line is read as it was meant."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import gatednorm
from demo.config import schema
from demo.config.errors import ConfigError
from demo.config.overrides import CONFIG_DIR, compose, compose_values, groups, jobs
from demo.config.schema import MODELS, model_name, train_config
from models.config import GatedDeltaNetConfig, Mamba2Config
from models.language_model import LanguageModel

OPTIONS = [(group, option) for group, options in groups("train").items() for option in options]
NEEDED = {"text": ["data.path=notes/"], "hub": ["data.name=owner/name"]}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_with_either_model(model, group, option):
    if group == "size":
        model = option.partition("_")[0]
    overrides = [f"model={model}", f"{group}={option}", *NEEDED.get(option, [])]
    if option == "inference":
        with pytest.raises(ConfigError, match="needs norm=training"):
            compose("train", overrides)
        return
    config = compose("train", overrides)
    assert type(config.model) is MODELS[option if group == "model" else model]
    assert config.data.source == (option if group == "data" else "stdlib")
    assert config.trainer.accelerator == {"cpu": "cpu", "gpu": "gpu"}.get(
        option, "gpu" if option in ("single_gpu", "multi_gpu") else "auto"
    )
    if group == "experiment":
        assert config != compose("train", [f"model={model}"])


@pytest.mark.parametrize("size", groups("train")["size"])
def test_every_size_fits_its_model(size):
    model, _, name = size.partition("_")
    config = compose("train", [f"model={model}", f"size={size}"])
    with torch.device("meta"):
        parameters = LanguageModel(config.model).num_parameters()
    assert 0.9 < parameters / {"small": 0.5e6, "1m": 1.1e6, "170m": 170e6}[name] < 1.15


def test_experiments_can_be_combined():
    config = compose("train", ["experiment=[ten_minutes,smoke]"])
    assert (config.model.num_heads, config.model.num_layers, config.optim.steps) == (3, 2, 20)


@pytest.mark.parametrize("norm", groups("infer")["norm"])
def test_inference_takes_either_norm_path(norm):
    assert compose("infer", [f"norm={norm}"]).norm.path == norm
    assert compose("infer").norm.path == "inference"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.learning_rate=1", 1.0),
        ("optim.learning_rate=5e-3", 0.005),
        ("optim.betas=[0, 0.5]", (0.0, 0.5)),
        ("optim.steps='7'", 7),
        ("optim.warmup_steps=null", None),
        ("+model.num_v_heads=4", 4),
        ("model.gate_activation=sigmoid", "sigmoid"),
        ("trainer.compile=true", True),
        ("trainer.compile=off", False),
        ("data.split=train[:10%]", "train[:10%]"),
    ],
)
def test_a_value_has_the_type_of_its_field(override, value):
    section, _, name = override.partition("=")[0].lstrip("+").partition(".")
    needed = ["data=hub", "data.name=owner/name"] if section == "data" else []
    found = getattr(getattr(compose("train", [*needed, override]), section), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("section", "given", "says"),
    [
        ("optim", 5, "optim must have keys of its own, got 5"),
        ("model", None, "model must have keys of its own, got null"),
        ("optics", {}, "there is no key 'optics'; did you mean optim?"),
        ("seed", True, "seed must be a whole number, got true; give one, or leave it out"),
        ("runs_dir", ["a"], r"runs_dir must be a text of at least one character, got \['a'\]"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(section, given, says):
    with pytest.raises(ConfigError, match=says) as error:
        train_config(compose_values("train", []).values | {section: given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.weight_decay=1" + "0" * 400, "optim.weight_decay must be a number, got 1000"),
        ("optim.betas=0.9", "optim.betas must be a list, each a number, got 0.9"),
        ("optim.betas.x=1", "there is no key 'optim.betas.x'"),
        ("model@x=fla", "there is no key 'model@x'"),
        (
            "optim.steps=0",
            "optim.steps must be at least 1 and below 2147483648, got 0; use a value",
        ),
        ("trainer.devices=true", "trainer.devices must be a whole number, got true"),
        ("model.num_heads=2.0", "model.num_heads must be a whole number, got 2.0"),
        ("model.gate_activation=tanh", "model.gate_activation must be one of silu, sigmoid, got"),
        ("model.name=mamba", "model.name must be one of fla, mamba2, got 'mamba'; did you mean m"),
    ],
)
def test_a_value_that_its_field_does_not_take_is_refused(override, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        compose("train", [override])


def test_a_config_says_which_keys_and_groups_were_typed():
    config = compose("train", ["seed=1", "model=fla", "+data.path=null"])
    assert config.typed == {"seed", "model", "data.path"}
    assert config == compose("train")


def test_a_config_of_version_0_1_0_is_read():
    values = compose_values("train", ["model=mamba2"]).values
    del values["model"]["mlp_size"], values["checkpoint"], values["tokenizer"]
    assert train_config(values) == compose("train", ["model=mamba2"])


def test_a_multirun_has_a_job_for_each_combination():
    assert jobs("train", ["model=fla,mamba2", "seed=range(1,3)", "tokenizer=a (1).json"]) == [
        [f"model={model}", f"seed={seed}", "tokenizer=a (1).json"]
        for model in ("fla", "mamba2")
        for seed in (1, 2)
    ]
    assert jobs("train", ["model=glob(*)"]) == [["model=fla"], ["model=mamba2"]]
    assert jobs("train", ["data.path='a,b',c"]) == [["data.path='a,b'"], ["data.path=c"]]
    assert compose("train", ["data.path='a,b'"]).data.path == "a,b"
    assert jobs("infer", ["prompt=a,b", "stop=,"]) == [["prompt=a,b", "stop=,"]]
    with pytest.raises(ConfigError, match=r"-m cannot try all values of 'seed=interval\(1,2\)'"):
        jobs("train", ["seed=interval(1,2)"])


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
        ("???", "???"),
        ("a\nb\n", "a\nb\n"),
        ("[1, 2", "[1, 2"),
        ("\\", "\\"),
        ("$x", "$x"),
        ("\u00e9\U0001f600", "\u00e9\U0001f600"),
    ],
)
def test_a_prompt_is_taken_as_it_stands(given, taken):
    assert compose("infer", [f"prompt={given}"]).prompt == taken


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("a b, c", ["a b, c"]),
        ("\n\n", ["\n\n"]),
        ('["\\n", "x y"]', ["\n", "x y"]),
        ("'def '", ["def "]),
        ("]", ["]"]),
        ("[]", []),
    ],
)
def test_stop_strings_are_taken_as_they_stand_or_as_json(given, taken):
    assert compose("infer", [f"stop={given}"]).stop == taken


@pytest.mark.parametrize("path", ["a (1).txt", "b,c", "d=e", "f[1]", "${g}", "null", "'null'"])
def test_a_path_is_taken_as_it_stands(path):
    expected = {"null": None, "'null'": "null"}.get(path, path)
    assert compose("train", [f"data.path={path}"]).data.path == expected


def written_commands() -> list[str]:
    """What the documents say to type after train.py."""
    texts = [
        (CONFIG_DIR.parent / name).read_text(encoding="utf-8")
        for name in ("README.md", "docs/training.md")
    ]
    blocks = [text.partition("```")[0] for whole in texts for text in whole.split("```sh\n")[1:]]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.partition("train.py ")[2] for line in lines if "infer.py" not in line]
    return [arguments for arguments in found if arguments and "&&" not in arguments]


@pytest.mark.parametrize("arguments", written_commands())
def test_what_the_documents_say_composes(arguments):
    typed = shlex.split(arguments, comments=True)
    overrides = [argument for argument in typed if not argument.startswith("-")]
    assert all(compose("train", job).typed for job in jobs("train", overrides) if job)


DOCUMENTED = {
    GatedDeltaNetConfig: ["model/fla.yaml"],
    Mamba2Config: ["model/mamba2.yaml"],
    schema.NormConfig: ["norm/training.yaml", "norm/inference.yaml"],
    schema.DataConfig: ["data/stdlib.yaml", "data/text.yaml", "data/hub.yaml"],
    schema.OptimConfig: ["optim/base.yaml"],
    schema.TrainerConfig: ["trainer/auto.yaml"],
    schema.TrainConfig: ["train.yaml"],
    schema.InferConfig: ["infer.yaml"],
}


@pytest.mark.parametrize("kind", DOCUMENTED, ids=lambda kind: kind.__name__)
def test_every_value_is_explained_where_its_default_stands(kind):
    texts = [Path(CONFIG_DIR, name).read_text(encoding="utf-8") for name in DOCUMENTED[kind]]
    explained = set(re.findall(r"^(\w+): .*# \w", "\n".join(texts), re.MULTILINE))
    # The sections of train.yaml and infer.yaml are groups with files of their own.
    sections = set(groups("infer" if kind is schema.InferConfig else "train"))
    assert set(kind.__dataclass_fields__) - sections <= explained


def test_what_infer_does_not_read_has_the_default_of_its_yaml():
    config = compose("infer")
    unread = schema.UNMEASURED | schema.MEASURES
    assert unread == {key: getattr(config, key) for key in unread}


def test_what_is_written_twice_is_the_same():
    """So that --help need not import torch."""
    assert schema.NORM_PATHS == gatednorm.NORM_PATHS
    assert model_name(compose("train", ["model=mamba2"]).model) == "mamba2"

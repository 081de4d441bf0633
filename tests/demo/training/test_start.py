"""A new run that begins with the weights, sizes and tokenizer of a checkpoint."""

import sys

import pytest
import torch

import train
from demo.checkpoints.checkpoint import SHIPPED, load, read_model_config
from demo.config.command import compose
from demo.config.errors import ConfigError
from published_models import FLA, fla_forward, fla_weights, train_weights, write
from small_runs import FEW_STEPS, train_in


def test_training_starts_from_a_checkpoint_with_its_sizes(undisturbed, tmp_path):
    more = ["model=mamba2", "data.val_tokens=2000", f"checkpoint={undisturbed.run}"]
    summary = train_in(tmp_path, *FEW_STEPS, *more)
    assert summary.before == undisturbed.after
    assert summary.after != undisturbed.after
    assert load(summary.run).model.config == undisturbed.model.config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.hidden_size=64"], "model.hidden_size must be as in the checkpoint, 32, got 64"),
        (["model.mlp_ratio=2"], "model.mlp_ratio must be as in the checkpoint, 0.0, got 2.0"),
        (["model=fla"], "checkpoint must be of model=fla"),
        (["tokenizer=words"], "tokenizer must be left out"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_one_line(
    overrides, says, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [f"checkpoint={undisturbed.run}", *overrides]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activation", ["sigmoid", "swish"])
def test_a_published_gate_is_the_same_after_training_and_reading_again(activation, tmp_path):
    """Against flash-linear-attention's model in plain torch, with the weights that were saved."""
    config = {**FLA, "vocab_size": 256, "intermediate_size": 256}
    config["output_gate_activation"] = activation
    write(tmp_path, config, fla_weights(config))
    model = load(train_in(tmp_path / "runs", *FEW_STEPS, f"checkpoint={tmp_path}").run).model
    weights = train_weights(lambda new: new.load_state_dict(model.state_dict()), config)
    tokens = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        expected = fla_forward(weights, tokens, config)
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_config_without_the_key_has_a_silu_gate():
    text = (SHIPPED / "fla" / "config.yaml").read_text()
    assert "gate_activation" not in text
    assert read_model_config(SHIPPED / "fla").gate_activation == "silu"


def test_an_activation_that_the_gate_does_not_have():
    with pytest.raises(ConfigError, match=r"model\.gate_activation must be one of silu, sigmoid"):
        compose("train", ["model=fla", "model.gate_activation=tanh"])

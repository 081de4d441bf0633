"""What train.py starts from keeps its meaning when it is saved and read again."""

import pytest
import torch

import train
from demo.checkpoints.checkpoint import SHIPPED, load, read_model_config
from demo.config.command import compose
from demo.config.errors import ConfigError
from published_models import FLA, fla_forward, fla_weights, train_weights, write
from small_runs import FEW_STEPS


@pytest.mark.parametrize("activation", ["sigmoid", "swish"])
def test_a_published_gate_is_the_same_after_training_and_reading_again(activation, tmp_path):
    """Against flash-linear-attention's model in plain torch, with the weights that were saved."""
    config = {**FLA, "vocab_size": 256, "intermediate_size": 256}
    config["output_gate_activation"] = activation
    write(tmp_path, config, fla_weights(config))
    summary = train.train(
        compose("train", [*FEW_STEPS, f"checkpoint={tmp_path}", f"runs_dir={tmp_path / 'runs'}"])
    )
    model = load(summary.run).model
    weights = train_weights(lambda new: new.load_state_dict(model.state_dict()), config)
    tokens = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        expected = fla_forward(weights, tokens, config)
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_config_without_the_key_has_a_silu_gate(tmp_path):
    text = (SHIPPED / "fla" / "config.yaml").read_text()
    assert "gate_activation" not in text
    assert read_model_config(SHIPPED / "fla").gate_activation == "silu"


def test_an_activation_that_the_gate_does_not_have():
    with pytest.raises(ConfigError, match=r"model\.gate_activation must be one of silu, sigmoid"):
        compose("train", ["model=fla", "model.gate_activation=tanh"])

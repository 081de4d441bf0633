"""A new run that begins with the weights, sizes and tokenizer of a checkpoint."""

import pytest
import torch

from demo.checkpoints.checkpoint import SHIPPED, load, read_model_config
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
    ("override", "says"),
    [
        ("model.hidden_size=64", "model.hidden_size must be as in the checkpoint, 32, got 64"),
        ("model.mlp_ratio=2", "model.mlp_ratio must be as in the checkpoint, 0.0, got 2.0"),
        ("model=fla", "checkpoint must be of model=fla"),
        ("tokenizer=words", "tokenizer must be left out"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_one_error(override, says, run_folder, tmp_path):
    with pytest.raises(ConfigError, match=says) as error:
        train_in(tmp_path / "new", f"checkpoint={run_folder}", override)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


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

"""What a run starts from: new weights, those of a checkpoint, or those of a stopped run."""

from dataclasses import replace

import torch

from configs.schema import (
    ConfigError,
    FlaConfig,
    Mamba2Config,
    ModelConfig,
    TrainConfig,
    about,
    as_written,
)
from models.checkpoints.checkpoint import build_model, load
from models.checkpoints.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from models.language_model import LanguageModel
from models.training.memory import check_model
from models.training.processes import Processes
from models.training.resume import Stopped, asked_for


def start_model(
    config: TrainConfig, stopped: Stopped | None, processes: Processes
) -> tuple[TrainConfig, LanguageModel, Tokenizer]:
    """The model and the tokenizer to train with, and the config with the sizes that they have.
    Raises ConfigError."""
    model = None
    if stopped and stopped.checkpoint:  # the weights come with the optimiser
        with about("tokenizer"):
            tokenizer = tokenizer_of(stopped.run)
    elif config.checkpoint is not None:
        config, model, tokenizer = _from_checkpoint(config)
    else:
        with about("tokenizer"):
            tokenizer = load_tokenizer(config.tokenizer)
        vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    check_model(config, processes)
    if model is None:
        model = build_model(config.model, "training")
    return config, model, tokenizer


def _from_checkpoint(config: TrainConfig) -> tuple[TrainConfig, LanguageModel, Tokenizer]:
    asked = asked_for(config)
    if config.tokenizer != "bytes":
        raise ConfigError(
            f"tokenizer must be left out with checkpoint={config.checkpoint}, which brings its "
            f"own, got {config.tokenizer!r}; leave out one of them"
        )
    name = config.model.name if "model.name" in asked else None
    loaded = load(config.checkpoint, name, norm_path="training", runs_dir=config.runs_dir)
    model = describe(loaded.model)
    for key in asked:
        section, _, field = key.partition(".")
        if section == "model" and asked[key] != getattr(model, field, None):
            raise ConfigError(
                f"{key} must be as in the checkpoint, {as_written(getattr(model, field, None))}, "
                f"got {as_written(asked[key])}; leave it out, or leave out "
                f"checkpoint={config.checkpoint}"
            )
    return replace(config, model=model), loaded.model, loaded.tokenizer


def describe(model: LanguageModel) -> ModelConfig:
    """The config that `build_model` makes the same model from. Raises ConfigError where there is
    none."""
    mixer = model.blocks[0].mixer
    shared = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_layers": len(model.blocks),
        "mlp_ratio": 0.0,
        "tie_embeddings": model.head.weight is model.embedding.weight,
        "norm_eps": model.norm.eps,
        "head_dim": mixer.head_dim,
        "conv_size": mixer.conv_weight.shape[1],
        "conv_bias": mixer.conv_bias is not None,
    }
    if model.blocks[0].mlp is not None:
        shared["mlp_ratio"] = 1.5 * model.blocks[0].mlp.out_proj.in_features / model.hidden_size
    if model.mixer_name == "mamba2":
        groups = mixer.inner_size // (mixer.norm.group_size or mixer.inner_size)
        config: ModelConfig = Mamba2Config(
            name="mamba2",
            d_state=mixer.d_state,
            expand=mixer.inner_size // model.hidden_size,
            n_groups=mixer.n_groups,
            norm_groups=None if groups == mixer.n_groups else groups,
            bias=mixer.in_proj.bias is not None,
            dt_limit=list(mixer.dt_limit),
            **shared,
        )
    else:
        same = mixer.num_v_heads == mixer.num_heads
        config = FlaConfig(
            name="fla",
            num_heads=mixer.num_heads,
            expand_v=mixer.v_head_dim / mixer.head_dim,
            num_v_heads=None if same else mixer.num_v_heads,
            use_gate=mixer.use_gate,
            gate_activation="silu" if mixer.norm.activation == "swish" else mixer.norm.activation,
            allow_neg_eigval=mixer.allow_neg_eigval,
            **shared,
        )
    with torch.device("meta"):
        again = build_model(config, "training").state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in again.items()} != shapes:
        raise ConfigError(
            f"checkpoint must be of a model that configs/model/{config.name}.yaml can describe, "
            "got one whose sizes it cannot; start from another one"
        )
    return config

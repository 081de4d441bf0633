"""What a run starts from: new weights, those of a checkpoint, or those of a stopped run."""

from dataclasses import replace

from demo.checkpoints.checkpoint import build_model, load
from demo.checkpoints.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from demo.config.errors import ConfigError, about
from demo.config.schema import TrainConfig, model_name
from demo.training.memory import check_model
from demo.training.processes import Processes
from demo.training.resume import Stopped, asked_for
from models.language_model import LanguageModel
from models.ranges import as_written


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
    name = model_name(config.model) if "model.name" in asked else None
    loaded = load(config.checkpoint, name, norm_path="training", runs_dir=config.runs_dir)
    model = loaded.model.config
    for key in asked:
        section, _, field = key.partition(".")
        was = model_name(model) if field == "name" else getattr(model, field, None)
        if section == "model" and asked[key] != was:
            raise ConfigError(
                f"{key} must be as in the checkpoint, {as_written(was)}, "
                f"got {as_written(asked[key])}; leave it out, or leave out "
                f"checkpoint={config.checkpoint}"
            )
    return replace(config, model=model), loaded.model, loaded.tokenizer

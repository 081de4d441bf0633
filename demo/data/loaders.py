"""The batches of a run, for training and for validation, from what its config says about data."""

from typing import Any, NamedTuple

from demo.checkpoints.tokenizer import Tokenizer
from demo.config.schema import TrainConfig
from demo.data.batches import TrainLoader, ValidationLoader
from demo.data.corpus import load_corpus
from demo.data.sources import open_hub
from demo.data.stream import StreamLoader, validation_corpus


class Data(NamedTuple):
    """What a process trains on and validates with.

    Attributes:
        batches, held_out: The rows of this process.
        bytes_per_token: How much text a token stands for, in training and in validation.
        val_text: All held-out text.
    """

    batches: TrainLoader | StreamLoader
    held_out: ValidationLoader
    bytes_per_token: tuple[float, float]
    val_text: bytes


def load_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    rank: int = 0,
    world_size: int = 1,
    position: dict[str, Any] | None = None,
) -> Data:
    """Find and read the text, as far as that is done before training. `position` is the loader's
    state in the checkpoint that training goes on from. Raises ConfigError."""
    data, optim, parts = config.data, config.optim, config.trainer.accumulate
    share = {"rank": rank, "world_size": world_size, "reset_state": data.reset_state}
    size = {
        "batch_size": optim.batch_size // parts,
        "sequence_length": data.sequence_length,
        "steps": optim.steps * parts,
    }
    if data.source == "hub" and data.streaming:
        stream = open_hub(data)
        corpus, beginning = validation_corpus(stream, data, tokenizer)
        batches = StreamLoader(
            stream, tokenizer, data.hold_out, **size, **share, beginning=beginning
        )
        ratios = (corpus.val.bytes_per_token,) * 2  # nobody knows that of text not yet read
    else:
        corpus = load_corpus(data, tokenizer)
        batches = TrainLoader(corpus.train, seed=config.seed, **size, **share)
        ratios = (corpus.train.bytes_per_token, corpus.val.bytes_per_token)
    batches.check(position)
    held_out = ValidationLoader(corpus.val, data.sequence_length, data.val_tokens, **share)
    return Data(batches, held_out, ratios, corpus.val_text)

"""The batches of a run, for training and validation, from what its config says about data."""

from typing import Any, NamedTuple

from demo.checkpoints.tokenizer import Tokenizer
from demo.config.schema import TrainConfig
from demo.data.batches import TrainLoader, ValidationLoader
from demo.data.corpus import load_corpus
from demo.data.sources import open_hub
from demo.data.stream import StreamLoader, validation_corpus
from demo.training.memory import check_batch
from demo.training.processes import Processes


class Data(NamedTuple):
    """Attributes:
    batches, held_out: For this process, to train on and to validate with.
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
    processes: Processes,
    place: dict[str, Any] | None = None,
) -> Data:
    """Find and read the text, as far as that is done before training. `place` is the loader's state
    in the checkpoint that training goes on from. Raises ConfigError."""
    data, optim, parts = config.data, config.optim, config.trainer.accumulate
    size = {
        "batch_size": optim.batch_size // parts,
        "sequence_length": data.sequence_length,
        "steps": optim.steps * parts,
    }
    share = {
        "rank": processes.rank,
        "world_size": processes.count,
        "reset_state": data.reset_state,
    }
    if data.source == "hub" and data.streaming:
        stream = open_hub(data)
        corpus, beginning = validation_corpus(stream, data, tokenizer)
        batches = StreamLoader(
            stream, tokenizer, data.hold_out, **size, **share, beginning=beginning
        )
        ratios = (corpus.val.bytes_per_token,) * 2  # of what is not read yet nobody knows
    else:
        corpus = load_corpus(data, tokenizer)
        batches = TrainLoader(corpus.train, seed=config.seed, **size, **share)
        ratios = (corpus.train.bytes_per_token, corpus.val.bytes_per_token)
    batches.check(place)
    check_batch(config, processes)
    held_out = ValidationLoader(corpus.val, data.sequence_length, data.val_tokens, **share)
    return Data(batches, held_out, ratios, corpus.val_text)

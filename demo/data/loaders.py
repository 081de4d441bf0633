"""The batches of a run, for training and validation, from what its config says about data."""

from typing import Any, NamedTuple

from demo.checkpoints.tokenizer import Tokenizer
from demo.config.schema import TrainConfig
from demo.data.batches import TrainLoader, ValidationLoader
from demo.data.corpus import load_corpus
from demo.data.report import Report, report
from demo.data.sources import open_hub
from demo.data.stream import StreamLoader, validation_corpus


class Data(NamedTuple):
    """What a run trains on.

    Attributes:
        train, validation: The batches of this process.
        sample: Those of a validation on the way, None where there is to be none.
        bytes_per_token: How much text a token stands for, in training and in validation.
        val_text: All held-out text.
        report: What was read.
    """

    train: TrainLoader | StreamLoader
    validation: ValidationLoader
    sample: ValidationLoader | None
    bytes_per_token: tuple[float, float]
    val_text: bytes
    report: Report


def load_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> Data:
    """Find and read the text, as far as that is done before training, for process `rank` of
    `world_size`. `state` is the training loader's in the checkpoint of a run that is resumed.
    Raises ConfigError."""
    data, accumulate = config.data, config.trainer.accumulate
    process = {"rank": rank, "world_size": world_size, "reset_state": data.reset_state}
    rows = {
        "batch_size": config.optim.batch_size // accumulate,
        "sequence_length": data.sequence_length,
        "steps": config.optim.steps * accumulate,
    }
    if data.streaming:
        stream = open_hub(data)
        corpus, beginning = validation_corpus(stream, data, tokenizer)
        train = StreamLoader(stream, tokenizer, data.hold_out, beginning, **rows, **process)
        # Nobody knows it of text that is not read yet.
        bytes_per_token = corpus.val.bytes_per_token, corpus.val.bytes_per_token
        if state is None:
            train.check_has_text()
    else:
        corpus = load_corpus(data, tokenizer)
        train = TrainLoader(corpus.train, config.seed, **rows, **process)
        bytes_per_token = corpus.train.bytes_per_token, corpus.val.bytes_per_token
    if state is not None:
        train.check_state(state)
    held_out = corpus.val, data.sequence_length
    validation, sample = ValidationLoader(*held_out, data.val_tokens, **process), None
    if config.trainer.validate_every != 0:
        sizes = [data.val_tokens, config.trainer.validate_tokens]
        fewest = min((size for size in sizes if size is not None), default=None)
        if fewest is not None:  # a row for each process
            fewest = max(fewest, world_size * data.sequence_length)
        sample = ValidationLoader(*held_out, fewest, **process)
    read = report(config, corpus, tokenizer)
    return Data(train, validation, sample, bytes_per_token, corpus.val_text, read)

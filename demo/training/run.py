"""A run is one folder: made, locked, written, read again after it was stopped, and finished.

`config.yaml`, the tokenizer and `data.json` are written first and stay; each checkpoint replaces
`model.safetensors` (the weights) and `last.ckpt` (all that training resumes from), and a validation
on the way that is the best so far `best.safetensors` (its weights, which infer.py prefers);
`metrics.csv` grows by a row at a time; `loss.png` comes last, so that a run with it is finished.
"""

import csv
import fcntl
import functools
import io
import itertools
import json
import math
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch

from demo.checkpoints.atomic import must_fit, write_atomically
from demo.checkpoints.checkpoint import (
    BEST,
    CONFIG,
    WEIGHTS,
    check_weights,
    damaged,
    read_config,
    save_config,
    save_weights,
)
from demo.checkpoints.tokenizer import TOKENIZER, Tokenizer
from demo.config.command import process_rank
from demo.config.errors import ConfigError
from demo.config.schema import TrainConfig, model_name, train_config
from models.config import ModelConfig

LAST, METRICS, PICTURE = "last.ckpt", "metrics.csv", "loss.png"
DATA = "data.json"
FILES = (WEIGHTS, BEST, CONFIG, TOKENIZER, DATA, LAST, METRICS, PICTURE)

# Of a validation: before and after the training, and on the way.
VAL, SAMPLE = "val_bpb", "val_sample_bpb"
COLUMNS = ("epoch", "step", "tokens_per_s", "train_bpb", VAL, SAMPLE)  # of metrics.csv

AT_WORK = "another process works on; wait for its end, or stop it"

# What last.ckpt must hold for a run to be resumed, besides what every loader has of its own.
LOADER = "loops.fit_loop.state_dict.combined_loader"
STATE = (
    *("global_step", "state_dict", "optimizer_states", "lr_schedulers", LOADER),
    *("callbacks.RandomState", "callbacks.Throughput"),
)

Rows = tuple[tuple[int, dict[str, float]], ...]  # of metrics.csv: the step, and values by name


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(
        cls, config: TrainConfig, tokenizer: Tokenizer | None = None, rank: int = 0
    ) -> "Run":
        """A new folder `<time>_<model>` under `config.runs_dir` with the config and the tokenizer.

        Of several processes only the first makes one, and only the first writes to it. Raises
        ConfigError where that is not possible.
        """
        if rank:
            return cls(Path(config.runs_dir))
        runs, made = Path(config.runs_dir), False
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{model_name(config.model)}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        try:
            runs.mkdir(parents=True, exist_ok=True)
            while not made:
                folder = runs / next(names)
                with suppress(FileExistsError):  # of a run that began in the same second
                    folder.mkdir()
                    made = True
            save_config(folder, config)
            if tokenizer is not None:
                tokenizer.save(folder)
        except OSError as error:
            if made:
                shutil.rmtree(folder, ignore_errors=True)  # of no use without its config
            raise ConfigError(
                f"runs_dir must be a folder that can be written to, got {config.runs_dir!r} "
                f"({error.strerror}); {'free some space, or ' if made else ''}name another one"
            ) from error
        return cls(folder)

    @property
    def resume_command(self) -> str:
        """The shell command that resumes this run."""
        return f"python train.py resume={shlex.quote(str(self.folder))}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / PICTURE).exists()

    # ------------------------------------------------------------------------------------ locking

    @contextmanager
    def at_work(
        self, rank: int, rows: Rows = (), config: TrainConfig | None = None
    ) -> Iterator[None]:
        """Keep other processes from working on this run meanwhile, start metrics.csv with `rows`,
        and write `config`, if any, in place of what config.yaml says. Raises ConfigError where
        another process already works on it."""
        if rank:
            yield
            return
        with ExitStack() as locks:
            self._lock(locks)
            if config is not None:
                # In this order: another process may read both at any moment.
                (self.folder / PICTURE).unlink(missing_ok=True)
                with self._must_fit(CONFIG):
                    save_config(self.folder, config)
                self._lock(locks)  # it is another file now
            with self._must_fit(METRICS):
                text = ",".join(COLUMNS) + "\n" + "".join(_csv_row(*row) for row in rows)
                write_atomically(self.folder / METRICS, lambda part: part.write_text(text))
            yield

    def _lock(self, locks: ExitStack) -> None:
        if not _lock(locks.enter_context((self.folder / CONFIG).open("rb"))):
            raise self.not_stopped(AT_WORK)

    def is_at_work(self) -> bool:
        """Whether another process trains in this folder. Of several processes that work together
        only the first looks: it may have locked the folder by the time that the others would."""
        if process_rank():
            return False
        with (self.folder / CONFIG).open("rb") as file:
            return not _lock(file)

    def not_stopped(self, why: str) -> ConfigError:
        """The error for a run that cannot be resumed."""
        return ConfigError(
            f"resume must name a run that was stopped, got {str(self.folder)!r}, which {why}"
        )

    # ------------------------------------------------------------------------------------ writing

    def write_checkpoint(
        self, state: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Write `state` as last.ckpt and `weights` for infer.py, each whole or not at all."""
        with self._must_fit(LAST):
            save_weights(self.folder, weights)
            write_atomically(self.folder / LAST, lambda part: torch.save(state, part))

    def write_best(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write `weights` as best.safetensors."""
        with self._must_fit(BEST):
            save_weights(self.folder, weights, BEST)

    def write_data(self, values: Mapping[str, Any]) -> None:
        """Write what is read as data.json."""
        with self._must_fit(DATA):
            text = json.dumps(values, indent=2) + "\n"
            write_atomically(self.folder / DATA, lambda part: part.write_text(text, "utf-8"))

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row to metrics.csv."""
        with self._must_fit(METRICS), (self.folder / METRICS).open("a") as file:
            file.write(_csv_row(step, values))

    def _must_fit(self, name: str) -> AbstractContextManager[None]:
        return must_fit(self.folder / name, f", then go on with: {self.resume_command}")

    # ------------------------------------------------------------------------------------ reading

    def read_config(self) -> TrainConfig:
        """What the run was started with. Raises ConfigError."""
        return read_config(self.folder, train_config)

    def read_state(self, model: ModelConfig | None = None) -> dict[str, Any] | None:
        """What last.ckpt holds, its tensors not yet read; None where there is no last.ckpt. Raises
        ConfigError when it is damaged, lacks something, or is not of `model`."""
        file = self.folder / LAST
        if not file.exists():
            return None
        try:
            with zipfile.ZipFile(file) as records:  # torch.load does not look at their checksums
                if (name := records.testzip()) is not None:
                    raise zipfile.BadZipFile(name)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except zipfile.BadZipFile as error:
            raise damaged(file, "it is cut short, or a part of it has changed") from error
        # No checksum covers the file's own tables: what zipfile, torch and pickle raise depends on
        # which byte of them is wrong.
        except Exception as error:
            raise damaged(file, "it does not hold the state of a run") from error
        missing = next((name for name in STATE if not part_of(state, name)), None)
        if missing is not None:
            why = f"it has no {missing}, perhaps because another version of it wrote the file"
            raise damaged(file, why)
        if model is not None:
            weights = {name.removeprefix("model."): t for name, t in state["state_dict"].items()}
            if model.tie_embeddings:  # they are there twice
                weights.pop("head.weight", None)
            check_weights(file, model, {name: tensor.shape for name, tensor in weights.items()})
        return state

    def read_metrics(self, before_step: float = math.inf) -> Rows:
        """The rows of metrics.csv that belong to the steps before `before_step`. Raises ConfigError
        when the file is damaged."""
        file = self.folder / METRICS
        if not file.exists():
            return ()
        try:
            text = file.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a kill can leave the beginning of a row
            return tuple(
                (step, {name: float(value) for name, value in row.items() if value})
                for row in csv.DictReader(io.StringIO(whole))
                if (step := int(row.pop("step"))) < before_step
            )
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            why = "it is not a table of numbers with the column step"
            raise damaged(file, why) from error


def best_on_the_way(rows: Rows) -> tuple[float, int] | None:
    """The bits per byte of the best validation on the way and the steps before it, if any."""
    return min(((row[SAMPLE], step + 1) for step, row in rows if SAMPLE in row), default=None)


def _lock(file: IO) -> bool:
    """Lock an open file until it is closed or its process ends, however it ends. False where
    another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


def part_of(state: Any, name: str) -> Any:
    """The value of a dotted key in nested dicts, or None."""
    return functools.reduce(
        lambda part, key: part.get(key) if isinstance(part, dict) else None, name.split("."), state
    )


def _csv_row(step: int, values: Mapping[str, float]) -> str:
    values = {**values, "step": step}
    return ",".join(str(values.get(column, "")) for column in COLUMNS) + "\n"

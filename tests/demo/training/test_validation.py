"""Validations on the way: when they come, what they read, and the best weights that they keep."""

import numpy as np
import pytest
import torch

from demo.checkpoints.checkpoint import BEST, WEIGHTS, load
from demo.config.command import compose
from demo.data.corpus import load_corpus
from demo.training.callbacks import Throughput
from demo.training.module import LitLanguageModel
from demo.training.run import SAMPLE, Run, best_on_the_way
from small_runs import TWELVE_STEPS, curve, train_in

OPTIONS = [*TWELVE_STEPS, "model=mamba2"]


def sample_losses(run) -> dict[int, float]:
    """By the number of steps before them."""
    return {step + 1: row[SAMPLE] for step, row in Run(run).read_metrics() if SAMPLE in row}


@pytest.mark.parametrize(
    ("every", "steps"),
    [("5", [5, 10]), ("0", []), ("99", []), ("null", list(range(1, 13)))],
    ids=["five", "none", "more than the steps", "a tenth"],
)
def test_they_come_every_so_many_steps(every, steps, tmp_path):
    run = train_in(tmp_path, *OPTIONS, f"trainer.validate_every={every}").run
    assert list(sample_losses(run)) == steps
    assert (run / BEST).exists() == bool(steps)
    assert len(curve(run)) == 12
    assert len(curve(run, "val_bpb")) == 2


def test_they_count_steps_where_batches_accumulate(tmp_path):
    run = train_in(tmp_path, *OPTIONS, "trainer.validate_every=5", "trainer.accumulate=2").run
    assert list(sample_losses(run)) == [5, 10]


SAMPLED = [*OPTIONS, "trainer.validate_tokens=100"]


def bits_on_the_sample(weights) -> float:
    """Bits per byte of these weights on 100 tokens spread over the held-out text, in float64."""
    tokens = load_corpus(compose("train", OPTIONS).data).val.tokens
    begins = np.linspace(0, len(range(0, len(tokens) - 32, 32)) - 1, 3).round().astype(int) * 32
    rows = torch.stack([torch.from_numpy(tokens[b : b + 33].astype(np.int64)) for b in begins])
    with torch.no_grad():
        probability = load(weights).model(rows[:, :-1])[0].double().softmax(-1)
    return -probability.gather(-1, rows[:, 1:, None]).log2().mean().item()


def test_they_read_a_sample_spread_over_the_held_out_text(tmp_path):
    summary = train_in(tmp_path, *SAMPLED)
    last = sample_losses(summary.run)[12]
    assert last == pytest.approx(bits_on_the_sample(summary.run / WEIGHTS), rel=1e-4)
    assert last != pytest.approx(summary.after, rel=1e-4)


def test_the_best_weights_are_kept_beside_the_last(tmp_path, monkeypatch):
    """The loss of a validation rises after step 6, where the training would have it fall."""
    loss = LitLanguageModel.loss

    def rises(self, batch):
        worse = 1 + self.global_step * (not self.training and self.global_step > 6)
        return loss(self, batch) * worse

    monkeypatch.setattr(LitLanguageModel, "loss", rises)
    summary = train_in(tmp_path, *SAMPLED)
    bits, step = best_on_the_way(Run(summary.run).read_metrics())
    assert step == 6
    assert summary.best == (bits, step)
    assert bits_on_the_sample(summary.run / BEST) == pytest.approx(bits, rel=1e-4)
    assert bits_on_the_sample(summary.run / WEIGHTS) != pytest.approx(bits, rel=1e-4)


def test_they_are_off_the_clock(tmp_path, monkeypatch):
    """A clock that stands still but for validations."""
    now = [0.0]
    monkeypatch.setattr("demo.training.callbacks.time.perf_counter", lambda: now[0])
    step = LitLanguageModel.validation_step

    def takes_a_minute(self, *args):
        now[0] += 60
        return step(self, *args)

    monkeypatch.setattr(LitLanguageModel, "validation_step", takes_a_minute)
    seen = []
    count = Throughput.on_train_batch_end

    def look(self, trainer, *rest):
        count(self, trainer, *rest)
        seen.append(self.seconds)

    monkeypatch.setattr(Throughput, "on_train_batch_end", look)
    train_in(tmp_path, *OPTIONS)
    assert seen == [0.0] * 12

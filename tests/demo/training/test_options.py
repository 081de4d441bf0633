"""The options of training: what they must not change, and what they must."""

import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train
from demo.config.command import compose
from demo.training.module import LitLanguageModel, check_norm_linear, prepare_blocks
from models import token_log_probs
from models.language_model import LanguageModel
from small_runs import (
    SMALL,
    STOPPABLE,
    TWELVE_STEPS,
    check_curves,
    check_weights,
    config_in,
    curve,
    train_in,
    train_until,
)


@pytest.mark.parametrize(
    "option",
    [
        "trainer.accumulate=4",
        "trainer.activation_checkpointing=true",
        "trainer.fuse_norm_linear=true",
        "exact=true",
        pytest.param("trainer.compile=true", marks=pytest.mark.slow),
    ],
)
def test_an_option_leaves_the_loss_curve_as_it_is(option, undisturbed, tmp_path):
    summary = train_in(tmp_path, *STOPPABLE, option)
    check_curves(summary.run, undisturbed.run)
    assert summary.tokens == undisturbed.tokens


def test_the_loss_of_exact_mode_is_the_mean_of_what_generation_reports(tmp_path):
    config = config_in(tmp_path, *SMALL, "model=fla", "exact=true")
    model = LanguageModel(config.model, exact=config.exact)
    batch = torch.randint(0, 256, (3, 50), generator=torch.Generator().manual_seed(0))
    expected = token_log_probs(model(batch[:, :-1])[0].flatten(0, 1), batch[:, 1:].flatten())
    assert torch.equal(LitLanguageModel(model, config.optim).loss(batch), -expected.mean())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_compiled_blocks_take_documents_of_any_length(model, tmp_path):
    """With data.reset_state the number of tokens between two resets differs from batch to batch."""
    options = [*TWELVE_STEPS, f"model={model}", "data.reset_state=true"]
    plain = train_in(tmp_path / "plain", *options)
    check_curves(train_in(tmp_path / "compiled", *options, "trainer.compile=true").run, plain.run)


def test_mixed_precision_trains_nearly_the_same(undisturbed, tmp_path):
    summary = train_in(tmp_path, *STOPPABLE, "trainer.precision=bf16-mixed")
    assert curve(summary.run) == pytest.approx(curve(undisturbed.run), abs=0.15)
    assert curve(summary.run) != pytest.approx(curve(undisturbed.run), abs=1e-5)


@pytest.mark.parametrize("clip", [0, 0.01])
def test_gradients_are_clipped_to_a_norm(clip, monkeypatch, tmp_path):
    norms = []
    clip_gradients = LitLanguageModel.configure_gradient_clipping

    def look(self, *args, **kwargs):
        clip_gradients(self, *args, **kwargs)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    monkeypatch.setattr(LitLanguageModel, "configure_gradient_clipping", look)
    train_in(tmp_path, *TWELVE_STEPS, f"optim.gradient_clip={clip}", "optim.steps=3")
    assert len(norms) == 3
    assert all(norm == pytest.approx(0.01, rel=1e-3) if clip else norm > 0.1 for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_an_accumulating_run_goes_on_to_the_same_bits(every, monkeypatch, tmp_path):
    options = [*TWELVE_STEPS, "trainer.accumulate=2", f"trainer.checkpoint_every={every}"]
    rows, loss = [], LitLanguageModel.loss
    with monkeypatch.context() as patch:
        patch.setattr(
            LitLanguageModel, "loss", lambda self, b: (rows.append(len(b)), loss(self, b))[1]
        )
        whole = train_in(tmp_path / "whole", *options)
    assert rows.count(2) == 2 * 12  # the parts of 4
    assert 4 not in rows

    train_until(2 * 7 + 1, config_in(tmp_path / "stopped", *options), monkeypatch)
    again = train_in(tmp_path / "stopped", *options, "resume=auto")
    assert curve(again.run) == curve(whole.run)
    check_weights(again.run, whole.run)


@pytest.mark.parametrize("name", ["fla", "mamba2"])
def test_activation_checkpointing_computes_a_block_again(name):
    config = compose("train", [f"model={name}", *SMALL, "trainer.activation_checkpointing=true"])
    model = LanguageModel(config.model)
    calls = []
    model.blocks[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    prepare_blocks(model, config.trainer)
    loss = LitLanguageModel(model, config.optim).loss(torch.randint(256, (2, 9)))
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["fla", "mamba2"])
def test_projections_in_fp8_lose_nearly_the_same(name):
    sizes = ["model.hidden_size=128", "model.head_dim=64", "model.num_layers=2"]
    batch, losses = torch.randint(256, (2, 9)), []
    for value in ("null", "fp8_emulated"):
        config = compose(
            "train", [f"model={name}", *sizes, f"trainer.norm_linear_precision={value}"]
        )
        torch.manual_seed(0)
        model = LanguageModel(config.model)
        prepare_blocks(model, config.trainer)
        losses.append(LitLanguageModel(model, config.optim).loss(batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


@pytest.mark.parametrize(("name", "says"), [("fla", None), ("mamba2", "got 256 channels for 2")])
def test_a_norm_group_over_processes_has_no_fp8(name, says):
    options = ["trainer=tp", "trainer.norm_linear_precision=fp8_emulated"]
    config = compose("train", [f"model={name}", *options])
    model = LanguageModel(config.model)
    with nullcontext() if says is None else pytest.raises(ValueError, match=says):
        check_norm_linear(model, config.trainer)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_blocks_are_compiled(checkpointing, monkeypatch):
    """Both blocks by the first one's code, also where they are computed again in the backward."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    options = ["trainer.compile=true", f"trainer.activation_checkpointing={checkpointing}"]
    config = compose("train", ["model=mamba2", *SMALL, *options])
    model = LanguageModel(config.model)
    prepare_blocks(model, config.trainer)
    LitLanguageModel(model, config.optim).loss(torch.randint(256, (2, 9))).backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_two_thousand_steps_take_the_memory_of_two_hundred(tmp_path):
    code = """
import sys
import psutil
import train
from demo.config.command import compose
from demo.training.callbacks import Throughput

count = Throughput.on_train_batch_end

def look(self, trainer, *rest):
    count(self, trainer, *rest)
    if trainer.global_step in (200, 2000):
        print("rss", psutil.Process().memory_info().rss, flush=True)

Throughput.on_train_batch_end = look
train.train(compose("train", sys.argv[1:]))
"""
    pytest.importorskip("psutil")
    options = [*TWELVE_STEPS, "optim.steps=2001", "optim.batch_size=1", "runs_dir=r"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rss")]
    early, late = (int(line.split()[1]) for line in lines)
    assert late < 1.02 * early

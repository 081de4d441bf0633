"""The options of training: what they must not change, and what they must."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from demo.checkpoints.checkpoint import load
from demo.config.command import compose
from demo.config.errors import ConfigError
from demo.training import lit, processes, runs
from demo.training.parallel import prepare_blocks
from demo.training.processes import check_devices
from small_runs import FEW_STEPS, TWELVE_STEPS, curve, train_until


def run(folder: Path, *overrides: str) -> runs.Summary:
    return train.train(compose("train", [*TWELVE_STEPS, f"runs_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "option",
    [
        "trainer.accumulate=4",
        "trainer.activation_checkpointing=true",
        pytest.param("trainer.compile=true", marks=pytest.mark.slow),
    ],
)
def test_an_option_leaves_the_loss_curve_as_it_is(option, plain, tmp_path):
    summary = run(tmp_path, option)
    assert curve(summary.run) == pytest.approx(curve(plain.run), abs=1e-4)
    assert curve(summary.run, "val_bpb") == pytest.approx(curve(plain.run, "val_bpb"), abs=1e-4)
    assert summary.tokens == plain.tokens
    expected = load(plain.run).model.state_dict()
    for name, tensor in load(summary.run).model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-3)


def test_mixed_precision_trains_nearly_the_same(plain, tmp_path):
    summary = run(tmp_path, "trainer.precision=bf16-mixed")
    assert curve(summary.run) == pytest.approx(curve(plain.run), abs=0.15)
    assert curve(summary.run) != pytest.approx(curve(plain.run), abs=1e-5)


@pytest.mark.parametrize("clip", [0, 0.01])
def test_gradients_are_clipped_to_a_norm(clip, monkeypatch, tmp_path):
    norms = []
    clip_gradients = lit.LitLanguageModel.configure_gradient_clipping

    def look(self, *args, **kwargs):
        clip_gradients(self, *args, **kwargs)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    monkeypatch.setattr(lit.LitLanguageModel, "configure_gradient_clipping", look)
    run(tmp_path, f"optim.gradient_clip={clip}", "optim.steps=3")
    assert len(norms) == 3
    assert all(norm == pytest.approx(0.01, rel=1e-3) if clip else norm > 0.1 for norm in norms)


@pytest.mark.slow
def test_accumulation_works_through_parts_of_the_batch(monkeypatch, tmp_path):
    rows = []
    loss = lit.LitLanguageModel.loss
    monkeypatch.setattr(
        lit.LitLanguageModel, "loss", lambda self, b: (rows.append(len(b)), loss(self, b))[1]
    )
    run(tmp_path, "trainer.accumulate=4", "optim.steps=3")
    assert rows.count(1) == 3 * 4
    assert 4 not in rows


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_an_accumulating_run_goes_on_to_the_same_bits(every, monkeypatch, tmp_path):
    overrides = ("trainer.accumulate=2", f"trainer.checkpoint_every={every}")
    whole = run(tmp_path / "whole", *overrides)

    runs_dir = f"runs_dir={tmp_path / 'stopped'}"
    config = compose("train", [*TWELVE_STEPS, *overrides, runs_dir])
    train_until(2 * 7 + 1, config, monkeypatch)
    again = run(tmp_path / "stopped", *overrides, "resume=auto")
    assert curve(again.run) == curve(whole.run)
    expected = load(whole.run).model.state_dict()
    for name, tensor in load(again.run).model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_activation_checkpointing_computes_a_block_again(plain):
    config = compose("train", [*TWELVE_STEPS, "trainer.activation_checkpointing=true"])
    model = load(plain.run, norm_path="training").model
    calls = []
    model.blocks[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    prepare_blocks(model, config.trainer)
    loss = lit.LitLanguageModel(model, config.optim).loss(torch.randint(256, (2, 9)))
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@pytest.mark.slow
def test_tensorboard_gets_what_the_table_gets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = run(tmp_path, "trainer.tensorboard=true")
    values = []
    for file in (summary.run / "tensorboard").glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        if "train_bpb" in events.Tags()["scalars"]:
            values += [event.value for event in events.Scalars("train_bpb")]
    assert values == pytest.approx(curve(summary.run))


def test_tensorboard_is_optional(monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    check_devices(compose("train", ["trainer=cpu"]).trainer)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_devices(compose("train", ["trainer=cpu", "trainer.tensorboard=true"]).trainer)


# -------------------------------------------------------------------------- starting from weights


def test_training_starts_from_a_checkpoint_with_its_sizes(plain, tmp_path):
    summary = train.train(
        compose(
            "train",
            [
                *FEW_STEPS,
                "data.val_tokens=2000",
                f"checkpoint={plain.run}",
                f"runs_dir={tmp_path}",
            ],
        )
    )
    assert summary.before == plain.after
    assert summary.after != plain.after
    assert load(summary.run).model.hidden_size == 32


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.hidden_size=64"], "model.hidden_size must be as in the checkpoint, 32, got 64"),
        (["model.mlp_ratio=2"], "model.mlp_ratio must be as in the checkpoint, 0.0, got 2.0"),
        (["model=mamba2"], "checkpoint must be of model=mamba2"),
        (["tokenizer=words"], "tokenizer must be left out"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_one_line(
    overrides, says, plain, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", f"checkpoint={plain.run}", *overrides])
    with pytest.raises(SystemExit):
        train.main()
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ leaks


@pytest.mark.slow
def test_two_thousand_steps_take_the_memory_of_two_hundred(tmp_path):
    code = """
import sys
import psutil
import train
from demo.config.command import compose
from lightning.pytorch.callbacks import Callback
from demo.training import runs

class Memory(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in (200, 2000):
            print("rss", psutil.Process().memory_info().rss, flush=True)

build = runs.build_trainer
def with_memory(*args):
    trainer, throughput = build(*args)
    trainer.callbacks.append(Memory())
    return trainer, throughput
runs.build_trainer = with_memory
train.train(compose("train", sys.argv[1:]))
"""
    pytest.importorskip("psutil")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *TWELVE_STEPS,
            "optim.steps=2001",
            "optim.batch_size=1",
            "runs_dir=r",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rss")]
    early, late = (int(line.split()[1]) for line in lines)
    assert late < 1.02 * early

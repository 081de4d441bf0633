"""train.py's own code, for real: it learns, keeps what it learnt, and refuses what cannot work."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from demo.checkpoints.checkpoint import load
from demo.config.command import compose
from demo.data.corpus import load_corpus
from demo.training.callbacks import Progress, Throughput
from demo.training.plots import (
    column,
    compressors,
    losses_on_the_way,
    plot_comparison,
    plot_loss,
    smooth,
)
from demo.training.run import Run
from models.generation import generate
from small_runs import SIX_STEPS, check_weights, curve, run, train_in

TINY = [*SIX_STEPS, "optim.steps=3"]
MODELS = Path(train.__file__).parent / "models"  # some text


def unigram_entropy(text: np.ndarray) -> float:
    """Bits per byte of a text whose bytes are drawn with the frequencies they have in it."""
    frequency = np.bincount(text, minlength=256) / text.size
    frequency = frequency[frequency > 0]
    return float(-(frequency * np.log2(frequency)).sum())


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_a_model_learns_and_its_checkpoint_generates_what_it_did(model, tmp_path):
    sizes = ["data.sequence_length=128", "optim.batch_size=8", "data.val_tokens=65536"]
    steps = ["optim.steps=110", "optim.warmup_steps=20", "trainer=cpu", "model.num_layers=2"]
    summary = train_in(tmp_path, f"model={model}", *steps, *sizes)

    entropy = unigram_entropy(load_corpus(compose("train").data).val.tokens)
    assert 3.5 < entropy < 6
    assert summary.after <= 0.7 * entropy < summary.before

    loaded = load(summary.run).model
    assert loaded.norm_path == "inference"
    prompt = torch.tensor(list(b"import os\n\ndef "))
    before = [int(token) for token in generate(summary.model, prompt, 80, seed=3)]
    assert before == [int(token) for token in generate(loaded, prompt, 80, seed=3)]
    assert len(set(before)) > 5


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_in(tmp_path_factory.mktemp("runs"), *TINY)


def test_a_run_is_one_folder_with_everything_in_it(tiny_run):
    files = [
        *("best.safetensors", "config.yaml", "data.json", "last.ckpt", "loss.png", "metrics.csv"),
        "model.safetensors",
    ]
    assert sorted(path.name for path in tiny_run.run.iterdir()) == files
    saved = yaml.safe_load((tiny_run.run / "config.yaml").read_text())
    assert (saved["model"]["hidden_size"], saved["optim"]["steps"]) == (32, 3)
    assert tiny_run.tokens == 3 * 2 * 32
    assert tiny_run.parameters == sum(p.numel() for p in tiny_run.model.parameters())
    assert len(curve(tiny_run.run)) == 3
    validations = curve(tiny_run.run, "val_bpb")
    assert validations == pytest.approx([tiny_run.before, tiny_run.after])


def test_validation_is_the_mean_over_all_rows(tiny_run):
    val = load_corpus(compose("train", TINY).data).val.tokens
    begins = np.linspace(0, len(range(0, len(val) - 32, 32)) - 1, 8).round().astype(int) * 32
    rows = torch.stack([torch.from_numpy(val[b : b + 33].astype(np.int64)) for b in begins])
    with torch.no_grad():
        probability = tiny_run.model(rows[:, :-1])[0].double().softmax(-1)
    bits = -probability.gather(-1, rows[:, 1:, None]).log2().mean()
    assert tiny_run.after == pytest.approx(bits.item(), rel=1e-4)


def test_the_lightning_checkpoint_opens_without_running_code(tiny_run):
    checkpoint = torch.load(tiny_run.run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    (loader,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["position"] == 3
    for name, tensor in load(tiny_run.run).model.state_dict().items():
        assert torch.equal(checkpoint["state_dict"][f"model.{name}"], tensor)


def test_the_same_seed_trains_the_same_weights(tiny_run, tmp_path):
    check_weights(train_in(tmp_path / "same", *TINY).run, tiny_run.run)
    assert train_in(tmp_path / "other", *TINY, "seed=2").after != tiny_run.after


def test_two_runs_in_the_same_second_get_two_folders(tmp_path):
    config = compose("train", [f"runs_dir={tmp_path}"])
    assert len({Run.create(config).folder for _ in range(5)}) == 5


# ------------------------------------------------------------------------------------ the command


def test_the_command_trains_without_a_warning(tmp_path):
    command = [sys.executable, train.__file__, *TINY]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "arn" not in done.stdout  # neither Warning nor warning
    for words in ("parameters", "tokens seen", "tokens/s", "validation before", "metrics.csv"):
        assert words in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert str(run.name) in done.stdout


def test_without_a_terminal_progress_is_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Progress, "LINE_EVERY", 0.0)
    train_in(tmp_path, *SIX_STEPS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    said = r"step 6 of 6, loss \d\.\d\d, val \d\.\d\d, tok/s [\d,]+, GiB \d+\.\d, 0:00:00 left"
    assert re.fullmatch(said, lines[-1]), lines[-1]


def test_on_a_terminal_progress_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "120")
    train_in(tmp_path, *SIX_STEPS)
    out = capsys.readouterr().out
    assert "step " not in out
    assert re.search(r"Validation.*loss \d\.\d\d", out)
    assert re.search(r"Training.*6/6.*loss \d\.\d\d, val \d\.\d\d, tok/s [\d,]+, GiB \d+\.\d", out)


# -------------------------------------------------------------------------------------- multiruns


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_multirun_compares_its_runs_and_checks_all_of_them_first(here):
    code, _, err = run("train", "-m", "seed=1,-2", *TINY)
    assert code
    assert "seed must be at least 0" in err
    assert list(here.iterdir()) == []

    code, out, _ = run("train", "-m", "seed=1,2", *TINY)
    assert code == 0
    table = out[out.index("Runs") :]
    assert "seed=1" in table
    assert "seed=2" in table
    assert "optim.steps" not in table
    (folder,) = here.glob("runs/compare_*")
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert len(list(here.glob("runs/*_fla*"))) == 2  # _2 in the same second


@pytest.mark.parametrize(
    ("arguments", "says", "runs"),
    [
        (
            ["optim.min_learning_rate=0", "optim.learning_rate=1e-3,1e38,2e-3"],
            "the loss must be finite",
            2,
        ),
        (
            ["data=text", "data.hold_out=2", f"data.path=missing,{MODELS}"],
            "data.path must hold files",
            1,
        ),
    ],
    ids=["loss", "text"],
)  # fmt: skip
def test_a_job_of_a_multirun_that_fails_stops_no_other(arguments, says, runs, here):
    code, out, err = run("train", *TINY, *arguments, "-m")
    assert code == 2
    assert err.startswith(f"train.py: error: {says}")
    assert err.count("\n") == 1
    table = out[out.index("Runs in runs/") :]
    assert len(re.findall(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_fla", table)) == runs
    assert next(here.glob("runs/compare_*/comparison.png")).stat().st_size > 10_000


def test_a_multirun_without_a_result_leaves_no_folder(here):
    code, _, err = run("train", "-m", "data=text", "data.path=missing,none")
    assert code == 2
    assert err.count("train.py: error: data.path must hold files") == 2
    assert list(here.glob("runs/*")) == []


# ------------------------------------------------------------------------------------------ parts


def test_throughput_counts_tokens():
    throughput = Throughput(100)
    assert throughput.tokens_per_s == 0
    throughput.load_state_dict({"tokens": 600, "seconds": 1.5})
    assert throughput.tokens_per_s == 400


def test_a_moving_average_starts_at_the_first_value():
    assert smooth(np.array([3.0, 3.0, 3.0]), 5).tolist() == pytest.approx([3, 3, 3])
    assert smooth(np.array([8.0, 0.0]), 1).tolist() == pytest.approx([8, 8 / 3])


def test_the_compressors_are_those_of_the_shell():
    bits = compressors(b"import os\n" * 1000)
    assert set(bits) == {"gzip", "bz2", "xz"}
    assert all(0 < value < 0.2 for value in bits.values())


def test_the_picture_is_a_picture(tmp_path):
    rows = [f"{step},{8 / (1 + step)},{8.0 if step == 0 else ''}" for step in range(50)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,train_bpb,val_bpb", *rows]))
    metrics = Run(tmp_path).read_metrics()
    plot_loss(metrics, tmp_path / "loss.png", "a title", {"gzip": 2.0, "xz": 1.98})
    data = (tmp_path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1200
    assert height >= 600


def test_a_training_loss_stands_after_its_step_where_the_validation_does(tiny_run):
    metrics = Run(tiny_run.run).read_metrics()
    steps, losses = losses_on_the_way(metrics, "train_bpb")
    assert steps.tolist() == [1, 2, 3]
    assert len(losses) == 3
    assert column(metrics, "val_bpb")[0].tolist() == [0, 3]
    assert losses_on_the_way(metrics, "val_sample_bpb")[0].tolist() == [3]


@pytest.mark.filterwarnings("error")
def test_long_overrides_leave_room_for_the_curves(tiny_run, tmp_path):
    runs = {f"data.path={'long/' * 50}{n}": Run(tiny_run.run).read_metrics() for n in range(2)}
    runs["none on the way"] = [(0, {"val_bpb": 8.0}), (3, {"val_bpb": 7.0})]
    plot_comparison(runs, tmp_path / "comparison.png")

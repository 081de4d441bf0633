"""benchmarks/models.py on small sizes: every part makes its rows, and the norms' time is theirs."""

import csv
import sys

import pytest
import torch

import gatednorm
from benchmarks import models as benchmark
from benchmarks import profiles
from small_models import small_model


def rows(folder, *arguments, monkeypatch):
    command = ["models", "--device", "cpu", "--tiny", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(folder), *arguments])
    benchmark.main()
    with (folder / "models.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_every_part_makes_its_rows(part, tmp_path, monkeypatch, capsys):
    table = rows(tmp_path, "--parts", part, monkeypatch=monkeypatch)
    assert "Traceback" not in capsys.readouterr().err
    assert {row["model"] for row in table} == {"gated_deltanet", "mamba2"}
    assert all(float(row["value"]) >= 0 for row in table)
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in table)
    if part == "decode":
        same = [row["value"] for row in table if row["quantity"] == "same_tokens_as_eager"]
        assert same == ["1", "1"]


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.PARTS, "check", lambda *_: 1 / 0)
    table = rows(tmp_path, "--parts", "check", "decode", monkeypatch=monkeypatch)
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert {row["part"] for row in table} == {"decode"}


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
def test_the_norms_time_is_all_of_theirs_and_nothing_else(plain):
    """Every backward node that the norms made counts, and no other: all the others together and
    the norms are the whole backward."""
    model = small_model("gated_deltanet", vocab_size=16, hidden_size=32, head_dim=16)
    restore = profiles.label_norms(model, plain)
    tokens = torch.randint(0, 16, (2, 40))
    try:
        events = profiles.record("cpu", lambda: model(tokens)[0].sum().backward(), 1)
    finally:
        restore()
    times = profiles.norm_times("cpu", events, 1)
    assert set(times) == {"norm.gated", "norm.other", "norm.q_and_k"}
    forward = sum(e.cpu_time_total for e in events if e.name.startswith("norm.")) / 1e3
    names = ("Pow", "Rsqrt", "Mean") if plain else ("LayerNormFn",)
    prefix = "autograd::engine::evaluate_function: "
    backward = sum(
        e.cpu_time_total
        for e in events
        if e.name.startswith(tuple(f"{prefix}{name}Backward" for name in names))
    )
    total = sum(times.values())
    if plain:  # the nodes that only a norm has, and more
        assert total > forward + backward / 1e3
    else:
        assert total == pytest.approx(forward + backward / 1e3)
    assert profiles.gated_deltanet.rmsnorm_fn is gatednorm.rmsnorm_fn

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


def test_kernels_by_kind(tmp_path, monkeypatch, capsys):
    """Times and launches of a kind are added up, for each model and commit."""
    rows = [
        ("nvjet_sm90_tst_128x256", "2", "1.5"),
        ("void cutlass::Kernel2", "1", "0.5"),
        ("scan_backward_kernel", "8", "4.0"),
        ("backward_kernel", "3", "0.25"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4>", "1", "3.0"),
        ("void at::native::elementwise_kernel<128, 4>", "9", "0.125"),
        ("Memset (Device)", "1", "0.125"),
    ]
    lines = [f'train,mamba2,ours,{calls},{ms},"{name}",abc' for name, calls, ms in rows]
    lines += ["step,mamba2,ours,1,9.0,nvjet,abc", "train,mamba2,plain,1,9.0,nvjet,abc"]
    path = tmp_path / "models_profile.csv"
    path.write_text("\n".join(["part,model,norm,calls,ms,kernel,commit", *lines]))
    monkeypatch.setattr(sys, "argv", ["profiles", str(path)])
    profiles.main()
    found = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    assert found["matrix products"] == "2.0 (3)"
    assert found["scan"] == "4.0 (8)"
    assert found["norms"] == "0.2 (3)"
    assert found["loss"] == "3.0 (1)"
    assert found["PyTorch's elementwise operators, sums, copies"] == "0.2 (10)"
    assert found["convolution"] == found["SwiGLU"] == "0.0 (0)"

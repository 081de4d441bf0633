"""Measurements of infer.py: what they count, and that they see a difference where there is one."""

import json
import re

import pytest
import torch

from demo import generate, load
from demo.inference.measure import Spread, _seconds, bench, compare, peak_memory, show
from gatednorm import RMSNorm
from small_runs import write_checkpoint


@pytest.fixture(scope="module", params=["fla", "mamba2"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_checkpoint(folder, request.param, sharp=12)
    return load(folder)


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        a = torch.zeros(250_000)  # 1 MB
        b = a + 1
        del a
        return (b * 2).sum()

    peak = peak_memory(run, torch.device("cpu"))
    assert 2e6 <= peak < 2.01e6


def test_memory_from_before_does_not_count():
    before = [torch.zeros(1_000_000)]

    def run():
        before.clear()
        torch.zeros(250_000)

    assert 1e6 <= peak_memory(run, torch.device("cpu")) < 1.01e6


def test_the_paths_are_the_same_to_the_bit_and_the_model_stays_on_its_own(loaded):
    found = compare(loaded, b"import os", 12, 3)
    assert (found.difference, found.other_bits, found.equal_tokens) == (0, 0, 12)
    assert found.logits == (9 + 11) * 256
    assert set(found.speed) == set(found.peak_bytes) == {"training", "inference"}
    assert all(peak > 0 for peak in found.peak_bytes.values())
    for path, speed in found.speed.items():
        assert speed.norm_path == path
        assert (speed.prompt_tokens, speed.new_tokens) == (9, 12)
        assert 0 < speed.prefill_s.least <= speed.prefill_s.median <= speed.prefill_s.most
    assert loaded.model.norm_path == "inference"


def test_a_difference_is_seen(loaded, monkeypatch, capsys):
    forward = RMSNorm.forward

    def worse(self, x, z=None):
        y = forward(self, x, z)
        return y * -1 if self.path == "inference" else y

    monkeypatch.setattr(RMSNorm, "forward", worse)
    found = compare(loaded, b"import os", 12, 1)
    assert found.difference > 0
    assert found.other_bits > 0
    assert found.equal_tokens < 12
    show(found, "text")
    assert f"after {found.equal_tokens}" in capsys.readouterr().out


def test_bench_counts_runs_after_one_that_warms_up(loaded, monkeypatch):
    times = iter([(9.0, 9.0), (1.0, 4.0), (3.0, 2.0), (2.0, 11.0)])
    monkeypatch.setattr("demo.inference.measure._seconds", lambda *_: next(times))
    speed = bench(loaded, b"abcd", 5, 3)
    assert speed.prefill_s == Spread(2, 1, 3)
    assert speed.decode_s.per_s(4) == Spread(1, 4 / 11, 2)


def test_decoding_is_measured_from_the_second_token_on(loaded, monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.5, 6.0, 6.5])
    monkeypatch.setattr("demo.inference.measure.time.perf_counter", lambda: next(clock))
    assert _seconds(loaded.model, torch.tensor([1, 2]), 5) == (1, 1.5)
    clock = iter([0.0, 1.0, 5.0])
    assert _seconds(loaded.model, torch.tensor([1, 2]), 2) == (1, 0)
    clock = iter([0.0, 1.0])
    assert _seconds(loaded.model, torch.tensor([1, 2]), 1) == (1, 0)


def test_tables_and_json_say_the_same(loaded, capsys):
    for measured in (bench(loaded, b"abc", 4, 2), compare(loaded, b"abc", 1, 1)):
        show(measured, "json")
        out = json.loads(capsys.readouterr().out)
        assert set(out) >= set(measured.__dataclass_fields__)
        show(measured, "text")
        table = capsys.readouterr().out
        assert max(len(line) for line in table.splitlines()) <= 80
        if "speed" not in out:
            assert re.search(r"decode, from the 3rd on │ +2 │", table)
            for part in ("prefill", "decode"):
                assert f"{out[f'{part}_tokens_per_s']['median']:,.0f}" in table
            assert out["decode_tokens_per_s"]["median"] == 2 / out["decode_s"]["median"]
        else:
            assert "3 tokens of prompt, 1 new " in table
            ms = 1e3 * out["speed"]["training"]["prefill_s"]["median"]
            assert (f"{ms:.1f}" if ms < 100 else f"{ms:.0f}") in table
            assert "decode_tokens_per_s" not in out["speed"]["training"]  # there was none


@pytest.mark.gpu
def test_on_a_gpu_the_paths_are_the_same_to_the_bit_too(loaded):
    model = loaded.model.to("cuda")
    try:
        found = compare(loaded, b"import os", 12, 2)
        assert (found.difference, found.other_bits, found.equal_tokens) == (0, 0, 12)
        assert all(peak > 0 for peak in found.peak_bytes.values())
        texts = [generate(loaded, "import ", max_new_tokens=30, seed=seed).text for seed in (1, 1)]
        assert texts[0] == texts[1]
    finally:
        model.to("cpu")

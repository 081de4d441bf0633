"""Measurements of infer.py: what they count, and that they see a difference where there is one."""

import json

import pytest
import torch

from demo import generate
from demo.inference import measure
from demo.inference.measure import Speed, bench, compare, time_run
from demo.inference.printing import print_measurement
from gatednorm import RMSNorm


def test_the_paths_are_the_same_to_the_bit_and_the_model_stays_on_its_own(loaded):
    loaded.model.set_norm_path("training")
    found = compare(loaded, b"import os", 12, 3)
    assert loaded.model.norm_path == "training"
    loaded.model.set_norm_path("inference")
    assert (found.difference, found.other_bits, found.equal_tokens) == (0, 0, 12)
    assert found.logits == (9 + 11) * 256
    assert found.peak_bytes == {"training": None, "inference": None}
    for path, speed in found.speed.items():
        assert (speed.norm_path, speed.prompt_tokens, speed.new_tokens) == (path, 9, 12)
        assert speed.prefill_s > 0
        assert speed.decode_s > 0


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
    print_measurement(found, "text")
    assert f"after {found.equal_tokens}" in capsys.readouterr().out


def test_bench_is_the_median_of_runs_after_one_that_warms_up(loaded, monkeypatch):
    times = iter([(9.0, 9.0), (1.0, 4.0), (3.0, 2.0), (2.0, 11.0)])
    monkeypatch.setattr(measure, "time_run", lambda *_: next(times))
    speed = bench(loaded, b"abcd", 6, 3)
    assert speed == Speed("inference", 4, 6, 2.0, 4.0)
    assert speed.rates() == {"prefill": (4, 2.0), "decode": (4, 1.0)}


@pytest.mark.parametrize(("count", "decode"), [(5, 1.5), (2, 0), (1, 0)])
def test_decoding_is_timed_from_the_second_token_on(count, decode, loaded, monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.5, 6.0, 6.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert time_run(loaded.model, torch.tensor([1, 2]), count) == (1, decode)


@pytest.mark.parametrize("new", [1, 4])
def test_tables_and_json_say_the_same(new, loaded, capsys):
    def printed(measured):
        print_measurement(measured, "json")
        record = json.loads(capsys.readouterr().out)
        assert set(record) >= set(measured.__dataclass_fields__)
        print_measurement(measured, "text")
        table = capsys.readouterr().out
        assert max(len(line) for line in table.splitlines()) <= 80
        return record, table

    record, table = printed(bench(loaded, b"abc", new, 2))
    assert f"{record['prefill_tokens_per_s']:,.0f}" in table
    assert ("decode_tokens_per_s" in record) == ("decode" in table) == (new > 2)
    if new > 2:
        assert record["decode_tokens_per_s"] == 2 / record["decode_s"]
        assert f"{record['decode_tokens_per_s']:,.0f}" in table
    record, table = printed(compare(loaded, b"abc", new, 1))
    for speed in record["speed"].values():
        assert f" {1e3 * speed['prefill_s']:.2f} " in table
    assert f" 0 of {256 * (2 + new):,} " in table
    assert "memory" not in table  # which a CPU's allocator does not count


@pytest.mark.gpu
def test_on_a_gpu_the_paths_are_the_same_to_the_bit_too(loaded, capsys):
    model = loaded.model.to("cuda")
    try:
        found = compare(loaded, b"import os", 12, 2)
        assert (found.difference, found.other_bits, found.equal_tokens) == (0, 0, 12)
        assert all(peak > 0 for peak in found.peak_bytes.values())
        print_measurement(found, "text")
        assert "peak memory, MiB" in capsys.readouterr().out
        texts = [generate(loaded, "import ", max_new_tokens=30, seed=seed).text for seed in (1, 1)]
        assert texts[0] == texts[1]
    finally:
        model.to("cpu")

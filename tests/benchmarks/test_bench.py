"""`python -m gatednorm.bench`: its models, its peers, its tables, and the GPU's way through it with
the kernels where the tests run them."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from gatednorm import families
from gatednorm.bench import __main__ as bench
from gatednorm.bench import measure, providers, tables, timing
from gatednorm.bench.cases import MODELS, Case
from gatednorm.bench.sheet import Sheet

CONFIGS = {  # the classes whose defaults are the published model's
    "qwen3-next": ("qwen3_next", "Qwen3NextConfig"),
    "kimi-linear": ("kimi_linear", "KimiLinearConfig"),
    "nemotron-h": ("nemotron_h", "NemotronHConfig"),
    "granite-4": ("granitemoehybrid", "GraniteMoeHybridConfig"),
    "falcon-h1": ("falcon_h1", None),
    "qwen3.5": ("qwen3_5", None),
    "mamba2-2.7b": ("mamba2", None),
}
# Where a provider imports from, and what of ours has the same names and arguments.
PEERS = {
    "FLA fused": ("fla.modules.fused_norm_gate", "fla"),
    "FLA": ("fla.modules.layernorm_gated", "fla"),
    "mamba": ("mamba_ssm.ops.triton.layernorm_gated", "mamba"),
    "SGLang": ("sglang.kernels.ops.attention.fla.layernorm_gated", "sglang"),
    "vLLM": ("vllm.model_executor.layers.mamba.ops.layernorm_gated", "vllm"),
}
ABOUT = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-29"}


@pytest.fixture
def peers(monkeypatch):
    for path, door in PEERS.values():
        ours = importlib.import_module(f"gatednorm.compat.{door}")
        monkeypatch.setitem(sys.modules, path, ours)


@pytest.mark.parametrize("key", MODELS)
def test_models_are_as_published(key):
    folder, name = CONFIGS[key]
    case, module = MODELS[key].case(1), f"transformers.models.{folder}.modeling_{folder}"
    family = next(f for (path, _), f in families.FAMILIES.items() if path == module)
    assert case.activation == family.activation
    assert case.norm_before_gate == (family.norm_before_gate and key != "falcon-h1")  # an option
    if name is None:
        return
    made = getattr(importlib.import_module("transformers"), name)()
    if hasattr(made, "mamba_expand"):
        width, groups = made.mamba_expand * made.hidden_size, made.mamba_n_groups
    elif hasattr(made, "mamba_num_heads"):
        width, groups = made.mamba_num_heads * made.mamba_head_dim, made.n_groups
    else:
        width = getattr(made, "linear_value_head_dim", None) or made.linear_head_dim
        heads = getattr(made, "linear_num_value_heads", None) or made.linear_num_heads
        assert (case.rows, case.width, case.group_size) == (heads, width, None)
        return
    assert (case.rows, case.width) == (1, width)
    assert width // (case.group_size or width) == groups


@pytest.mark.parametrize("name", [*PEERS, "gatednorm", "eager", "transformers"])
def test_a_provider_computes_the_norm_of_every_model_that_it_covers(name, peers):
    covered = set()
    for key, model in MODELS.items():
        case = model.case(2)
        functions = providers.PROVIDERS[name][1](case)
        if functions is not None:
            covered.add(key)
            assert timing.error(case, functions, timing.inputs(case, "cpu")) < 5e-3
    mamba2 = {"nemotron-h", "granite-4", "falcon-h1", "mamba2-2.7b"}
    without = {"FLA fused": mamba2, "SGLang": set()}.get(name, {"kimi-linear"})
    assert covered == MODELS.keys() - (without if name in PEERS else set())


CASE = Case(64, 32, 16, norm_before_gate=False, z_strided=True)


@pytest.fixture
def timed(kernels, monkeypatch):
    """Measures as on a GPU: every call runs once, and takes 10, 20, 30 us and so on."""
    calls = []

    def graph_time(function, calls_in_graph=1):
        function()
        calls.append(function)
        return 10.0 * len(calls)

    monkeypatch.setattr(timing, "graph_time", graph_time)
    monkeypatch.setattr(timing, "peak", lambda training, t: 1.0)

    def run(names, case=CASE, **changes):
        for name, provider in changes.items():
            monkeypatch.setitem(providers.PROVIDERS, name, ("torch", provider))
        sheet, said = Sheet([], ABOUT, dtype="float32"), []
        inputs = timing.inputs(case, kernels.device, torch.float32)
        monkeypatch.setattr(timing, "inputs", lambda *_: inputs)
        measure.throughput(case, [*names, *changes], sheet, said.append, device=kernels.device)
        return sheet, said

    return run


def test_a_gpu_is_measured_from_the_check_to_the_table(timed, peers):
    sheet, said = timed(["gatednorm", "vLLM", "mamba", "FLA fused", "eager"])
    assert not said
    forward, both = sheet.get(CASE, "forward"), sheet.get(CASE, "both")
    assert forward == {"ceiling": 10, "gatednorm": 110, "vLLM": 140, "mamba": 150, "eager": 180}
    assert sheet.get(CASE, "backward")["ceiling"] == 60  # the sixth call: five tiles each
    assert both.keys() == {"gatednorm", "mamba", "eager"}
    assert max(sheet.get(CASE, "error").values()) < 1e-6
    first, second = tables.of_gpu(sheet, {"Some model": CASE})
    assert list(first)[-4:] == ["ratio", "mamba", "vLLM", "eager"]
    name, shape, what, *figures = first.values()
    assert (name, shape, what) == ("Some model", CASE.name, "forward")
    assert figures == ["10.0", "110.0", "0", "11.00", "15.00", "14.00", "18.00"]
    assert [second["ceiling us"], second["gatednorm us"]] == ["70.0", "130.0"]
    assert [second["ratio"], second["vLLM"]] == ["1.86", "-"]


def test_the_ceilings_read_and_write_everything(kernels):
    from gatednorm.kernels import ceilings

    for case in (CASE, Case(30, 40)):
        t = timing.inputs(case, kernels.device, torch.float32)
        dy, x, z = (v.detach() for v in (t.dy, t.x, t.z))
        n = x.numel() - x.numel() % 16
        for way in ceilings.forward_ways(x, z, y := torch.empty_like(x)):
            way()
            assert torch.equal(y.view(-1)[:n], (x + z).view(-1)[:n])
            y.zero_()
        for way in ceilings.backward_ways(dy, x, z, y, dz := torch.empty_like(x)):
            way()
            torch.testing.assert_close(y.view(-1)[:n], (x + dy * z).view(-1)[:n])
            torch.testing.assert_close(dz.view(-1)[:n], (x * dy + z).view(-1)[:n])


def test_who_is_wrong_or_fails_is_named_and_not_timed(timed):
    def off(by):
        def norm(x, w, b, z):
            return providers.reference(CASE)(x, w, b, z) * by

        return lambda case: (norm, norm)

    def absent(case):
        raise ImportError("No module named 'absent'")

    def broken(case):
        return None, lambda x, w, b, z: 1 / 0

    sheet, said = timed(
        ["gatednorm"], far=off(1.001), nan=off(math.nan), absent=absent, broken=broken
    )
    assert said == [
        "  far is wrong: relative error 0.001; not timed",
        "  nan is wrong: relative error nan; not timed",
        "  absent is left out: No module named 'absent'",
        "  broken fails: ZeroDivisionError division by zero",
    ]
    assert sheet.get(CASE, "forward").keys() == {"ceiling", "gatednorm"}
    (row, _), text = tables.of_gpu(sheet, {"m": CASE}), tables.report(sheet, {"m": CASE}, "cuda")
    assert [row["far"], row["nan"], row["broken"]] == ["wrong", "wrong", "fails"]
    assert "far 1.0e-03, nan nan." in text
    assert text.endswith("Left out: absent.")


@pytest.mark.parametrize("place", range(4), ids="xwbz")
def test_an_error_of_any_gradient_counts(place):
    case = Case(8, 16, bias=True)
    right = providers.reference(case)

    def training(*tensors):
        t = tensors[place]
        steeper = t + 0.01 * (t - t.detach())  # the same value
        return right(*tensors[:place], steeper, *tensors[place + 1 :])

    t = timing.inputs(case, "cpu", torch.float32)
    assert timing.error(case, (None, right), t) < 1e-6
    assert timing.error(case, (right, right), t) < 1e-6
    assert timing.error(case, (training, right), t) == pytest.approx(0.01, rel=1e-3)


def test_the_table_of_a_gpu():
    sheet = Sheet([], ABOUT)
    one, two = MODELS["qwen3-next"].case(8192), MODELS["nemotron-h"].case(8192)
    for case, scale in ((one, 1.0), (two, 2.0)):
        for quantity, floor in (("forward", 53.0), ("backward", 84.4)):
            sheet.add(case, "ceiling", quantity, floor * scale, "us")
        sheet.add(case, "gatednorm", "error", 2.1e-3, "relative", version="0.2.0")
        sheet.add(case, "gatednorm", "forward", 54.0 * scale, "us")
        sheet.add(case, "gatednorm", "both", 146.0 * scale, "us")
    sheet.add(one, "FLA fused", "error", 2.2e-3, "relative", version="0.6.0")
    sheet.add(one, "FLA fused", "forward", 54.4, "us")
    sheet.add(one, "FLA fused", "both", 161.0, "us")
    sheet.missing |= {"mamba", "SGLang"}
    cases = {"Qwen3-Next 80B-A3B": one, "Nemotron-H 8B": two}
    assert tables.report(sheet, cases, "cuda") == GPU_REPORT.strip()


GPU_REPORT = """
NVIDIA H200: torch 2.11.0, triton 3.6.0; 2026-11-29

| model              | rows x width                                  |                    | ceiling us | gatednorm us | GB/s | ratio | FLA fused |
| ------------------ | --------------------------------------------- | ------------------ | ---------: | -----------: | ---: | ----: | --------: |
| Qwen3-Next 80B-A3B | 262144 x 128, gate after                      | forward            |       53.0 |         54.0 | 3728 |  1.02 |      1.03 |
|                    |                                               | forward + backward |      137.4 |        146.0 | 3677 |  1.06 |      1.17 |
| Nemotron-H 8B      | 8192 x 8192, 8 groups, gate before, z strided | forward            |      106.0 |        108.0 | 3728 |  1.02 |         - |
|                    |                                               | forward + backward |      274.8 |        292.0 | 3677 |  1.06 |         - |

bf16, fp32 weights; medians in microseconds on the GPU. The ceiling is the fastest of several elementwise kernels that move the same bytes; ratio, and the columns after it: time over the ceiling's.
Largest error against float64, in the 2-norm: gatednorm 2.1e-03, FLA fused 2.2e-03.
Versions: gatednorm 0.2.0, FLA fused 0.6.0. Left out: SGLang, mamba.
"""  # noqa: E501


def test_without_a_gpu_it_says_so_and_times_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 1e3, 1e3))
    file = tmp_path / "bench.json"
    names = ["--models", "Qwen3.5", "mamba2-2.7b"]
    assert bench.main([*names, "--tokens", "2", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("no GPU found: torch ")
    assert "this machine is busy, load 1000.0 on " in out
    head, rule, *lines = (line for line in out.splitlines() if line.startswith("|"))
    assert {len(line) for line in lines} == {len(head)} == {len(rule)}
    assert [line.split("|")[3].strip() for line in lines] == ["forward", "forward + backward"] * 2
    assert err.splitlines()[1] == "2/2 Mamba2 2.7B: 2 x 5120, gate before, z strided"
    written = json.loads(file.read_text())
    assert written["about"]["torch"] == torch.__version__
    rows = {(r["case"], r["provider"], r["quantity"]): r for r in written["rows"]}
    assert len(rows) == len(written["rows"]) == 12
    ours = rows["96 x 128, gate after", "gatednorm", "both"]
    assert (ours["rows"], ours["dtype"], ours["unit"]) == (96, "float32", "ms")
    assert 0 < ours["low"] <= ours["speedup"] <= ours["high"]


def test_on_a_gpu_a_model_that_does_not_fit_does_not_stop_the_others(monkeypatch, capsys):
    def throughput(case, names, sheet, say):
        assert list(names) == list(providers.PROVIDERS)
        if case.width > 5000:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        for quantity in ("forward", "backward", "both"):
            sheet.add(case, "ceiling", quantity, 1, "us")
            sheet.add(case, "gatednorm", quantity, 2, "us")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "about", lambda *_: ABOUT)
    monkeypatch.setattr(bench, "throughput", throughput)
    assert bench.main(["--models", "mamba2-2.7b", "falcon-h1"]) == 1
    out, err = capsys.readouterr()
    assert (
        "  OutOfMemoryError CUDA out of memory.; try fewer --tokens\n2/2 Falcon-H1R 7B: 8192 x 3072"
        in err
    )
    assert out.startswith("NVIDIA H200: torch 2.11.0, triton 3.6.0; 2026-11-29\n\n| model")
    assert "Mamba2" not in out
    assert bench.main(["--models", "falcon-h1"]) == 0


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("--models qwen3_5", "no model 'qwen3_5'; did you mean qwen3.5, qwen3-next"),
        ("--models llama", f"no model 'llama'; there are {', '.join(MODELS)}"),
        ("--tokens 0", "a whole number from 1 on, got '0'"),
        ("--json no/such.json", "--json: its folder must exist, got no/such.json; make it"),
    ],
)
def test_what_is_mistyped_is_one_line(typed, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(typed.split())
    assert answer in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_all_models_take_under_a_minute_without_a_gpu_and_triton():
    program = "import sys, runpy; sys.modules['triton'] = None; sys.argv = ['bench']; "
    program += "runpy.run_module('gatednorm.bench', run_name='__main__')"
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert all(model.name in done.stdout for model in MODELS.values())
    # Of the processor: what runs beside the test does not count.
    assert after.children_user - before.children_user < 60

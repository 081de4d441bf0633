"""Where a model's GPU time goes: kernels by name, and the share of its norms.

    python -m benchmarks.profiles before/models_profile.csv after/models_profile.csv

prints a table of forward and backward by kind of kernel, of the CSVs of benchmarks/models.py.

The share of the norm: forward, all kernels launched inside a `record_function` around the norm;
backward, all kernels of the autograd nodes that were made inside it, found by their sequence
numbers. That holds for one fused node and for the dozen of the plain expression alike.
"""

import bisect
import csv
import functools
import re
import sys
from collections.abc import Iterable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import gatednorm
from gatednorm.bench.timing import synchronize
from models import gated_deltanet
from models.language_model import LanguageModel

KINDS = {  # of kernels, by how a name begins
    "matrix products": r"nvjet|gemm|void (cutlass|gemm)|.*splitK",
    "scan": "_decay|_chunk|_prepare|_tokens|_scores|_combine|_spread|_delta|prepare_k|scan_|"
    "system_|read_backward|pass_states|outputs|maps_b|inputs_b|sum_decays",
    "convolution": "_conv|_final_state|_sum_parameters",
    "norms": "(forward|backward|reduce)_kernel$",
    "SwiGLU": "_swiglu",
    "loss": r".*(SoftMax|nll_loss)|_(forward|backward)$",
    "PyTorch's elementwise operators, sums, copies": "",
}
ANNOTATIONS = ("norm.", "Optimizer.", "ProfilerStep", "autograd::")


def record(device: str, function, calls: int) -> list:
    """The profiler's events of some calls."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    function()
    synchronize(device)
    with profile(activities=activities) as recorded:
        for _ in range(calls):
            function()
        synchronize(device)
    return list(recorded.events())


def kernel_times(device: str, events: list, calls: int) -> dict[str, tuple[float, float]]:
    """By kernel: launches and ms in one call. On a CPU: by operator."""
    table: dict[str, list[float]] = {}
    for event in _work(device, events):
        on_gpu = event.device_type == DeviceType.CUDA
        us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        entry = table.setdefault(event.name, [0, 0.0])
        entry[0] += 1
        entry[1] += us / 1e3
    return {name: (count / calls, ms / calls) for name, (count, ms) in table.items()}


def busy_time(device: str, events: list, calls: int, without: Iterable[str] = ()) -> float:
    """ms of one call in which a kernel ran that is not one of `without`. A kernel that starts
    before the one in front of it has ended, and waits for it, counts with what it adds."""
    without, busy, until = set(without), 0.0, float("-inf")
    spans = (e.time_range for e in _work(device, events) if e.name not in without)
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy / 1e3 / calls


def _work(device: str, events: list) -> list:
    """Kernels, or on a CPU operators, without the names that a caller gave to spans of time, which
    lie on a GPU's timeline too."""
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    return [
        event
        for event in events
        if event.device_type == wanted
        and not event.name.startswith(ANNOTATIONS)
        and not getattr(event, "is_user_annotation", False)
    ]


def norm_times(device: str, events: list, calls: int) -> dict[str, float]:
    """ms of one call inside the labelled norms: their ranges and the backward of their nodes."""

    def ms(event):
        us = event.device_time_total if device == "cuda" else event.cpu_time_total
        return us / 1e3 / calls

    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    norms = [e for e in on_cpu if e.name.startswith("norm.")]
    norms.sort(key=lambda e: e.time_range.start)
    starts = [e.time_range.start for e in norms]
    times, label_of = dict.fromkeys((e.name for e in norms), 0.0), {}
    for event in norms:
        times[event.name] += ms(event)
    for event in on_cpu:  # which sequence numbers were given out inside which norm
        before = bisect.bisect(starts, event.time_range.start)
        if before and event.sequence_nr >= 0 and "Backward" not in event.name:
            norm = norms[before - 1]
            if event.time_range.start < norm.time_range.end and event.thread == norm.thread:
                label_of[event.sequence_nr] = norm.name
    prefix = "autograd::engine::evaluate_function: "
    for event in on_cpu:
        if event.name.startswith(prefix) and event.sequence_nr in label_of:
            times[label_of[event.sequence_nr]] += ms(event)
    return times


def label_norms(model: LanguageModel, plain: bool):
    """Names for the profiler around every norm, and the plain expression in its place. Returns a
    function that undoes the second half, which is not in the model."""

    def labelled(name, function):
        def call(*args, **options):
            with record_function(name):
                return function(*args, **options)

        return call

    def expression(module, x, z=None):
        return gatednorm.rms_norm_ref(
            x, module.weight, None, z, module.eps, module.group_size, module.norm_before_gate
        )

    for name, module in model.named_modules():
        if isinstance(module, gatednorm.RMSNorm):
            label = "norm.gated" if name.endswith("mixer.norm") else "norm.other"
            function = functools.partial(expression, module) if plain else module.forward
            module.forward = labelled(label, function)
    ours = gated_deltanet.rmsnorm_fn
    function = gatednorm.rms_norm_ref if plain else ours
    gated_deltanet.rmsnorm_fn = labelled("norm.q_and_k", function)
    return functools.partial(setattr, gated_deltanet, "rmsnorm_fn", ours)


def kind_of(kernel: str) -> str:
    return next(kind for kind, name in KINDS.items() if re.match(name, kernel))


def main() -> None:
    columns: dict[str, dict[str, list[float]]] = {}
    for path in sys.argv[1:]:
        with open(path) as file:
            rows = [r for r in csv.DictReader(file) if (r["part"], r["norm"]) == ("train", "ours")]
        for row in rows:
            column = columns.setdefault(f"{row['model']}, {row['commit']}", {})
            entry = column.setdefault(kind_of(row["kernel"]), [0.0, 0.0])
            entry[0] += float(row["ms"])
            entry[1] += float(row["calls"])
    if not columns:
        sys.exit("give models_profile.csv files of benchmarks/models.py, before and after")
    print("| ms (launches) |", " | ".join(columns), "|")
    print("|---|", "--:|" * len(columns), sep="")
    for kind in KINDS:
        entries = (column.get(kind, (0.0, 0.0)) for column in columns.values())
        print(f"| {kind} |", " | ".join(f"{ms:.1f} ({calls:.0f})" for ms, calls in entries), "|")


if __name__ == "__main__":
    main()

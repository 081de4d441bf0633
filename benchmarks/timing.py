"""How everything is timed, and how a gated norm is compared with float64 before it is."""

import time
from collections.abc import Callable

import torch

from benchmarks.providers import Case, reference

STREAM = torch.cuda.Stream() if torch.cuda.is_available() else None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall_times(
    functions: dict[str, Callable], rounds: int, *, warm_up: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Wall milliseconds of each call, by function. Every round calls all of them in turn, so that a
    machine which is slow for a while is slow for all; `warm_up` rounds before do not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-warm_up, rounds):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if number >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def graph_time(function, calls: int = 1) -> float:
    """Microseconds of a call on the GPU: the median over replays of a CUDA graph of `calls`."""
    from triton.testing import do_bench

    with torch.cuda.stream(STREAM):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=STREAM):
        for _ in range(calls):
            function()
    return do_bench(graph.replay, warmup=10, rep=60, return_mode="median") * 1e3 / calls


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """bf16 `x`, `z`, `dy`, fp32 parameters; a strided z is a slice of a packed projection."""
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=g, device="cuda", dtype=dtype)

    rows, width = case.rows, case.width
    packed = randn(rows, 2 * width + 256) if case.z_strided else randn(rows, width)
    return {
        "x": randn(rows, width).requires_grad_(),
        "w": (1 + 0.1 * randn(width, dtype=torch.float32)).requires_grad_(),
        "b": randn(width, dtype=torch.float32).requires_grad_() if case.bias else None,
        "z": packed[:, :width].requires_grad_(),
        "dy": randn(rows, width),
    }


def gradients(function, t) -> list[torch.Tensor]:
    wanted = [v for k, v in t.items() if k in "xwbz" and v is not None]
    return torch.autograd.grad(function(t["x"], t["w"], t["b"], t["z"]), wanted, t["dy"])


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """In the 2-norm."""
    return ((ours.double() - truth).norm() / truth.norm()).item()


def error(case: Case, functions, t) -> float:
    """Largest relative error (2-norm) of the output and the gradients against float64."""
    training, inference = functions
    wide = {k: None if v is None else v.detach().double() for k, v in t.items()}
    for k in "xwbz":
        if wide[k] is not None:
            wide[k].requires_grad_()
    norm = reference(case)
    with torch.no_grad():
        ours, truth = inference(*(t[k] for k in "xwbz")), norm(*(wide[k] for k in "xwbz"))
    worst = [relative_error(ours, truth)]
    if training is not None:
        worst += map(relative_error, gradients(training, t), gradients(norm, wide))
    return max(worst)


def forward_time(inference, t) -> float:
    args = [t[k] for k in "xwbz"]
    with torch.no_grad():
        return graph_time(lambda: inference(*args))


def backward_time(training, t) -> float:
    wanted = [t[k] for k in "xwbz" if t[k] is not None]
    with torch.cuda.stream(STREAM):  # autograd runs the backward on the stream of the forward
        y = training(*(t[k] for k in "xwbz"))
    return graph_time(lambda: torch.autograd.grad(y, wanted, t["dy"], retain_graph=True))


def peak(training, t) -> float:
    """MiB beyond the inputs while a forward and a backward run."""
    gradients(training, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(training, t)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def wall_time(function, calls: int = 1000, device: str = "cuda") -> float:
    """Microseconds per call of a loop with one synchronisation at its end; best of five."""
    function()
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


class EmptyFunction(torch.autograd.Function):
    """What autograd itself costs: outputs of the right sizes, and no kernel."""

    @staticmethod
    def forward(ctx, x, w, z):
        ctx.save_for_backward(x, w, z)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)

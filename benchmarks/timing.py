"""How a gated norm is timed, and compared with float64 before it is."""

import time

import torch

import gatednorm
from benchmarks.ceiling_kernels import do_bench
from benchmarks.providers import EPS, Case

STREAM = torch.cuda.Stream() if torch.cuda.is_available() else None


def median(function) -> float:
    """Microseconds on the GPU."""
    with torch.cuda.stream(STREAM):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=STREAM):
        function()
    return do_bench(graph.replay, warmup=10, rep=60, return_mode="median") * 1e3


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


def error(case: Case, functions, t) -> float:
    """Largest relative error (2-norm) of the output and the gradients against float64."""
    training, inference = functions
    wide = {k: None if v is None else v.detach().double() for k, v in t.items()}
    for k in "xwbz":
        if wide[k] is not None:
            wide[k].requires_grad_()

    def reference(x, w, b, z):
        return gatednorm.gated_norm_ref(
            x, w, b, z, EPS, case.group_size, case.norm_before_gate,
            is_rms_norm=case.is_rms_norm, activation=case.activation,
        )  # fmt: skip

    def distance(ours, truth):
        return ((ours.double() - truth).norm() / truth.norm()).item()

    with torch.no_grad():
        args = [t[k] for k in "xwbz"]
        worst = distance(inference(*args), reference(*(wide[k] for k in "xwbz")))
    if training is not None:
        truth = gradients(reference, wide)
        worst = max([worst, *map(distance, gradients(training, t), truth)])
    return worst


def forward_time(inference, t) -> float:
    args = [t[k] for k in "xwbz"]
    with torch.no_grad():
        return median(lambda: inference(*args))


def backward_time(training, t) -> float:
    wanted = [t[k] for k in "xwbz" if t[k] is not None]
    with torch.cuda.stream(STREAM):  # autograd runs the backward on the stream of the forward
        y = training(*(t[k] for k in "xwbz"))
    return median(lambda: torch.autograd.grad(y, wanted, t["dy"], retain_graph=True))


def both_time(training, t) -> float:
    return median(lambda: gradients(training, t))


def peak(training, t) -> float:
    """MiB beyond the inputs while a forward and a backward run."""
    gradients(training, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(training, t)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def wall_time(function, calls: int = 1000) -> float:
    """Microseconds per call of a loop with one synchronisation at its end; best of five."""
    function()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def graph_time(function, calls: int = 100) -> float:
    """Microseconds per call inside a CUDA graph of `calls` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return do_bench(graph.replay, warmup=5, rep=30, return_mode="median") * 1e3 / calls


class EmptyFunction(torch.autograd.Function):
    """What autograd itself costs: outputs of the right sizes, and no kernel."""

    @staticmethod
    def forward(ctx, x, w, z):
        ctx.save_for_backward(x, w, z)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)

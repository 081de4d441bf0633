"""How everything is timed, and how a gated norm is compared with float64 before it is."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .providers import Functions, Norm, reference

Call = Callable[[], object]


@functools.cache
def stream() -> torch.cuda.Stream | None:
    """For graphs; on the GPU, if any, that is current at its first use."""
    return torch.cuda.Stream() if torch.cuda.is_available() else None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall_times(
    functions: Mapping[str, Call], rounds: int, *, warm_up: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Wall milliseconds of each call, by function. Every round calls all of them in turn, so that a
    machine which is slow for a while is slow for all, and begins with the next one, so that none is
    always the first or the last; `warm_up` rounds before do not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-warm_up, rounds):
        for name in rotated(functions, number):
            synchronize(device)
            start = time.perf_counter()
            functions[name]()
            synchronize(device)
            if number >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def rotated(names: Iterable[str], number: int) -> list[str]:
    """The names, from the one with this number (modulo their count) on."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


def speed_up(plain: list[float], ours: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile over rounds of the ratio within a round."""
    return statistics.quantiles([a / b for a, b in zip(plain, ours, strict=True)], n=4)


def graph_time(function: Call, calls: int = 1) -> float:
    """Microseconds of a call on the GPU: the median over replays of a CUDA graph of `calls`."""
    from ..kernels.ceilings import do_bench

    replay = graph_of(function, calls).replay
    median: float = do_bench(replay, warmup=10, rep=60, return_mode="median")
    return median * 1e3 / calls


def graph_of(function: Call, calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of that many calls, after three that do not count."""
    with torch.cuda.stream(stream()):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only what this thread does: NCCL's own threads ask for events meanwhile.
    with torch.cuda.graph(graph, stream=stream(), capture_error_mode="thread_local"):
        for _ in range(calls):
            function()
    return graph


def ceiling(ways: Iterable[Call]) -> float:
    """Microseconds of the fastest of `ways`, which gatednorm/kernels/ceilings.py makes."""
    return min(graph_time(way) for way in ways)


class Inputs(NamedTuple):
    """`x`, `z`, `dy` `[rows, D]`, parameters `[D]`."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    z: Tensor
    dy: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [t for t in self[:4] if t is not None]


def inputs(case: Case, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Parameters are fp32; a strided z is a slice of a packed projection."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    rows, width = case.rows, case.width
    packed = randn(rows, 2 * width + 256) if case.z_strided else randn(rows, width)
    return Inputs(
        x=randn(rows, width).requires_grad_(),
        w=(1 + 0.1 * randn(width, dtype=torch.float32)).requires_grad_(),
        b=randn(width, dtype=torch.float32).requires_grad_() if case.bias else None,
        z=packed[:, :width].requires_grad_(),
        dy=randn(rows, width),
    )


def gradients(function: Norm, t: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*t[:4]), t.leaves, t.dy)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """In the 2-norm."""
    return float((ours.double() - truth).norm() / truth.norm())


def error(case: Case, functions: Functions, t: Inputs) -> float:
    """Largest relative error (2-norm) of the output and the gradients against float64; NaN where
    one of them is."""

    def wider(v: Tensor) -> Tensor:
        return v.detach().double().requires_grad_()

    training, inference = functions
    b = None if t.b is None else wider(t.b)
    wide = Inputs(wider(t.x), wider(t.w), b, wider(t.z), t.dy.double())
    norm = reference(case)
    with torch.no_grad():
        errors = [relative_error(inference(*t[:4]), norm(*wide[:4]))]
    if training is not None:
        errors += map(relative_error, gradients(training, t), gradients(norm, wide))
    return float(torch.tensor(errors).max())


def forward_time(inference: Norm, t: Inputs) -> float:
    with torch.no_grad():
        return graph_time(lambda: inference(*t[:4]))


def backward_time(training: Norm, t: Inputs) -> float:
    with torch.cuda.stream(stream()):  # autograd runs the backward on the stream of the forward
        y = training(*t[:4])
    return graph_time(lambda: torch.autograd.grad(y, t.leaves, t.dy, retain_graph=True))


def peak(training: Norm, t: Inputs) -> float:
    """MiB beyond the inputs while a forward and a backward run."""
    gradients(training, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(training, t)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def wall_time(function: Call, calls: int = 1000, device: str = "cuda") -> float:
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
    def forward(ctx: Any, x: Tensor, w: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, z)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)

"""What only an NVIDIA GPU can show: real rounding, sizes, bits, copies, graphs, devices, time."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import gatednorm
import sanitized
from gatednorm import gated_norm_ref
from norm_calls import check_that_rows_keep_their_bits, kernels_of, randn
from norm_cases import Case, Layout, inputs_of, same_bits, ulps

pytestmark = pytest.mark.gpu

WIDTHS = [128, 256, 1000, 1001, 2048, 4096, 5120, 8192, 16_384, 20_000]
ORDERS = [pytest.param(True, id="gate_after"), pytest.param(False, id="gate_before")]
NAMES = ("x", "z", "dy", "out", "dx", "dz")


# ---- sizes ----


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_more_than_2_to_31_elements(norm_before_gate):
    """4.3 GB a tensor; rows from the start, around 2^31 elements and the end against float64."""
    width = 512
    rows = 2**31 // width + 1000
    x, z, dy = (randn(rows, width, seed=i) for i in range(3))
    w = randn(width, dtype=torch.float32, seed=3) * 0.3 + 1
    options = {"norm_before_gate": norm_before_gate, "is_rms_norm": True, "eps": 1e-5}
    y, _, rstd = gatednorm.layernorm_forward(x, w, None, z, **options)
    dx, dw, _, dz = gatednorm.layernorm_backward(dy, x, w, None, z, None, rstd, **options)
    edge = 2**31 // width
    picked = torch.tensor([0, 1, rows // 3, edge - 1, edge, edge + 1, rows - 1], device="cuda")
    x64, z64 = (t[picked].double().requires_grad_() for t in (x, z))
    truth = gated_norm_ref(x64, w.double(), None, z64, **options)
    tx, tz = torch.autograd.grad(truth, (x64, z64), dy[picked].double())
    for got, want in ((y, truth), (dx, tx), (dz, tz)):
        scale = want.abs().amax(-1, keepdim=True)
        error = (got[picked].double() - want).abs()
        assert (error <= 2**-8 * want.abs() + 1e-5 * scale).all()
    # dw: the rows in parts, each within 32 bits
    want = torch.zeros(width, dtype=torch.float64, device="cuda")
    for part in torch.arange(rows, device="cuda").split(2**17):
        u = x[part].double()
        act = torch.nn.functional.silu(z[part].double())
        u = u if norm_before_gate else u * act
        xhat = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-5)
        g = dy[part].double() * (act if norm_before_gate else 1)
        want += (g * xhat).sum(0)
    assert ((dw.double() - want).abs() <= 1e-4 * want.abs() + 1e-5 * rows**0.5 * 10).all()


# ---- bits ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_batch_does_not_change_a_row(norm_before_gate, width, dtype):
    """The same as under the interpreter, with more rows and widths, and in inference."""
    rows = 301
    x, z, dy = (randn(rows, width, dtype=dtype, seed=i) for i in range(3))
    w = randn(width, dtype=dtype, seed=3)
    options = {"norm_before_gate": norm_before_gate, "is_rms_norm": True}

    def run(x, z, dy):
        y, _, rstd = gatednorm.layernorm_forward(x, w, None, z, **options)
        dx, _, _, dz = gatednorm.layernorm_backward(dy, x, w, None, z, None, rstd, **options)
        assert same_bits(y, gatednorm.rms_norm_gated(x, w, None, z, **options))
        return y, dx, dz

    parts = [slice(0, n) for n in (1, 2, 3, 7, 32, 64, 129, 300)]
    parts += [slice(1, None), slice(5, 6), slice(100, 137), slice(3, 300), slice(None, None, 3)]
    check_that_rows_keep_their_bits(run, [x, z, dy], parts)


@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
def test_parameter_gradients_repeat(width):
    """`dw` and `db` from 20 runs, with other work in between: the same bits."""
    x, z, dy = (randn(5000, width, seed=i) for i in range(3))
    w, b = (randn(width, dtype=torch.float32, seed=i) for i in (3, 4))
    _, mean, rstd = gatednorm.layernorm_forward(x, w, b, z)
    first = None
    for _ in range(20):
        _, dw, db, _ = gatednorm.layernorm_backward(dy, x, w, b, z, mean, rstd)
        first = first or (dw, db)
        assert same_bits(dw, first[0])
        assert same_bits(db, first[1])
        torch.randn(1000, 1000, device="cuda").sum()


@pytest.mark.parametrize("numerics", ["fp32", "mamba2", "qwen3_next", "torchtitan"])
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize(
    ("is_rms_norm", "groups", "width"),
    [(True, 1, 128), (True, 8, 1024), (False, 1, 2048), (True, 1, 5120), (True, 1, 20_000)],
)
def test_bf16_bits_of_the_reference(is_rms_norm, groups, width, norm_before_gate, numerics):
    """At least 99.99% of two million elements; the rest one unit off.

    Where a value is rounded early, an error of fp32 can move that by one unit, and a product after
    it makes two of one (1.0 times 1.99 has units half as large, relative to it): two for `mamba2`
    and `torchtitan`, with the weight or the gate after the rounding, and four for `qwen3_next`,
    with weight and gate.

    Layer norm subtracts the mean: an element that lies next to it keeps the fp32 error of the mean,
    many units of its own last place, and is held to 4 fp32 units of its row's largest instead."""
    rows = 2**21 // (width * groups)
    x, z = (randn(rows, width * groups, seed=i) for i in range(2))
    w = randn(width * groups, seed=2)
    options = {
        "norm_before_gate": norm_before_gate, "is_rms_norm": is_rms_norm, "numerics": numerics,
        "group_size": width,
    }  # fmt: skip
    got = gatednorm.layernorm_fn(x, w, None, z, **options)
    want = gated_norm_ref(x, w, None, z, **options)

    # Results near 0 differ by more units than they carry digits: subnormal sigmoids and the like.
    off = ulps(got, want)
    judged = want.abs() > 1e-30
    if not is_rms_norm:
        row_scale = want.double().abs().amax(-1, keepdim=True)
        judged &= (got.double() - want.double()).abs() > 2**-22 * row_scale
    off = torch.where(judged, off, 0)
    assert int(off.max()) <= {"fp32": 1, "mamba2": 2, "qwen3_next": 4, "torchtitan": 2}[numerics]
    share = float((off > 0).double().mean())
    assert share <= 1e-4, f"{share:.4%} differ"


# ---- copies, kernels, memory ----


def peak_of(function) -> int:
    """Bytes allocated at the peak beyond what was there, in the second call."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize(
    ("outer", "layout"),
    [
        pytest.param((4096,), Layout(left=64, right=192), id="packed_slice"),
        pytest.param((512, 8), Layout(order=(1, 0), right=64), id="heads_outside"),
        pytest.param((4, 8, 128), Layout(order=(0, 2, 1), left=64), id="batch_heads_time"),
    ],
)
def test_no_copies(outer, layout, norm_before_gate):
    """sglang#38749: with every tensor strided, one kernel forward and two backward, and no memory
    but the statistics and the partial sums."""
    case = Case(
        outer, 128, 1, norm_before_gate=norm_before_gate, dtype=torch.bfloat16,
        layouts=dict.fromkeys(NAMES, layout),
    )  # fmt: skip
    i = inputs_of(case, "cuda")
    given = (i.x, i.weight, None, i.z)
    out, dx, dz = (layout.empty(case.shape, case.dtype, "cuda")[0] for _ in range(3))
    options = {"is_rms_norm": True, **case.options}

    def forward():
        return gatednorm.layernorm_forward(*given, **options, out=out)

    _, mean, rstd = forward()

    def backward():
        gatednorm.layernorm_backward(i.dy, *given, mean, rstd, **options, dx=dx, dz=dz)

    def inference():
        gatednorm.rms_norm_gated(*given, **case.options, out=out)

    assert [name.startswith("forward_kernel") for name in kernels_of(inference)] == [True]
    assert [name.startswith("forward_kernel") for name in kernels_of(forward)] == [True]
    ran = kernels_of(backward)
    assert [name.split("_kernel")[0] for name in ran] == ["backward", "reduce"], ran
    tensor = i.x.numel() * i.x.element_size()
    assert peak_of(inference) == 0
    assert peak_of(forward) <= 4 * 4096 + 512
    assert peak_of(backward) < tensor / 2 + 2**20
    torch.testing.assert_close(out, gated_norm_ref(*given, **case.options))


def test_training_launches_three_kernels():
    """Through autograd, with a strided gate: no copy kernel, no fill kernel."""
    x = randn(4096, 128).requires_grad_()
    z = randn(4096, 512)[:, 128:256].requires_grad_()
    w = randn(128).requires_grad_()
    dy = randn(4096, 256)[:, :128]

    def step():
        torch.autograd.grad(gatednorm.rmsnorm_fn(x, w, None, z), (x, w, z), dy)

    names = [name.split("_kernel")[0] for name in kernels_of(step)]
    assert names == ["forward", "backward", "reduce"]


def test_peak_memory_of_a_training_step():
    """Forward: the result and `rstd`. Backward: `dx`, `dz`, small sums."""
    x, z = (randn(2**15, 1024, seed=i).requires_grad_() for i in range(2))
    w = randn(1024).requires_grad_()
    dy = randn(2**15, 1024)
    tensor = x.numel() * 2

    def step():
        torch.autograd.grad(gatednorm.rmsnorm_fn(x, w, None, z), (x, w, z), dy)

    assert peak_of(step) <= 3 * tensor + 2**15 * 4 + 2**23


# ---- graphs, streams, devices, compilation ----


@pytest.mark.parametrize("width", [128, 1001, 20_000], ids="D{}".format)
def test_cuda_graph(width):
    """Captured once, replayed on other values: forward, backward and inference."""
    x, z, dy = (randn(100, width, seed=i) for i in range(3))
    w = randn(width, seed=3)

    def step():
        y, _, rstd = gatednorm.layernorm_forward(x, w, None, z, is_rms_norm=True)
        grads = gatednorm.layernorm_backward(dy, x, w, None, z, None, rstd, is_rms_norm=True)
        return y, grads[0], grads[1], grads[3], gatednorm.rms_norm_gated(x, w, None, z)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (10, 20):
        for i, t in enumerate((x, z, dy)):
            t.copy_(randn(100, width, seed=seed + i))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert same_bits(got, want)


def test_kernels_follow_the_current_stream():
    """Launched on a side stream behind slow work: the result waits for that work."""
    x, z = randn(64, 128), randn(64, 128, seed=1)
    gatednorm.rms_norm_gated(x, z=z)
    fresh = randn(64, 128, seed=2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
        y = gatednorm.rms_norm_gated(x, z=z)
    stream.synchronize()
    assert same_bits(y, gatednorm.rms_norm_gated(fresh, z=z))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("width", [128, 20_000], ids="D{}".format)
def test_second_device_while_the_first_is_current(width):
    case = Case((50,), width, 1, False, bias=True)
    there, here = inputs_of(case, "cuda:1"), inputs_of(case, "cuda:0")
    assert torch.cuda.current_device() == 0
    for _ in range(2):  # the first call compiles, the second goes straight to the kernel
        results = []
        for i in (there, here):
            given = [t.detach().requires_grad_() for t in (i.x, i.weight, i.bias, i.z)]
            y = gatednorm.layernorm_fn(*given, **case.options)
            results.append([y, *torch.autograd.grad(y, given, i.dy)])
        for a, b in zip(*results, strict=True):
            assert a.device.index == 1
            torch.testing.assert_close(a.cpu(), b.cpu())
            assert same_bits(results[0][0].cpu(), results[1][0].cpu())
    assert torch.cuda.current_device() == 0


def test_inductor_keeps_the_bits():
    """Compiled with its neighbours, dynamic shapes: the same kernel, the same bits."""
    torch._dynamo.reset()
    norm = gatednorm.RMSNorm(256, norm_before_gate=False, group_size=64, device="cuda")
    compiled = torch.compile(norm, fullgraph=True, dynamic=True)
    for rows in (17, 64, 301):
        x, z, dy = (randn(rows, 256, seed=i) for i in range(3))
        results = []
        for function in (norm, compiled):
            leaves = [t.detach().requires_grad_() for t in (x, z)]
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y, (*leaves, norm.weight), dy)))
        for got, want in zip(*results, strict=True):
            assert same_bits(got, want)
    torch._dynamo.reset()


def test_float64_is_refused():
    x = torch.ones(4, 8, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float64 runs on the CPU only.*\.cpu\(\)"):
        gatednorm.rmsnorm_fn(x)
    with pytest.raises(ValueError, match=r"weight must be on the device of x, got cpu and cuda"):
        gatednorm.rmsnorm_fn(x.float(), torch.ones(8))


FIRST_CALL = """
import sys, time
import torch, gatednorm
options = dict(norm_before_gate=False)
warm = torch.randn(4, 32, device="cuda", requires_grad=True)
weight = torch.ones(int(sys.argv[1]), device="cuda", requires_grad=True)
# PyTorch imports sympy, two seconds of it, when a gradient is first handed to backward().
gatednorm.rmsnorm_fn(warm, z=warm, **options).backward(torch.ones_like(warm))
x, z = (
    torch.randn(1000, weight.numel(), device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in "xz"
)
dy = torch.randn_like(x)
torch.cuda.synchronize()
start = time.perf_counter()
y = gatednorm.rmsnorm_fn(x, weight, None, z, **options)
torch.cuda.synchronize()
forward = time.perf_counter() - start
y.backward(dy)
torch.cuda.synchronize()
print(forward, time.perf_counter() - start - forward)
"""


@pytest.mark.parametrize("width", [128, 5120, 16_384, 20_000], ids="D{}".format)
def test_first_call_of_a_new_shape(width, tmp_path):
    """Compiled for the first time on this machine, forward and backward each in under two seconds;
    the best of three, since other tests compile on the same cores."""
    best = [float("inf")] * 2
    for attempt in range(3):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL, str(width)],
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / str(attempt))},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        best = [min(pair) for pair in zip(best, map(float, done.stdout.split()), strict=True)]
        if max(best) < 2.0:
            break
    assert max(best) < 2.0, best


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
@pytest.mark.parametrize(
    ("tool", "clean"),
    [
        pytest.param("memcheck", "= ERROR SUMMARY: 0 errors", id="memcheck"),
        pytest.param("racecheck", "= RACECHECK SUMMARY: 0 hazards", id="racecheck"),
    ],
)
def test_compute_sanitizer(tool, clean):
    """Every schedule of tests/helpers/sanitized.py, clean: no access outside of a tensor, no race
    between the threads of a program."""
    script = sanitized.__file__
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, script],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert clean in done.stdout, done.stdout[-2000:]
    assert all(name in done.stdout for name in sanitized.SHAPES)

"""Norm and projection in FP8: three products of values that the reference quantises, against
float64; and that gradients pass straight through the rounding."""

import re

import pytest
import torch
import torch.nn.functional as F

import gatednorm
from gatednorm import GatedNormLinear, fp8, gated_norm_linear, linear_fp8, quantize_fp8_ref
from norm_cases import Case, Layout, inputs_of, poisoned_memory

N = 128
CASES = [
    (Case((5,), 128), False),
    (Case((130,), 128, 1, norm_before_gate=False), False),  # two blocks of tokens
    (
        Case((3,), 64, 2, False, dtype=torch.float16, bias=True, layouts={"x": Layout(left=3)}),
        False,
    ),
    (Case((2, 3, 4), 64, activation="sigmoid", layouts={"x": Layout(left=3)}), True),
    (Case((5, 2), 64, 1, False, gated=False, weight=False, numerics="mamba2"), True),
]


def dequantised(t, columns=False, square=False):
    """`[rows, K]` in float64, as the product reads it: with scales along K, or along the rows, for
    each value's 128 neighbours or for a square."""
    t = t.float()
    rows = len(t)
    if columns:
        t = F.pad(t.t(), (0, -rows % 128))
    values, scales = quantize_fp8_ref(t, "128x128" if square else "1x128")
    wide = scales.double().repeat_interleave(128, 1)
    if square:
        wide = wide.repeat_interleave(128, 0)
    wide = values.double() * wide
    return wide.t()[:rows] if columns else wide


def close(mine, exact, dtype):
    """To a few roundings in fp32, and one to the dtype."""
    eps = torch.finfo(dtype).eps
    scale = exact.abs().max()
    assert ((mine.double() - exact).abs() <= 1e-5 * scale + eps * exact.abs()).all()


@pytest.mark.parametrize(("case", "heads"), CASES, ids=[case.id() for case, _ in CASES])
def test_the_three_products_and_the_gradients(path, case, heads):
    dtype = case.dtype
    i = inputs_of(case, path.device)
    width = case.width * (case.outer[-1] if heads else 1)
    outer = case.outer[:-1] if heads else case.outer
    g = torch.Generator().manual_seed(1)
    linear, offset, dout = (
        torch.randn(*shape, generator=g).to(path.device, dtype)
        for shape in ((N, width), (N,), (*outer, N))
    )
    options = {"is_rms_norm": case.is_rms_norm, **case.options}
    leaves = [
        None if t is None else t.detach().requires_grad_()
        for t in (i.x, i.z, i.weight, linear, i.bias, offset)
    ]
    x, z, w, lw, b, lb = leaves
    given = [t for t in leaves if t is not None]
    with poisoned_memory():
        out = gated_norm_linear(
            x, z, w, lw, bias=b, linear_bias=lb, precision="fp8_emulated", **options
        )
        got = torch.autograd.grad(out, given, dout)

    wide = gatednorm.rms_norm_gated(
        i.x, i.weight, i.bias, i.z, **options, out_dtype=torch.float32
    ).view(-1, width)
    flat = dout.reshape(-1, N)
    product = dequantised(wide) @ dequantised(linear, square=True).t()
    product = product.to(dtype).double()
    close(out.detach().view(-1, N), product + offset.double(), dtype)
    dy = (dequantised(flat) @ dequantised(linear, columns=True, square=True)).to(dtype)
    dlinear = dequantised(flat, columns=True).t() @ dequantised(wide, columns=True, square=True)
    norm = [
        None if t is None else t.detach().double().requires_grad_()
        for t in (i.x, i.weight, i.bias, i.z)
    ]
    y = gatednorm.gated_norm_ref(*norm, **options)
    present = [t for t in norm if t is not None]
    found = iter(torch.autograd.grad(y, present, dy.view(y.shape).double()))
    dx, dw, db, dz = (None if t is None else next(found) for t in norm)
    exact = [dx, dz, dw, dlinear, db, flat.double().sum(0)]
    exact = [t for t, leaf in zip(exact, leaves, strict=True) if leaf is not None]
    for mine, truth, leaf in zip(got, exact, given, strict=True):
        assert mine.dtype == leaf.dtype
        eps = 4 * torch.finfo(dtype).eps if case.numerics == "fp32" else 0.05
        assert (mine.double() - truth).norm() <= eps * truth.norm(), mine.shape


def test_gradients_pass_straight_through(path):
    """Close to those without FP8: its values have three bits after the first."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, device=path.device) for shape in ((70, 128), (70, 128), (128,))]
    leaves = [t.requires_grad_() for t in (*leaves, torch.randn(N, 128, device=path.device) / 16)]
    dout = torch.randn(70, N, device=path.device)
    results = []
    for precision in (None, "fp8_emulated"):
        out = gated_norm_linear(*leaves, precision=precision)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    for plain, ours in zip(*results, strict=True):
        assert 0 < (ours - plain).norm() < 0.06 * plain.norm()


def test_the_graph_holds_what_it_does_without_fp8(path):
    x, z = (torch.randn(32, 128, device=path.device, requires_grad=True) for _ in range(2))
    linear = torch.randn(N, 128, device=path.device, requires_grad=True)

    def held(precision):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({(t.data_ptr(), t.shape): t.numel() * t.element_size()}) or t,
            lambda t: t,
        ):
            out = gated_norm_linear(x, z, None, linear, precision=precision)
        assert out.requires_grad
        return sum(saved.values())

    assert held("fp8_emulated") == held(None)


def test_autocast_gives_its_dtype(path):
    x = torch.randn(4, 128, device=path.device, requires_grad=True)
    linear = torch.randn(N, 128, device=path.device, requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = gated_norm_linear(x, x, None, linear, precision="fp8_emulated")
    plain = gated_norm_linear(x, x, None, linear, precision="fp8_emulated")
    assert torch.equal(out, plain.bfloat16())  # the product itself is still in fp32
    out.sum().backward()
    assert x.grad.dtype == linear.grad.dtype == torch.float32


def test_the_module(path):
    module = GatedNormLinear(
        64, N, num_heads=2, linear_bias=True, precision="fp8_emulated", device=path.device
    )
    x, z = torch.randn(2, 5, 2, 64, device=path.device).unbind(0)
    norm, linear = module.norm, module.linear
    want = gated_norm_linear(
        x, z, norm.weight, linear.weight, linear_bias=linear.bias, eps=1e-5,
        precision="fp8_emulated",
    )  # fmt: skip
    assert torch.equal(module(x, z), want)
    linear.register_forward_hook(lambda m, i, out: out)  # called, so not in FP8
    assert torch.equal(module(x, z), linear(norm(x, z).flatten(-2)))


def test_it_compiles_into_one_graph_for_any_number_of_rows(path):
    module = GatedNormLinear(128, N, precision="fp8_emulated", device=path.device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x, z = torch.randn(2, rows, 128, device=path.device).unbind(0)
        grads = []
        for function in (module, compiled):
            out = function(x, z)
            grads.append([out.detach(), *torch.autograd.grad(out.sum(), list(module.parameters()))])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused(path):
    x = torch.randn(4, 128, device=path.device, requires_grad=True)
    linear = torch.randn(N, 128, device=path.device, requires_grad=True)
    out = gated_norm_linear(x, x, None, linear, precision="fp8_emulated")
    for grad in torch.autograd.grad(out.sum(), (x, linear), create_graph=True):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad.sum().backward(retain_graph=True)


X, LINEAR = torch.ones(4, 128), torch.ones(N, 128)
MISTAKES = {
    "name": ({"precision": "bf16"}, ValueError, "precision must be one of fp8, fp8_emulated, got"),
    "columns": (
        {"x": X[:, :96], "z": None, "linear_weight": LINEAR[:, :96]}, ValueError,
        "multiple of 128 columns with precision='fp8_emulated', got [128, 96]; use precision=None",
    ),
    "rows": ({"linear_weight": LINEAR[:100]}, ValueError, "multiple of 128 rows"),
    "device": (
        {"precision": "fp8"}, *(
            (ValueError, "needs an NVIDIA GPU of compute capability 9.0")
            if hasattr(torch.nn.functional, "scaled_mm")
            else (RuntimeError, "which PyTorch has from 2.10 on")
        ),
    ),
    "quantised": ({"linear_weight": LINEAR.to(torch.float8_e4m3fn)}, TypeError, "by its scales"),
    "weight": ({"linear_weight": LINEAR[0]}, ValueError, "linear_weight must be [N, D]"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "rule"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input_is_one_clear_error(arguments, error, rule):
    given = {
        "x": X, "z": X, "weight": None, "linear_weight": LINEAR, "precision": "fp8_emulated",
        **arguments,
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(rule)) as caught:
        gated_norm_linear(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "capability", "cuda", "found"),
    [
        ("cuda", (9, 0), "12.9", None),
        ("cuda", (9, 0), "13.0", None),
        ("cuda", (9, 0), "12.8", "CUDA 12.8"),
        ("cuda", (10, 0), "13.0", "compute capability 10.0"),
        ("cpu", (9, 0), "13.0", "cpu"),
    ],
)
def test_a_gpu_without_the_products(monkeypatch, kind, capability, cuda, found):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert linear_fp8.lacks_products(torch.device(kind)) == found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_emulation_on_the_meta_device(compiled):
    block = GatedNormLinear(128, 256, precision="fp8_emulated", device="meta")
    x = torch.empty(3, 128, device="meta", requires_grad=True)
    call = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    out = call(x, torch.empty(3, 128, device="meta"))
    assert (out.shape, out.dtype) == ((3, 256), torch.float32)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_emulation_on_a_gpu_that_cannot_convert(path, monkeypatch):
    """By the norm's own kernels in fp32, and plain PyTorch: the same values."""
    i = inputs_of(Case((3,), 128, 2, False, bias=True), path.device)
    linear, results = torch.randn(128, 256, device=path.device).requires_grad_(), []
    for lacks in (None, "compute capability 8.0"):
        monkeypatch.setattr(fp8, "_lacks_fp8", lambda device, lacks=lacks: lacks)
        by_pytorch = fp8.backend(i.x.device).__name__ == "gatednorm.cpu_fp8"
        assert by_pytorch == (lacks is not None or not path.kernels)
        x = i.x.detach().requires_grad_()
        options = {"is_rms_norm": False, "group_size": 128, "precision": "fp8_emulated"}
        y = gatednorm.gated_norm_linear(x, i.z, i.weight, linear, bias=i.bias, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, linear))))
    for converted, plain in zip(*results, strict=True):
        torch.testing.assert_close(converted, plain, rtol=1e-4, atol=1e-4)


def test_a_weight_with_strides(path):
    x, linear = torch.randn(4, 128, device=path.device), torch.randn(128, N, device=path.device).t()
    strided, dense = (
        gated_norm_linear(x, x, None, weight, precision="fp8_emulated")
        for weight in (linear, linear.contiguous())
    )
    assert torch.equal(strided, dense)


def test_a_module_refuses_a_precision_that_is_not_there():
    with pytest.raises(ValueError, match="precision must be one of fp8, fp8_emulated, got 'int8'"):
        GatedNormLinear(128, N, precision="int8")


def test_a_torch_without_the_product(monkeypatch):
    monkeypatch.delattr(F, "scaled_mm", raising=False)
    with pytest.raises(RuntimeError, match=r"PyTorch has from 2\.10 on, got PyTorch .*_emulated"):
        linear_fp8.check_precision("fp8", X, LINEAR)


def test_no_tokens(path):
    x, linear = (torch.ones(n, 128, device=path.device, requires_grad=True) for n in (0, N))
    out = gated_norm_linear(x, None, None, linear, precision="fp8_emulated")
    assert out.shape == (0, N)
    dx, dlinear = torch.autograd.grad(out.sum(), [x, linear])
    assert dx.shape == (0, 128)
    assert not dlinear.any()

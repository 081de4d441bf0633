"""Layers of flash-linear-attention and mamba_ssm's combined scan with our norm inside: results and
gradients as with their own. Needs these packages, of which the Triton files are enough, and a GPU;
layers also run on a CPU, small, under Triton's interpreter."""

import importlib
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

import gatednorm
from gatednorm.compat import common
from paths import GPU, TRITON

needs_fla = pytest.mark.skipif(
    not importlib.util.find_spec("fla"), reason="needs flash-linear-attention"
)
LAYERS = {
    "ABCAttention": {"num_heads": 4, "use_output_gate": True},
    "Comba": {"num_heads": 4, "head_dim": 128, "expand_v": 1},
    "DeltaNet": {"num_heads": 4, "use_gate": True, "mode": "fused_recurrent"},  # not chunks in fp32
    "GatedDeltaNet": {"num_heads": 4, "head_dim": 128, "expand_v": 1},
    "GatedLinearAttention": {"num_heads": 2},
    "HGRNAttention": {},
    "KimiDeltaAttention": {"num_heads": 4, "head_dim": 128},
    "LightNetAttention": {},
    "MesaNet": {"num_heads": 4, "head_dim": 128, "use_output_gate": True},
    "MultiScaleRetention": {"num_heads": 2},
}
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 2e-2}  # relative, in the 2-norm
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def full_products(monkeypatch):
    """The peers' scans multiply fp32 in TF32 unless told otherwise, which turns one unit of the
    norm's last place into an error of 1e-5. ("ieee" takes minutes to compile.)"""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")


def assert_close(ours, theirs, dtype) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= BOUNDS[dtype], f"{name}: {error:.2e}"


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the doors' functions that are called."""
    names = []

    def spy(name):
        function = getattr(common, name)

        def call(*args):
            names.append(name)
            return function(*args)

        monkeypatch.setattr(common, name, call)

    spy("fused_gated_norm")
    spy("fused_gated_norm_linear")
    return names


def compare(layer, x, dtype, calls) -> None:
    dy = torch.randn_like(x)

    def results():
        y = layer(x)[0]
        wanted = {"x": x} | dict(layer.named_parameters())
        try:
            grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        except RuntimeError as error:
            if "Hopper" not in str(error):  # its refusal, with Triton 3.4 to 3.7.0
                raise
            grads = []
        pairs = zip(wanted, grads, strict=False)
        return {"y": y} | {key: grad for key, grad in pairs if grad is not None}

    theirs = results()
    assert not calls
    with gatednorm.patch("fla"):
        ours = results()
    assert calls
    assert_close(ours, theirs, dtype)


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.gpu
@needs_fla
def test_layer_of_fla(name, dtype, calls):
    torch.manual_seed(0)
    cls = getattr(importlib.import_module("fla.layers"), name)
    layer = cls(hidden_size=512, layer_idx=0, **LAYERS[name]).to("cuda", dtype)
    x = torch.randn(2, 256, 512, device="cuda", dtype=dtype, requires_grad=True)
    compare(layer, x, dtype, calls)


def interpreted_range(*args):
    """Kernels loop over tensors; Triton's interpreter gives them Python's integers."""
    import triton.language as tl

    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
        frame = frame.f_back
    if frame is None:  # called by host code
        return range(*args)
    numbers = (getattr(arg, "value", arg) for arg in args)
    numbers = (int(n.handle.data.item()) if hasattr(n, "handle") else n for n in numbers)
    return [tl.full([], i, tl.int32) for i in range(*numbers)]


@pytest.fixture
def interpreter(monkeypatch):
    """What flash-linear-attention's kernels need to run under Triton's interpreter: one
    configuration each, and loops over tensors."""
    from triton.runtime.autotuner import Autotuner

    importlib.import_module("fla.layers")
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops.", "fla.modules.")):
            monkeypatch.setattr(module, "range", interpreted_range, raising=False)
            for kernel in list(vars(module).values()):
                while hasattr(kernel, "fn"):
                    if isinstance(kernel, Autotuner):
                        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
                    kernel = kernel.fn


# The interpreter has no constants of bf16, and loses what retention does in it.
NOT_INTERPRETED = {"KimiDeltaAttention", "LightNetAttention"}
NOT_IN_BF16 = {"ABCAttention", "MesaNet", "MultiScaleRetention"}
INTERPRETED = [
    pytest.param(name, dtype, id=f"{name}-{kind}")
    for dtype, kind, without in (
        (torch.float32, "fp32", NOT_INTERPRETED),
        (torch.bfloat16, "bf16", NOT_INTERPRETED | NOT_IN_BF16),
    )
    for name in sorted(LAYERS.keys() - without)
]


@pytest.mark.parametrize(("name", "dtype"), INTERPRETED)
@pytest.mark.skipif(GPU or not TRITON, reason="for a machine without a GPU")
@pytest.mark.slow
@needs_fla
def test_layer_of_fla_under_the_interpreter(name, dtype, interpreter, calls):
    torch.manual_seed(0)
    small = {"num_heads": 2, "head_dim": 32}
    options = {key: small.get(key, value) for key, value in LAYERS[name].items()}
    cls = getattr(importlib.import_module("fla.layers"), name)
    x = torch.randn(1, 64, 64, dtype=dtype, requires_grad=True)
    compare(cls(hidden_size=64, layer_idx=0, **options).to(dtype), x, dtype, calls)


def conv_forward(x, weight, bias, seq_idx, initial, final, silu):
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    y = y[..., : x.shape[-1]]
    return F.silu(y) if silu else y


def conv_backward(x, weight, bias, dy, seq_idx, initial, dfinal, dx, dinitial, silu):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = conv_forward(*inputs, None, None, None, silu)
    return *torch.autograd.grad(y, inputs, dy), None


@DTYPES
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "no-projection"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("groups", [1, 4], ids="groups={}".format)
@pytest.mark.gpu
def test_combined_scan_of_mamba(groups, norm_before_gate, projection, dtype, monkeypatch):
    scan = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", exc_type=ImportError)
    # causal_conv1d is compiled code, and not what is compared here
    monkeypatch.setattr(scan, "causal_conv1d_fwd_function", conv_forward)
    monkeypatch.setattr(scan, "causal_conv1d_bwd_function", conv_backward)
    heads, head_dim, state, tokens = 8, 64, 64, 256
    dim, conv_dim = heads * head_dim, heads * head_dim + 2 * groups * state

    def randn(*shape, kind=dtype, scale=1.0):
        return (scale * torch.randn(*shape, device="cuda")).to(kind).requires_grad_()

    torch.manual_seed(0)
    leaves = {
        "zxbcdt": randn(2, tokens, dim + conv_dim + heads),
        "conv1d_weight": randn(conv_dim, 4, scale=0.5),
        "conv1d_bias": randn(conv_dim, scale=0.5),
        "dt_bias": randn(heads, kind=torch.float32),
        "A": (-torch.rand(heads, device="cuda") - 0.5).requires_grad_(),
        "D": randn(heads, kind=torch.float32),
        "rmsnorm_weight": randn(dim, kind=torch.float32),
    }
    if projection:
        leaves["outproj_weight"] = randn(128, dim, scale=dim**-0.5)
    options = {"chunk_size": 128, "headdim": head_dim, "ngroups": groups}
    dy = torch.randn(2, tokens, 128 if projection else dim, device="cuda", dtype=dtype)

    def results():
        y = scan.mamba_split_conv1d_scan_combined(
            **leaves, **options, norm_before_gate=norm_before_gate
        )
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y} | dict(zip(leaves, grads, strict=True))

    theirs, pair = results(), (scan._layer_norm_fwd, scan._layer_norm_bwd)
    with gatednorm.patch("mamba_ssm"):
        assert scan._layer_norm_fwd is not pair[0]
        assert scan._layer_norm_bwd is not pair[1]
        ours = results()
    assert (scan._layer_norm_fwd, scan._layer_norm_bwd) == pair
    assert_close(ours, theirs, dtype)

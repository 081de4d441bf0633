"""FP8 on an NVIDIA GPU: the hardware's rounding, and the products that read what is written."""

import pytest
import torch
import torch.nn.functional as F

import gatednorm
from gatednorm import gated_norm_linear, quantize_fp8_ref, rms_norm_gated_fp8
from norm_calls import check_that_rows_keep_their_bits, kernels_of, randn
from norm_cases import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU with FP8",
    ),
]
HOPPER = pytest.mark.skipif(
    not hasattr(F, "scaled_mm")
    or not torch.cuda.is_available()
    or torch.cuda.get_device_capability()[0] != 9,
    reason="needs PyTorch 2.10 and an H100 or H200",
)
ORDERS = [pytest.param(True, id="gate_after"), pytest.param(False, id="gate_before")]
# shape, group_size, heads
SHAPES = [
    pytest.param((301, 128), None, False, id="D128"),
    pytest.param((301, 32, 128), None, True, id="H32-D128"),
    pytest.param((301, 4, 64), None, True, id="H4-D64"),
    pytest.param((301, 4096), None, False, id="D4096"),
    pytest.param((301, 5120), 640, False, id="g640-D5120"),
    pytest.param((301, 8192), None, False, id="D8192"),
    pytest.param((301, 12_288), None, False, id="D12288"),
    pytest.param((301, 16_384), None, False, id="D16384"),
    pytest.param((301, 20_480), None, False, id="D20480"),
]


def scale_of(scaling):
    return torch.tensor(0.01, device="cuda") if scaling == "tensorwise" else None


@pytest.mark.parametrize("scaling", ["1x128", "rowwise", "tensorwise"])
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("layer_norm", [False, True], ids=["rms", "layer_norm-bias"])
@pytest.mark.parametrize(("shape", "group_size", "heads"), SHAPES)
def test_bytes_of_the_reference_whatever_the_batch(
    shape, group_size, heads, layer_norm, norm_before_gate, scaling
):
    """Also with a row of zeros and one with an infinity, and with every other row left out."""
    x, z = (randn(*shape, seed=i) for i in range(2))
    x[1] = 0
    x.view(-1, shape[-1])[-1, 3] = float("inf")
    w = randn(shape[-1], dtype=torch.float32, seed=2)
    b = randn(shape[-1], dtype=torch.float32, seed=3) if layer_norm else None
    options = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    options["is_rms_norm"] = not layer_norm

    def run(x, z):
        y, scales = rms_norm_gated_fp8(
            x, w, b, z, **options, scaling=scaling, scale=scale_of(scaling), heads=heads
        )
        return (y, scales) if scaling != "tensorwise" else (y,)

    wide = gatednorm.rms_norm_gated(x, w, b, z, **options, out_dtype=torch.float32)
    values, scales = quantize_fp8_ref(wide.flatten(1), scaling, scale_of(scaling))
    y, *found = run(x, z)
    lost = values.float().isnan()
    assert torch.equal(y.float().isnan(), lost)
    assert torch.equal(y.view(torch.uint8)[~lost], values.view(torch.uint8)[~lost])
    if found:
        assert torch.equal(found[0].nan_to_num(-1), scales.nan_to_num(-1))
    check_that_rows_keep_their_bits(run, [x[:70], z[:70]], [slice(0, 1), slice(3, 40)])


@pytest.mark.parametrize("scaling", ["1x128", "rowwise", "tensorwise"])
@pytest.mark.parametrize(("heads", "width"), [(1, 4096), (32, 128)])
def test_one_kernel_with_strided_inputs(heads, width, scaling):
    """And no copy; a row of several heads with one scale takes a second kernel."""
    shape = (300, heads, width) if heads > 1 else (300, width)
    x, z = randn(*shape[:-1], 3 * width)[..., width:].chunk(2, -1)
    scale = scale_of(scaling)
    ran = kernels_of(
        lambda: rms_norm_gated_fp8(x, None, None, z, scaling=scaling, scale=scale, heads=heads > 1)
    )
    names = [name.split("_kernel")[0] for name in ran]
    two = heads > 1 and scaling == "rowwise"
    assert names == ["forward", "quantize_rows"] if two else ["forward"]


@HOPPER
@pytest.mark.parametrize("scaling", ["1x128", "rowwise", "tensorwise"])
@pytest.mark.parametrize("rows", [300, 1024])
def test_the_product_reads_what_is_written(scaling, rows):
    """`scaled_mm` of our values and scales is that of the reference's, and the product of what
    they stand for, but for the rounding to bf16 and within the product."""
    x, z, linear = randn(rows, 1024), randn(rows, 1024, seed=1), randn(512, 1024, seed=2)
    y, scales = rms_norm_gated_fp8(x, None, None, z, scaling=scaling, scale=scale_of(scaling))
    wide = gatednorm.rms_norm_gated(x, None, None, z, out_dtype=torch.float32)
    values, wanted = quantize_fp8_ref(wide, scaling, scale_of(scaling))
    w, w_scales = quantize_fp8_ref(linear.float(), scaling, scale_of(scaling))
    kinds = {"1x128": "BlockWise1x128", "rowwise": "RowWise", "tensorwise": "TensorWise"}
    recipe = getattr(F.ScalingType, kinds[scaling])

    def product(values, scales):
        across = w_scales.t() if scaling == "rowwise" else w_scales
        return F.scaled_mm(values, w.t(), scales, recipe, across, recipe)

    def stands_for(values, scales):
        scales = scales.double().repeat_interleave(128, 1) if scaling == "1x128" else scales
        return values.double() * scales

    ours = product(y, scales)
    assert same_bits(ours, product(values, wanted))
    exact = stands_for(y, scales) @ stands_for(w, w_scales).t()
    assert (ours.double() - exact).norm() < 0.01 * exact.norm()


@HOPPER
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
def test_training_is_its_emulation(norm_before_gate, heads, dtype):
    """Outputs and gradients: the same FP8 values, multiplied by the GPU and in fp32; with weights
    in bf16, and in fp32 under autocast, as train.py has them."""
    shape = (3, 301, heads, 128) if heads > 1 else (3, 301, 1024)
    x, z, w = randn(*shape), randn(*shape, seed=1), randn(shape[-1], dtype=torch.float32, seed=2)
    linear, offset = (randn(768, 1024, seed=3) / 32).to(dtype), randn(768, seed=4).to(dtype)
    dout = randn(3, 301, 768, seed=5)
    results = []
    for precision in ("fp8", "fp8_emulated"):
        leaves = [t.detach().requires_grad_() for t in (x, z, w, linear, offset)]
        x_, z_, w_, linear_, offset_ = leaves
        with torch.autocast("cuda", torch.bfloat16):
            out = gated_norm_linear(
                x_, z_, w_, linear_, linear_bias=offset_, norm_before_gate=norm_before_gate,
                precision=precision,
            )  # fmt: skip
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    for ours, emulated in zip(*results, strict=True):
        assert ours.dtype == emulated.dtype
        error = (ours.double() - emulated.double()).norm()
        assert error < 0.005 * emulated.double().norm()

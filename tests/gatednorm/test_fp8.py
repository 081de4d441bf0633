"""FP8 output: bytes and scales of the reference, whatever the options, on both paths."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import gatednorm
from gatednorm import autograd, fp8, quantize_fp8_ref, rms_norm_gated_fp8
from gatednorm.options import GIVEN
from norm_calls import check_that_rows_keep_their_bits
from norm_cases import Case, Layout, inputs_of, poisoned_memory, same_bits
from paths import TRITON

if TRITON:
    import triton
    import triton.language as tl

    from gatednorm.kernels import launch, launch_fp8, tiles
    from gatednorm.kernels.fp8 import to_fp8

    @triton.jit
    def convert_kernel(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, to_fp8(tl.load(x_ptr + i)))


E4M3 = torch.float8_e4m3fn
STRIDED = {"x": Layout(left=3), "z": Layout(right=5)}
CASES = [
    (Case((5,), 256), "1x128"),
    (Case((3, 2), 256, 2, norm_before_gate=False, zero_centered=True), "1x128"),
    (Case((5,), 640, 1, False, bias=True, activation="sigmoid"), "1x128"),  # two pieces
    (Case((3,), 384, 1, weight=False, gated=False, layouts=STRIDED), "1x128"),
    (Case((5,), 32, 8, bias=True, layouts=STRIDED), "1x128"),  # blocks that span groups
    (Case((130,), 96), "mxfp8"),  # padded rows and blocks
    (Case((3,), 608, 1, False, bias=True, norm_before_gate=False), "mxfp8"),  # two pieces
    (Case((3,), 64, 2, numerics="qwen3_next", layouts=STRIDED), "mxfp8"),
    (Case((3,), 48, 2), "mxfp8"),  # blocks that span groups
    (Case((130,), 80, 1, False, bias=True), "nvfp4"),  # padded rows and blocks
    (Case((3,), 4112, 1, norm_before_gate=False), "nvfp4"),  # two chunks
    (Case((19,), 40), "rowwise"),  # tiles of many rows
    (Case((3,), 1000, 1, False, bias=True, norm_before_gate=False), "rowwise"),
    (Case((3,), 48, 3, numerics="qwen3_next"), "rowwise"),
    (Case((3,), 1536, 1, gated=False, numerics="mamba2"), "rowwise"),  # two pieces
    (Case((5,), 129, 1, zero_centered=True, layouts=STRIDED), "tensorwise"),
    (Case((3,), 600, 2, False, norm_before_gate=False), "tensorwise"),
    (Case((7, 2), 8, 2, layouts={"x": Layout(order=(1, 0))}), "tensorwise"),
]
HEADS = [
    (Case((5, 3), 128), "1x128"),
    (Case((2, 3, 4), 64), "1x128"),  # blocks that span heads
    (Case((2, 4), 32, 2, False, bias=True), "1x128"),
    (Case((5, 3), 32), "mxfp8"),
    (Case((5, 4), 24), "nvfp4"),
    (Case((5, 3), 24), "rowwise"),
    (Case((5, 3), 24, layouts={"x": Layout(order=(1, 0), left=8)}), "tensorwise"),
]


def id_of(value):
    return value.id() if isinstance(value, Case) else value


def scale_of(scaling, device):
    return torch.tensor(0.01, device=device) if scaling in GIVEN else None


def both(case, scaling, heads, device):
    """Ours and the reference of our fp32 result: values `[rows, K]`, scales."""
    i = inputs_of(case, device)
    given, options = (i.x, i.weight, i.bias, i.z), {"is_rms_norm": case.is_rms_norm, **case.options}
    scale = scale_of(scaling, device)
    before = i.snapshot()
    with poisoned_memory():
        ours = rms_norm_gated_fp8(*given, **options, scaling=scaling, scale=scale, heads=heads)
    assert i.unchanged_since(before)
    wide = gatednorm.rms_norm_gated(*given, **options, out_dtype=torch.float32)
    shape = (*case.outer[:-1], case.outer[-1] * case.width) if heads else case.shape
    stored = shape[-1] // 2 if scaling == "nvfp4" else shape[-1]
    assert ours[0].shape == (*shape[:-1], stored)
    theirs = quantize_fp8_ref(wide.view(-1, shape[-1]), scaling, scale)
    return (ours[0].view(-1, stored), ours[1]), theirs


@pytest.mark.parametrize(
    ("case", "scaling", "heads"),
    [(*pair, False) for pair in CASES] + [(*pair, True) for pair in HEADS],
    ids=id_of,
)
def test_bytes_and_scales(path, case, scaling, heads):
    case = replace(case, dtype=torch.float16 if case.outer[0] == 3 else torch.float32)
    (y, scales), (values, wanted) = both(case, scaling, heads, path.device)
    assert same_bits(y, values)
    assert same_bits(scales, wanted)
    rows, width = y.shape
    layout = {"1x128": ((rows, width // 128), (1, rows)), "rowwise": ((rows, 1), (1, rows))}
    if scaling in layout:
        assert (scales.shape, scales.stride()) == layout[scaling]


@pytest.mark.parametrize("scaling", ["1x128", "rowwise", "128x128"])
def test_the_reference_against_float64(scaling):
    """The largest value of what shares a scale is 448, and no value is off by more than half a step
    of its three bits, or of the smallest numbers."""
    y = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 3
    y *= torch.logspace(-8, 8, 256)[:, None]
    values, scales = quantize_fp8_ref(y, scaling)
    rows, columns = 256 // len(scales), 512 // scales.shape[1]
    wide = scales.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def largest(t):
        return t.double().abs().view(256 // rows, rows, 512 // columns, columns).amax((1, 3))

    assert (largest(values) == 448).all()
    error = (values.double() * wide - y.double()).abs()
    assert (error <= torch.maximum(y.double().abs() * 2**-4, wide * 2**-10) * 1.0001).all()
    assert ((scales / (largest(y) / 448) - 1).abs() < 1e-6).all()


def test_the_conversion_rounds_as_torch_does(kernels):
    """Every number of the format, what lies halfway between two, and next to that; what is too
    large is the largest."""
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    numbers = numbers[numbers.isfinite()].unique()
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middle, torch.tensor([0.0, -0.0, 449, 464, 465, -1e9, 1e-30, -1e-45])])
    up, down = (torch.nextafter(x, torch.tensor(far)) for far in (1e30, -1e30))
    x = torch.cat([x, up, down, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    x = F.pad(x, (0, 2048 - len(x))).to(kernels.device)
    y = torch.empty(2048, dtype=E4M3, device=kernels.device)
    convert_kernel[(1,)](x, y, 2048)
    assert same_bits(y, x.clamp(-448, 448).to(E4M3))


@pytest.mark.parametrize("value", [0.0, 1.0, 448.0, 449.0, 1e-20, float("inf"), float("nan")])
def test_a_power_of_two_for_each_32_columns(path, value):
    """The smallest that leaves no value above 448; `swizzled` is undone by hand."""
    x = torch.ones(130, 192, device=path.device)
    z = torch.full_like(x, 1e3)
    z[129, 160:] = value
    y, scales = rms_norm_gated_fp8(x, None, None, z, activation="silu", scaling="mxfp8", eps=0)
    assert scales.shape == (256, 8)
    flat = scales.view(torch.uint8).flatten()
    byte = int(flat[(1 * 2 + 1) * 512 + 1 * 16 + 0 * 4 + 1])  # row 129, block 5
    silu = float(F.silu(torch.tensor(value)))
    if value == value and value != float("inf"):
        wanted = 127 + math.ceil(math.log2(max(silu, 1e-12) / 448))
        assert byte == wanted
        step = 2.0 ** (byte - 127)
        assert (y[129, 160:].float() * step - silu).abs().max() <= silu * 2**-4 + step * 2**-10
    else:
        assert byte == 255
        assert y[129, 160:].float().isnan().all()
    first = flat.view(2, 2, 32, 4, 4)
    assert (first[0] == 127 + 2)[0].all()  # 1000 / 448 lies between 2 and 4


def test_pairs_of_four_bits_with_two_scales(path):
    """Every number of the format, what lies halfway and beyond, and blocks that are zero, small,
    large or infinite: codes and scales written by hand."""
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5: 6, 5.001: 7}
    row, codes = torch.zeros(96), torch.zeros(96, dtype=torch.int32)
    row[:16], codes[:16] = torch.tensor([*numbers, *(-n for n in numbers)]), torch.arange(16)
    row[16:32] = torch.tensor([*ties, *(-n for n in ties)])
    codes[16:32] = torch.tensor([*ties.values(), *(8 + code for code in ties.values())])
    row[31], codes[31] = -6, 15
    row[33], codes[33] = -1e-7, 8
    row[48], row[64], codes[64] = float("inf"), 6e4, 7
    x, given = torch.ones(130, 96, device=path.device), torch.tensor(0.5, device=path.device)
    w = row.to(path.device)  # the result of every row
    y, scales = rms_norm_gated_fp8(x, w, scaling="nvfp4", scale=given, eps=0)
    assert (y.shape, y.dtype) == ((130, 48), torch.float4_e2m1fn_x2)
    assert (scales.shape, scales.dtype) == ((256, 8), E4M3)
    pairs = (codes[::2] | codes[1::2] << 4).to(torch.uint8).to(path.device)
    assert (y.view(torch.uint8) == pairs).all()
    tiles = scales.view(torch.uint8).view(2, 2, 32, 4, 4)  # as of MXFP8
    for tile, r, quarter in ((0, 0, 0), (0, 31, 3), (1, 1, 0)):  # rows 0, 127 and 129
        found = tiles[tile, :, r, quarter].flatten().tolist()
        assert found == [0x40, 0x40, 0x08, 0x7F, 0x7E, 0x08, 0, 0]


@pytest.mark.parametrize("scaling", ["1x128", "rowwise"])
def test_rows_of_zeros_infinities_and_large_values(path, scaling):
    """They touch no other row; what is multiplied again is NaN where it was not finite."""
    x = torch.randn(6, 256, device=path.device)
    plain, plain_scales = rms_norm_gated_fp8(x, scaling=scaling)
    x[1] = 0
    x[2, 3], x[3, 200] = float("inf"), float("nan")
    y, scales = rms_norm_gated_fp8(x, scaling=scaling)
    for row in (0, 4, 5):
        assert same_bits(y[row], plain[row])
        assert same_bits(scales[row], plain_scales[row])
    assert not y[1].float().any()
    assert (scales[1] == torch.tensor(1e-12) * (1 / 448)).all()
    wide = y.float() * scales.repeat_interleave(256 // scales.shape[1], 1)
    assert wide[3].isnan().all()  # the whole row: its root is NaN
    assert wide[2, 3].isnan()
    gate = torch.zeros(1, 256, device=path.device)
    gate[0, 0] = float("inf")  # one infinite result: its block, or its row, is lost
    y, scales = rms_norm_gated_fp8(torch.ones_like(gate), z=gate, scaling=scaling)
    wide = y.float() * scales.repeat_interleave(256 // scales.shape[1], 1)
    lost = 128 if scaling == "1x128" else 256
    assert wide[0, :lost].isnan().all()
    assert not wide[0, lost:].any()


def test_a_given_scale_saturates(path):
    x = torch.tensor([[1.0, -1.0, 0.5, float("nan")]], device=path.device)
    w = torch.tensor([1e6, 1e6, 1e-6, 1.0], device=path.device)
    scale = torch.tensor(0.5, device=path.device)
    y, found = rms_norm_gated_fp8(x[:, :3], w[:3], scaling="tensorwise", scale=scale)
    assert found is scale
    assert y.float().tolist() == [[448.0, -448.0, 0.0]]
    assert rms_norm_gated_fp8(x, w, scaling="tensorwise", scale=scale)[0].float().isnan().all()
    again, _ = rms_norm_gated_fp8(x[:, :3], w[:3], scaling="tensorwise", scale=scale.view(1, 1, 1))
    assert same_bits(again.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize(("width", "rows"), [(128, 19), (640, 6)], ids=["D128", "D640"])
@pytest.mark.parametrize("scaling", ["1x128", "rowwise"])
def test_batch_does_not_change_a_row(kernels, width, rows, scaling):
    case = Case((rows,), width, 1, False, bias=True)
    i = inputs_of(case, kernels.device)

    def run(x, z):
        return rms_norm_gated_fp8(x, i.weight, i.bias, z, is_rms_norm=False, scaling=scaling)

    parts = [slice(0, 1), slice(1, None), slice(None, None, 3)]
    check_that_rows_keep_their_bits(run, [i.x, i.z], parts)


@pytest.mark.parametrize(
    ("shape", "group_size", "scaling", "heads", "kernels_run"),
    [
        ((3, 256), None, "1x128", False, 1),
        ((3, 256), 128, "1x128", False, 1),
        ((3, 2, 128), None, "1x128", True, 1),
        ((3, 40), None, "rowwise", False, 1),
        ((3, 2, 40), 8, "tensorwise", True, 1),
        ((3, 2, 64), None, "1x128", True, 2),
        ((3, 256), 128, "rowwise", False, 2),
        ((3, 2, 128), None, "rowwise", True, 2),
    ],
)
def test_one_kernel_where_a_program_has_what_shares_a_scale(
    kernels, monkeypatch, shape, group_size, scaling, heads, kernels_run
):
    second = []
    quantize = launch_fp8.quantize_rows
    monkeypatch.setattr(
        launch_fp8, "quantize_rows", lambda *given: second.append(1) or quantize(*given)
    )
    x = torch.ones(shape, device=kernels.device)
    scale = scale_of(scaling, kernels.device)
    rms_norm_gated_fp8(x, group_size=group_size, scaling=scaling, scale=scale, heads=heads)
    assert 1 + len(second) == kernels_run


def test_wide_rows(kernels, monkeypatch):
    """Groups in chunks, and rows that are quantised in several pieces."""
    monkeypatch.setattr(tiles, "WIDEST", 255)
    monkeypatch.setattr(tiles, "CHUNK", 256)
    monkeypatch.setattr(launch_fp8, "WIDEST", 256)
    monkeypatch.setattr(launch_fp8, "CHUNK", 256)
    launch_fp8._rows_launcher.cache_clear()
    launch._forward_launchers.cache_clear()
    try:
        for width, scaling in ((640, "1x128"), (640, "rowwise"), (700, "rowwise")):
            ours, theirs = both(Case((3,), width), scaling, False, kernels.device)
            assert all(map(same_bits, ours, theirs))
        ours, theirs = both(Case((3,), 64, 10), "1x128", False, kernels.device)
        assert all(map(same_bits, ours, theirs))
        chosen = launch.forward_tile
        halves = {"block_a": 128, "block_b": 128}  # as of 16384 columns
        monkeypatch.setattr(launch, "forward_tile", lambda *a: chosen(*a)._replace(**halves))
        ours, theirs = both(Case((5,), 250), "rowwise", False, kernels.device)
        assert all(map(same_bits, ours, theirs))
    finally:
        launch_fp8._rows_launcher.cache_clear()
        launch._forward_launchers.cache_clear()


COLUMNS = [
    (Case((130,), 128), False),
    (Case((3,), 64, 6, norm_before_gate=False, layouts=STRIDED), False),
    (Case((2, 5), 256, 1, False, bias=True, numerics="qwen3_next"), False),
    (Case((5, 3), 64, 4, False, activation="sigmoid", zero_centered=True), True),
    (Case((2, 3, 4), 32, weight=False), True),  # a tile has several heads
    (Case((3,), 128, gated=False, layouts={"x": Layout(expand=True)}), False),
]


@pytest.mark.parametrize(("case", "heads"), COLUMNS, ids=id_of)
def test_columns_of_the_result(path, case, heads):
    """What the gradient of the projection's weight reads, from what the forward kept."""
    i = inputs_of(replace(case, dtype=torch.float16), path.device)
    given, options = (i.x, i.weight, i.bias, i.z), {"is_rms_norm": case.is_rms_norm, **case.options}
    wide, mean, rstd = gatednorm.layernorm_forward(*given, **options, out_dtype=torch.float32)
    values = [options[name] for name in gatednorm.options.Options._fields[:-2]]
    made = gatednorm.options.make_options(*values, None, None)
    found = fp8.norm_columns(*given, mean, rstd, made, heads)
    columns = wide.reshape(-1, case.width * (case.outer[-1] if heads else 1)).t()
    padded = F.pad(columns, (0, -columns.shape[1] % 128))
    assert all(map(same_bits, found, quantize_fp8_ref(padded, "128x128")))


@pytest.mark.parametrize("asked", ["rows", "columns", "both"])
@pytest.mark.parametrize("square", [False, True], ids=["1x128", "128x128"])
def test_rows_and_columns_of_a_tensor(path, asked, square):
    rows = 256 if square else 133
    x = torch.randn(rows, 384, device=path.device)
    scaling = "128x128" if square else "1x128"
    wanted = [x, F.pad(x.t(), (0, -rows % 128))]
    wanted = {"rows": wanted[:1], "columns": wanted[1:], "both": wanted}[asked]
    sides = {side: asked in (side, "both") for side in ("rows", "columns")}
    if square and asked == "both":
        with pytest.raises(ValueError, match="along rows or along columns, got both"):
            fp8.quantize(x, **sides, square=True)
        return
    found = fp8.quantize(x, **sides, square=square)
    for ours, exact in zip(found, wanted, strict=True):
        values, scales = quantize_fp8_ref(exact, scaling)
        assert same_bits(ours[0], values)
        assert same_bits(ours[1], scales)
        assert ours[1].stride() == scales.stride()


def test_no_rows(path):
    y, scales = rms_norm_gated_fp8(torch.ones(0, 256, device=path.device))
    assert (y.shape, y.dtype, scales.shape) == ((0, 256), E4M3, (0, 2))


@pytest.mark.parametrize("scaling", fp8.SCALINGS)
def test_it_compiles_into_one_graph_for_any_number_of_rows(path, scaling):
    scale = scale_of(scaling, path.device)

    def norm(x, z):
        return rms_norm_gated_fp8(x * 2, None, None, z, scaling=scaling, scale=scale, heads=True)

    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x, z = torch.randn(2, rows, 2, 128, device=path.device).unbind(0)
        for got, want in zip(compiled(x, z), norm(x, z), strict=True):
            assert same_bits(got, want)
            assert got.stride() == want.stride()


def test_the_operators(path):
    """Schemas, fake results and what they do not touch, by PyTorch's own check."""
    x, z = torch.randn(2, 5, 2, 64, device=path.device).unbind(0)
    w, scale = torch.randn(64, device=path.device), torch.tensor(0.1, device=path.device)
    options = (1e-6, None, True, False, "silu", False, "fp32")
    tests = ("test_schema", "test_faketensor")
    for given, more in ((None, ("1x128", True, True)), (scale, ("tensorwise", False, False))):
        arguments = (x, w, None, z, given, *options, *more)
        torch.library.opcheck(autograd.ops.forward_fp8.default, arguments, test_utils=tests)
    _, _, mean, rstd = autograd.ops.forward_fp8(x, w, None, z, None, *options, "1x128", True, True)
    arguments = (x, w, None, z, mean, rstd, *options, True)
    torch.library.opcheck(autograd.ops.norm_columns.default, arguments, test_utils=tests)
    for asked in ((True, True, False), (False, True, True)):
        arguments = (x.view(5, -1), *asked)
        torch.library.opcheck(autograd.ops.quantize.default, arguments, test_utils=tests)


X = torch.ones(4, 2, 96)
BAD = {
    "x": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "scaling": ({"scaling": "blockwise"}, ValueError, "tensorwise, mxfp8, nvfp4, got"),
    "heads": ({"heads": 2}, TypeError, "heads must be True or False, got 2"),
    "no_heads": ({"x": X[0, 0], "z": None, "heads": True}, ValueError, "got shape (96,); pass"),
    "width": ({}, ValueError, "a multiple of 128 channels with scaling='1x128', got 96; use"),
    "mx_width": (
        {"scaling": "mxfp8", "x": X[..., :40], "z": None}, ValueError,
        "a multiple of 32 channels with scaling='mxfp8', got 40; use",
    ),
    "heads_width": ({"heads": True}, ValueError, "with scaling='1x128', got 192; use"),
    "no_scale": ({"scaling": "tensorwise"}, ValueError, "or 'nvfp4' alone, got None and"),
    "a_scale": (
        {"scaling": "rowwise", "scale": torch.ones(())}, ValueError,
        "got one of shape () and scaling='rowwise'; pass",
    ),
    "scale_shape": (
        {"scaling": "tensorwise", "scale": torch.ones(2)}, ValueError,
        "scale must be one float32 number, got torch.float32 of shape (2,); pass",
    ),
    "scale_dtype": (
        {"scaling": "tensorwise", "scale": torch.ones(()).half()}, ValueError,
        "scale must be one float32 number, got torch.float16 of shape (); pass",
    ),
    "scale_device": (
        {"scaling": "tensorwise", "scale": torch.ones((), device="meta")}, ValueError,
        "scale must be on the device of x, got meta and cpu; move it",
    ),
    "scale_type": ({"scaling": "tensorwise", "scale": 0.1}, TypeError, "scale must be a torch"),
    "gate": ({"scaling": "rowwise", "z": X[0]}, ValueError, "z must have the shape of x, got"),
    "strides": (
        {"scaling": "rowwise", "x": X.mT, "z": None}, ValueError, "x.contiguous(), which copies it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "rule"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(launched, arguments, error, rule):
    with pytest.raises(error, match=re.escape(rule)) as caught:
        rms_norm_gated_fp8(**{"x": X, "z": X, **arguments})
    assert "\n" not in str(caught.value)
    assert launched == []


@pytest.mark.parametrize(
    ("device", "capability", "hip", "found"),
    [
        ("cuda", (8, 0), None, "compute capability 8.0"),
        ("cuda", (9, 4), "6.4", "cuda"),
        ("xpu", None, None, "xpu"),
    ],
)
def test_a_gpu_without_fp8(monkeypatch, device, capability, hip, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(ValueError, match=rf"8\.9 or above, or a CPU, got {found}; use rms_norm"):
        fp8.check_device(torch.device(device, 0))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_a_gpu_with_fp8(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fp8.check_device(torch.device("cuda", 0))


def test_a_graph_is_not_cut(path):
    x = torch.ones(2, 128, device=path.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="rms_norm_gated_fp8 is for inference, and x requires"):
        rms_norm_gated_fp8(x)

"""The Triton kernels: every schedule, the same bits whatever lies around a row, one kernel."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gatednorm
from norm_calls import ORDERS, check_that_rows_keep_their_bits
from norm_cases import (
    Case,
    Layout,
    check,
    inputs_of,
    same_bits,
    through_buffers,
)
from paths import GPU, TRITON

if TRITON:
    from gatednorm import autograd, call, cpu
    from gatednorm.kernels import forward as forward_module
    from gatednorm.kernels import launch, rows, tiles


def forget_launchers() -> None:
    """Empty every cache of tiles and launchers, so that changed sizes take effect."""
    for module in (autograd, launch, call):
        for value in vars(module).values():
            if value is not autograd.backend and hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def change_tiles(monkeypatch):
    """Set attributes of `launch`, or of `tiles`, for one test; launchers made before and during it
    are forgotten."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(tiles if name in ("WIDEST", "CHUNK") else launch, name, value)
        forget_launchers()

    yield change
    monkeypatch.undo()
    forget_launchers()


@pytest.fixture
def launches(kernels, monkeypatch) -> list:
    """Every kernel object that is started through Triton, in order."""
    started = []
    kind = type(forward_module.forward_kernel)
    start = kind.__getitem__

    def recorded(kernel, grid):
        started.append(kernel)
        return start(kernel, grid)

    monkeypatch.setattr(kind, "__getitem__", recorded, raising=False)
    forget_launchers()  # a compiled kernel that was kept would be started without Triton
    yield started
    forget_launchers()


SOME_FAST = [
    case if i in (0, 3) else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
    for i, case in enumerate(ORDERS)
]


def kinds_of_tile() -> dict[tuple, int]:
    """The smallest width for each schedule of the launcher: pieces, chunks, other switches."""
    sizes = {"rows", "block_a", "block_b", "chunks", "num_warps", "stages", "workers_per_sm"}
    sizes.add("maxnreg")
    found = {}
    for n in [*range(1, 3000), *range(3000, 20_000, 257), 5120, 8192, 12_288, 16_384]:
        kind = []
        pair = tiles.forward_tile(n, False, True), tiles.backward_tile(n, False, True)
        for tile in pair:
            kind += [tile.block_b > 0, tile.chunks > 1, tile.rows > 1]
            kind += [value for name, value in tile._asdict().items() if name not in sizes]
        full = n % (pair[0].block_a + pair[0].block_b) == 0
        found.setdefault((*kind, full), n)
    return found


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), SOME_FAST)
def test_every_schedule(kernels, is_rms_norm, norm_before_gate, gated):
    """One width for each kind of tile, groups, rows that do not fill the last tile."""
    for width in kinds_of_tile().values():
        groups, rows = (1, 2) if width > 1024 else (2, 3)
        if width < 256:
            rows = tiles.forward_tile(width, True, norm_before_gate).rows + 1
        case = Case((rows,), width, groups, is_rms_norm, norm_before_gate, gated, bias=True)
        check(case, kernels.device)


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
@pytest.mark.parametrize("width", [17, 32, 40], ids="D{}".format)
def test_wide_schedule(kernels, change_tiles, width, is_rms_norm, norm_before_gate, gated):
    """Groups in chunks, forced at small widths: whole and partial last chunks."""
    change_tiles(WIDEST=15, CHUNK=16)
    assert tiles.forward_tile(width, True, True).chunks == -(-width // 16)
    layouts = {"x": Layout(left=3), "z": Layout(right=5), "dz": Layout(left=1, right=1)}
    numerics = {17: "fp32", 32: "mamba2", 40: "qwen3_next"}[width]
    case = Case(
        (3, 1), width, 2, is_rms_norm, norm_before_gate, gated, bias=True, numerics=numerics,
        zero_centered=width == 32, dtype=torch.float16, layouts=layouts,
    )  # fmt: skip
    check(case, kernels.device, through_buffers)
    check(replace(case, dtype=torch.float32, bias=False), kernels.device)


@pytest.mark.parametrize(
    ("width", "is_rms_norm", "norm_before_gate"),
    [
        pytest.param(131_072, True, True, id="D131072-rms-gate_after"),
        pytest.param(70_001, False, False, id="D70001-layer-gate_before"),
    ],
)
def test_rows_above_64_kilobytes(kernels, width, is_rms_norm, norm_before_gate):
    rows = 2 if width < 100_000 else 1
    check(Case((rows,), width, 1, is_rms_norm, norm_before_gate), kernels.device)


SWITCHES = {
    "parameters not kept": {"hoist": False},
    "row read again": {"reload": "memory"},
    "row kept": {"reload": "registers", "hoist": False},
    "row read again, parameters too": {"reload": "memory", "hoist": False},
}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
def test_backward_switches(kernels, change_tiles, switches, is_rms_norm, norm_before_gate, gated):
    """What the backward keeps in registers is a matter of speed; in one piece and two."""
    chosen = launch.backward_tile
    change_tiles(backward_tile=lambda *args: chosen(*args)._replace(**SWITCHES[switches]))
    dtype = torch.float16 if switches == "row kept" else torch.float32  # kept are 16 bits alone
    layouts = {"x": Layout(left=8), "z": Layout(left=3, right=1), "dy": Layout(right=5)}
    for width in (48, 600):
        case = Case(
            (3,), width, 2, is_rms_norm, norm_before_gate, gated, bias=True, dtype=dtype,
            layouts=layouts,
        )  # fmt: skip
        check(case, kernels.device)


@pytest.mark.parametrize(
    ("width", "rows", "warps", "spread"),
    [
        pytest.param(1300, 1, 1, (1, 1), id="D1300-1_warp"),
        pytest.param(1300, 1, 4, (4, 4), id="D1300-4_warps"),
        pytest.param(600, 2, 2, (2, 1), id="D600-2_warps_and_1"),
    ],
)
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
def test_sums_across_warps(kernels, change_tiles, is_rms_norm, width, rows, warps, spread):
    """A row in two pieces, each spread over as many warps as the other, or over fewer."""
    forward, backward = launch.forward_tile, launch.backward_tile
    change_tiles(
        forward_tile=lambda *args: forward(*args)._replace(rows=rows, num_warps=warps),
        backward_tile=lambda *args: backward(*args)._replace(rows=rows, num_warps=warps),
    )
    for tile in (launch.forward_tile(width, True, True), launch.backward_tile(width, True, True)):
        assert (tile.sum_layout()["WARPS_A"], tile.sum_layout()["WARPS_B"]) == spread
    check(Case((3,), width, 1, is_rms_norm, bias=True), kernels.device)


@pytest.mark.parametrize("workers", [1, 2, 5, 70])
def test_any_number_of_workers(kernels, change_tiles, workers):
    """Each worker walks over several row tiles; the last share is smaller than the others. The sums
    of many are added up in several steps."""
    chosen = launch.backward_tile
    change_tiles(
        backward_tile=lambda *args: chosen(*args)._replace(rows=2, workers_per_sm=workers),
        _multiprocessors=lambda device: 1,
        reduce_tile=lambda *args: (32, 8, 4),
    )
    for rows in (1, 2, 9, 23) if workers < 70 else (141,):
        check(Case((rows,), 40, 1, False, bias=True), kernels.device)
    if workers == 1:  # a row in two pieces
        check(Case((5,), 600, 1, False, bias=True), kernels.device)


# ---- the same bits ----

WIDTHS = [1, 17, 128, 600, 1001, 4097]


@pytest.mark.parametrize("ranks", [2, 3, 6, 16])
@pytest.mark.parametrize("numbers", [1, 2], ids=["rms", "layer"])
@pytest.mark.parametrize("rows", [1, 300])
def test_what_ranks_know(kernels, rows, numbers, ranks):
    """Put together as on the CPU, but for the last bit of a root; nothing beyond the rows."""
    parts = torch.randn(ranks, numbers, rows, generator=torch.Generator().manual_seed(0)).exp()
    given = parts.to(kernels.device)
    for eps in (None, 0.5):
        truth = torch.empty(2, rows)
        found = torch.full((2, rows + 1), float("nan"), device=kernels.device)
        for module, where, (one, two) in ((cpu, parts, truth), (launch, given, found[:, :rows])):
            module.combine(where, one, two if numbers == 2 else None, eps)
        found = found.cpu()
        torch.testing.assert_close(found[:numbers, :rows], truth[:numbers], rtol=3e-7, atol=0)
        assert found[numbers:].isnan().all()
        assert found[:, rows:].isnan().all()


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
def test_batch_does_not_change_a_row(kernels, width, is_rms_norm, norm_before_gate, gated):
    """vllm#57280: any number of rows, any position, aligned or not; at two
    widths the gradients too."""
    rows = 70 if width < 256 else 6
    case = Case((rows,), width, 1, is_rms_norm, norm_before_gate, gated, bias=True)
    i = inputs_of(case, kernels.device)
    options = {"is_rms_norm": is_rms_norm, **case.options}

    def run(x, z, dy):
        given = (x, i.weight, i.bias, z)
        y, *stats = gatednorm.layernorm_forward(*given, **options)
        if width not in (17, 600) or norm_before_gate != is_rms_norm:
            return (y,)
        dx, _, _, dz = gatednorm.layernorm_backward(dy, *given, *stats, **options)
        return (y, dx, dz) if gated else (y, dx)

    parts = [slice(0, 1), slice(1, None), slice(2, 5), slice(3, -2), slice(None, None, 2)]
    check_that_rows_keep_their_bits(run, [i.x, i.z, i.dy], parts)


@pytest.mark.parametrize("width", [48, 64], ids="D{}".format)
def test_a_row_whose_squares_overflow(kernels, width):
    """Their mean is infinite, whatever the width, and the row becomes zeros as in the reference."""
    x = torch.linspace(-1, 1, 3 * width, device=kernels.device).reshape(3, width)
    x[1] *= 1e30
    y = gatednorm.rmsnorm_fn(x)
    assert not y[1].any()
    torch.testing.assert_close(y, gatednorm.gated_norm_ref(x))


# ---- one kernel, no copies ----


@pytest.mark.parametrize(("is_rms_norm", "norm_before_gate", "gated"), ORDERS)
def test_both_roles_start_one_kernel(launches, kernels, is_rms_norm, norm_before_gate, gated):
    """vllm#35423: duplicates that drifted apart. Training and inference start the same kernel
    object once each, and their bits are equal."""
    case = Case((9,), 64, 2, is_rms_norm, norm_before_gate, gated, bias=True)
    i = inputs_of(case, kernels.device)
    given = (i.x, i.weight, i.bias, i.z)
    results = []
    for function, kwargs in (
        (gatednorm.layernorm_fn, {}), (gatednorm.rms_norm_gated, {}),
        (gatednorm.layernorm_forward, {}), (gatednorm.rms_norm_gated, {"out": i.x.clone()}),
    ):  # fmt: skip
        launches.clear()
        forget_launchers()
        result = function(*given, is_rms_norm=is_rms_norm, **case.options, **kwargs)
        results.append(result[0] if isinstance(result, tuple) else result)
        assert launches == [forward_module.forward_kernel]
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(left=8, right=24), id="packed_slice"),
        pytest.param(Layout(order=(1, 0), left=8, right=24), id="heads_outside"),
    ],
)
def test_views_reach_the_kernels_as_they_are(kernels, monkeypatch, layout):
    """sglang#38749: strided gates were copied. The launchers get the caller's memory."""
    seen = []
    for name, run in (("forward", launch.forward), ("backward", launch.backward)):

        def spy(call, *tensors, run=run):
            seen.append(tensors)
            return run(call, *tensors)

        monkeypatch.setattr(launch, name, spy)
    names = ("x", "z", "dy")
    case = Case((4, 3), 16, 2, norm_before_gate=False, layouts=dict.fromkeys(names, layout))
    i = inputs_of(case, kernels.device)
    given = (i.x, i.weight, i.bias, i.z)
    out, dx, dz = (layout.empty(case.shape, case.dtype, kernels.device)[0] for _ in range(3))
    options = {"is_rms_norm": True, **case.options}
    _, mean, rstd = gatednorm.layernorm_forward(*given, **options, out=out)
    gatednorm.layernorm_backward(i.dy, *given, mean, rstd, **options, dx=dx, dz=dz)
    backward = (i.dy, *given, mean, rstd, dx, dz, None, True)
    for got, want in zip(seen, [(*given, out, mean, rstd), backward], strict=True):
        for a, b in zip(got, want, strict=True):
            assert a is b or (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())


@pytest.mark.parametrize(
    "outer", [pytest.param((3,), id="rows"), pytest.param((2, 2, 2), id="three_outer_dims")]
)
def test_offsets_beyond_32_bits(kernels, outer):
    """Rows more than 2^31 elements apart; of the memory between them nothing is touched."""
    far, width = 2**31 + 16, 24
    strides = {1: (far,), 3: (far, 32, 8 * 32)}[len(outer)]
    small = torch.randn(*outer, width, generator=torch.Generator().manual_seed(0)).half()
    small = small.to(kernels.device)
    last = sum((n - 1) * s for n, s in zip(outer, strides, strict=True)) + width

    def distant():
        return torch.empty(last, dtype=torch.half, device=kernels.device).as_strided(
            (*outer, width), (*strides, 1)
        )

    x, dx = distant(), distant()
    x.copy_(small)
    y, _, rstd = gatednorm.layernorm_forward(x, z=small, is_rms_norm=True)
    want, _, _ = gatednorm.layernorm_forward(small, z=small, is_rms_norm=True)
    assert same_bits(y, want)
    args = (None, None, small, None, rstd)
    gatednorm.layernorm_backward(small, x, *args, is_rms_norm=True, dx=dx)
    want = gatednorm.layernorm_backward(small, small, *args, is_rms_norm=True)[0]
    assert same_bits(dx.contiguous(), want)


def test_every_masked_load_says_what_lies_outside():
    """A masked load without `other` is undefined on a GPU; the interpreter would return zeros."""
    files = Path(forward_module.__file__).parent.glob("*.py")
    trees = [ast.parse(file.read_text()) for file in files]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "tl.load"]
    assert len(loads) > 5
    for load in loads:
        given = {keyword.arg for keyword in load.keywords}
        assert "mask" not in given or "other" in given, ast.unparse(load)


def test_what_runs_the_kernels(kernels):
    """The GPU, or the interpreter: the tests above ran kernels and not the closed form."""
    assert (not GPU) == rows.INTERPRETED
    assert autograd.backend(kernels.device) is launch

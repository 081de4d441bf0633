"""How a compiled kernel is kept and started, and which tile a call gets."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

import gatednorm
from norm_calls import gradients
from norm_cases import Case, Layout, inputs_of
from paths import TRITON

if TRITON:
    from gatednorm import call
    from gatednorm.kernels import launch, tiles
    from gatednorm.options import make_options

pytestmark = pytest.mark.skipif(not TRITON, reason="triton is not installed")


class Kernel:
    """A kernel of two tensors, a number and a constant, and what compiling it gives."""

    arg_names = ("x_ptr", "y_ptr", "n_rows", "PDL", "N")

    def __init__(self, log, world):
        self.log, self.world = log, world

    def __getitem__(self, grid):
        def start(*arguments, **options):
            self.log.append(("triton", grid, arguments, options, self.world.current))
            return SimpleNamespace(run=self.run, function=77, packed_metadata="packed")

        return start

    def run(self, x, y, z, stream, function, metadata, *arguments):
        assert (function, metadata, arguments[:3]) == (77, "packed", (None, None, None))
        self.log.append(("kept", (x, y, z), arguments[3:], stream, self.world.current))


@pytest.fixture
def on_gpu_1(monkeypatch):
    """A launcher for the second GPU of a machine whose first one is current; and what it does."""
    world, log = SimpleNamespace(current=0, hooked=False), []

    class Switched:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, world.current = world.current, self.index

        def __exit__(self, *error):
            world.current = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: world.current)
    monkeypatch.setattr(torch.cuda, "device", Switched)
    active = SimpleNamespace(get_current_stream=lambda index: (index, world.current))
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "_hooked", lambda: world.hooked)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "NVIDIA", True)
    monkeypatch.setattr(launch, "_since_hopper", lambda device: True)
    device = torch.device("cuda", 1)
    one = launch.Launcher(Kernel(log, world), {"N": 8}, device, num_warps=4, maxnreg=64)
    return lambda *tensors: one(device, 7, list(tensors), (3,)), world, log


@pytest.mark.parametrize("current", [0, 1])
def test_the_second_call_starts_what_the_first_one_compiled(on_gpu_1, current):
    """On the tensors' own GPU, with the constants in the kernel's order."""
    start, world, log = on_gpu_1
    world.current = current
    x = torch.zeros(64)
    start(x, None)
    start(x[16:], None)
    assert world.current == current
    options = {
        "num_warps": 4, "enable_fp_fusion": False, "launch_pdl": True, "maxnreg": 64,
    }  # fmt: skip
    (name, grid, arguments, given, where), again = log
    assert (name, grid, given, where) == ("triton", (7, 1, 1), options, 1)
    assert arguments[0] is x
    assert arguments[1:] == (None, 3, True, 8)
    assert again == ("kept", (7, 1, 1), (x.data_ptr() + 64, None, 3, True, 8), (1, 1), 1)


def test_an_unaligned_address_is_left_to_triton(on_gpu_1):
    """Triton has other code for it, before and after the aligned one was kept."""
    start, _, log = on_gpu_1
    x = torch.zeros(64)
    for tensors in ((x, x[1:]), (x, x), (x, x[1:]), (x, x)):
        start(*tensors)
    assert [entry[0] for entry in log] == ["triton", "triton", "triton", "kept"]


def test_a_profiler_that_hooks_into_launches_is_called(on_gpu_1):
    start, world, log = on_gpu_1
    x = torch.zeros(64)
    for world.hooked in (False, True, False):
        start(x, x)
    assert [entry[0] for entry in log] == ["triton", "triton", "kept"]


def test_one_launcher_is_for_one_kind_of_call(kernels, monkeypatch):
    """Compiled code is kept for the dtypes of its tensors, for those that are absent, and for what
    divides the strides: in none of these may two calls of one launcher differ."""
    kept, alignments = {}, set()

    def started(self, device, grid, tensors, numbers):
        names = self.kernel.arg_names
        constants = dict(zip(names[-len(self.constants) :], self.constants, strict=True))
        steps = [
            number
            for name, number in zip(names[len(tensors) :], numbers, strict=False)
            if name.endswith(("_s0", "_s1", "_s2"))
        ]
        if steps:
            assert math.gcd(16, *steps) == constants["ALIGN"]
            alignments.add(constants["ALIGN"])
        kind = self.kernel, [None if t is None else t.dtype for t in tensors], len(numbers)
        assert kept.setdefault(id(self), (self, kind)) == (self, kind)

    monkeypatch.setattr(launch.Launcher, "__call__", started)
    pick = random.Random(0).choice
    both, dtypes = (True, False), (torch.float32, torch.float16)
    for _ in range(150):
        layouts = {
            name: pick((Layout(), Layout(left=16), Layout(left=4), Layout(right=1)))
            for name in ("x", "z", "dy")
        }
        case = Case(
            (3,), pick((64, 17_008)), 1, pick(both), pick(both), pick(both), weight=pick(both),
            bias=pick(both), dtype=torch.float16, z_dtype=pick(dtypes), w_dtype=pick(dtypes),
            out_dtype=pick(dtypes), layouts=layouts,
        )  # fmt: skip
        i = inputs_of(case, kernels.device)
        options = {"is_rms_norm": case.is_rms_norm, "out_dtype": case.out_dtype, **case.options}
        gatednorm.rms_norm_gated(i.x, i.weight, i.bias, i.z, **options)
        gradients(lambda *given, options=options: gatednorm.layernorm_fn(*given, **options), i)
    assert alignments == {1, 4, 16}
    assert len(kept) > 50


def kind_of(n_rows=64, width=4096, dtype=torch.bfloat16, bias=False):
    """Of a backward with a gate; of what is on the meta device nothing is allocated."""
    device = torch.device("cuda", 0)
    rows = call._Meta(torch.Size((n_rows, width)), (width, 1), dtype, device)
    parameter = call._Meta(torch.Size((width,)), (1,), torch.float32, device)
    rstd = call._Meta(torch.Size((n_rows, 1)), (1, 1), torch.float32, device)
    options = make_options(1e-6, None, True, True, "silu", False, "fp32", None)
    return call._describe_backward(
        rows, rows, parameter, parameter if bias else None, rows, None, rstd, None, None, options
    ).kind


@pytest.mark.parametrize(
    ("n_rows", "width", "long"),
    [(2**31 - 2**21, 64, False), (2**31 - 2**19, 64, True), (3, 2**31, True), (3, 2**30, False)],
)
def test_counters_of_64_bits_where_rows_or_channels_need_them(n_rows, width, long):
    assert kind_of(n_rows, width).long is long


@pytest.mark.parametrize(
    ("width", "room", "dtype", "stages"),
    [
        (5120, 232448, torch.float32, 3),
        (5120, 101376, torch.float32, 1),
        (5120, 101376, torch.bfloat16, 3),
        (5120, None, torch.float32, 3),
        (3072, 101376, torch.float32, 1),
        (3072, 101376, torch.bfloat16, 4),
    ],
)
def test_a_pipeline_that_fits_the_gpu(monkeypatch, width, room, dtype, stages):
    monkeypatch.setattr(launch, "_shared_memory", lambda device: room)
    tile = tiles.backward_tile(width, True, True)
    fitted = launch._fit(tile, kind_of(width=width, dtype=dtype, bias=True))
    assert fitted == tile._replace(stages=stages)


@pytest.mark.parametrize(
    ("width", "dtype", "hopper", "ahead"),
    [
        pytest.param(4096, torch.bfloat16, True, True, id="whole"),
        pytest.param(4092, torch.bfloat16, True, False, id="half_of_16_bytes"),
        pytest.param(4092, torch.float32, True, True, id="whole_fp32"),
        pytest.param(4096, torch.bfloat16, False, False, id="older_gpu"),
        pytest.param(2048, torch.bfloat16, True, False, id="narrow"),
    ],
)
def test_rows_fetched_ahead(monkeypatch, width, dtype, hopper, ahead):
    """One instruction takes whole pieces of 16 bytes, from compute capability 9.0 on."""
    monkeypatch.setattr(launch, "_architecture", lambda device: 9 if hopper else 8)
    monkeypatch.setattr(launch, "_shared_memory", lambda device: None)
    launch._backward_launchers.cache_clear()
    _, main, _ = launch._backward_launchers(kind_of(width=width, dtype=dtype), None)
    names = main.kernel.arg_names[-len(main.constants) :]
    assert dict(zip(names, main.constants, strict=True))["AHEAD"] is ahead
    launch._backward_launchers.cache_clear()


def test_no_more_threads_than_an_amd_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for n in (128, 5120, 12_288, 16_384, 20_000):
        tile = launch._fit(tiles.backward_tile(n, False, True), None)
        assert 64 * tile.num_warps <= 1024


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_every_width_has_a_tile_that_covers_it(bias, norm_before_gate):
    for n in [*range(1, 1200), *range(1200, 20_000, 61), 2**20]:
        for choose, architecture in itertools.product(
            (tiles.forward_tile, tiles.backward_tile), tiles.TABLES
        ):
            tile = choose(n, bias, norm_before_gate, architecture)
            assert (tile.block_a + tile.block_b) * tile.chunks >= n
            loose = choose(n, bias, norm_before_gate, architecture, packed=False)
            assert (loose.block_a + loose.block_b) * loose.chunks >= n
            assert tile == choose(n, bias, norm_before_gate, 8), "the stated default"


@pytest.mark.parametrize("scaling", ["1x128", "rowwise", "tensorwise"])
def test_fp8_keeps_the_order_of_a_rows_sums(monkeypatch, scaling):
    """Other warps and registers, in units of 16 bytes alone; the constants are the forward's."""
    monkeypatch.setattr(launch, "_architecture", lambda device: 9)
    monkeypatch.setattr(launch, "_shared_memory", lambda device: None)
    changed = []
    for width, dtype in itertools.product((4096, 8192, 4100), (torch.bfloat16, torch.float32)):
        launch._forward_launchers.cache_clear()
        kind = kind_of(width=width, dtype=dtype)
        (plain, first, _), (tile, second, _) = (
            launch._forward_launchers(kind, True, False, s) for s in (None, scaling)
        )
        names = first.kernel.arg_names[-len(first.constants) :]
        for name, a, b in zip(names, first.constants, second.constants, strict=True):
            assert a == b or name in ("SCALING", "HOIST"), (name, a, b)
        if tile != plain:
            changed.append((width, dtype))
    launch._forward_launchers.cache_clear()
    assert changed
    assert all(dtype == torch.bfloat16 and width % 8 == 0 for width, dtype in changed)

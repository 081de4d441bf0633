"""What is handed to the CUDA driver, read back from memory as the driver would read it."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from gatednorm import driver

POINTERS, SCALARS = [0x7F0000000010, 0x7F0000000020], (37, -3, 1e-5)
TYPES = {"x": "*bf16", "N": "constexpr", "y": "*fp32", "rows": "i64", "s": "i64", "eps": "fp32"}
SIZES = [8, 8, 8, 8, 4, 8, 8]  # and two pointers of Triton's own


class Driver:
    """cuda.h's two functions; `launches` holds what each launch found in memory."""

    def __init__(self, sizes, code=0):
        self.sizes, self.code, self.launches, self.during = sizes, code, [], None

        def cuFuncGetParamInfo(function, index, offset, size):
            assert function == 77
            assert index < len(sizes), "the driver reports a question too many as an error"
            size._obj.value = sizes[index]
            return 0

        def cuLaunchKernelEx(config, function, values, extra):
            assert (function, extra) == (77, None)
            config = driver._Config.from_address(config)
            addresses = (ctypes.c_void_p * len(sizes)).from_address(values)
            kinds = {8: ctypes.c_int64, 4: ctypes.c_float}
            found = [kinds[n].from_address(a).value for a, n in zip(addresses, sizes, strict=True)]
            if self.during:
                self.during()
            attribute = config.attributes[0] if config.n_attributes else None
            self.launches.append(
                SimpleNamespace(
                    arguments=found, grid=list(config.grid), block=list(config.block),
                    shared=config.shared_memory, stream=config.stream,
                    attribute=attribute and (attribute.id, attribute.value),
                )
            )  # fmt: skip
            return self.code

        self.cuFuncGetParamInfo, self.cuLaunchKernelEx = cuFuncGetParamInfo, cuLaunchKernelEx


def compiled(types=TYPES, **metadata):
    usual = {
        "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True, "num_warps": 4,
        "global_scratch_size": 0, "profile_scratch_size": 0, "shared": 1234,
    }  # fmt: skip
    meta = SimpleNamespace(**usual | metadata)
    return SimpleNamespace(metadata=meta, function=77, src=SimpleNamespace(signature=types))


@pytest.fixture
def cuda(monkeypatch):
    def install(sizes=SIZES, code=0) -> Driver:
        fake = Driver(sizes, code)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
        driver._libcuda.cache_clear()
        return fake

    yield install
    driver._libcuda.cache_clear()


def test_structures_are_as_large_as_in_cuda_h():
    assert ctypes.sizeof(driver._Attribute) == 72
    assert ctypes.sizeof(driver._Config) == 56


@pytest.mark.parametrize("pdl", [True, False])
def test_what_the_driver_reads(cuda, pdl):
    fake = cuda()
    start = driver.direct_start(compiled(launch_pdl=pdl), (5, 1, 1), SCALARS)
    assert start(POINTERS, 99)
    assert start([p + 16 for p in POINTERS], 100)
    first, second = fake.launches
    eps = ctypes.c_float(1e-5).value
    assert first.arguments == [*POINTERS, 37, -3, eps, 0, 0]
    assert second.arguments == [*(p + 16 for p in POINTERS), 37, -3, eps, 0, 0]
    assert (first.grid, first.block, first.shared) == ([5, 1, 1], [128, 1, 1], 1234)
    assert (first.stream, second.stream) == (99, 100)
    assert first.attribute == ((6, 1) if pdl else None)


def test_a_launch_within_a_launch_has_memory_of_its_own(cuda):
    """As when another thread launches the same kernel between the filling and the call."""
    fake = cuda()
    start = driver.direct_start(compiled(), (1, 1, 1), SCALARS)

    def once():
        fake.during = None
        start([1, 2], 7)

    fake.during = once
    start(POINTERS, 99)
    inner, outer = fake.launches
    assert (inner.arguments[:2], inner.stream) == ([1, 2], 7)
    assert (outer.arguments[:2], outer.stream) == (POINTERS, 99)


def test_another_number_of_tensors_is_left_to_triton(cuda):
    fake = cuda()
    start = driver.direct_start(compiled(), (1, 1, 1), SCALARS)
    assert start([*POINTERS, 5], 0) is False
    assert fake.launches == []


def test_a_refusal_is_reported(cuda):
    cuda(code=201)
    assert driver.direct_start(compiled(), (1, 1, 1), SCALARS)(POINTERS, 0) is False


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(lambda cuda: (cuda(), compiled(num_ctas=2)), id="cluster"),
        pytest.param(lambda cuda: (cuda(), compiled(global_scratch_size=8)), id="scratch"),
        pytest.param(lambda cuda: (cuda(), compiled(TYPES | {"s": "i32"})), id="other_type"),
        pytest.param(lambda cuda: (cuda([8, 8, 8, 4, 4]), compiled()), id="other_size"),
        pytest.param(lambda cuda: (cuda(), SimpleNamespace()), id="another_triton"),
    ],
)
def test_what_is_not_known_is_left_to_triton(cuda, unknown):
    _, kernel = unknown(cuda)
    assert driver.direct_start(kernel, (1, 1, 1), SCALARS) is None


def test_no_driver_is_left_to_triton(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver._libcuda.cache_clear()
    assert driver.direct_start(compiled(), (1, 1, 1), SCALARS) is None


# ---- who starts a kernel: the driver or Triton ----


@pytest.fixture
def launch_on_gpu_1(monkeypatch):
    """A launch whose kernel is compiled, on a machine of two GPUs of which the first is current;
    yields it, what was started, and what this world does."""
    launch = pytest.importorskip("gatednorm.launch", reason="needs triton")
    world = SimpleNamespace(hooked=False, starts=True, current=0, log=[])
    monkeypatch.setattr(launch, "hooked", lambda: world.hooked)
    monkeypatch.setattr(launch, "INTERPRETED", True)  # asks no GPU for its properties
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: world.current, raising=False)
    stream = lambda index: 100 * index + world.current  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)

    class Switched:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, world.current = world.current, self.index

        def __exit__(self, *error):
            world.current = self.before

    monkeypatch.setattr(torch.cuda, "device", Switched)

    def start(pointers, stream):
        world.log.append(("driver", pointers, stream, world.current))
        return world.starts

    one = launch.Launch(None, torch.device("cuda:1"), 7, (), {}, num_warps=4)
    one.start = start
    monkeypatch.setattr(
        launch.Launch, "_through_triton", lambda self, tensors: world.log.append(("triton",))
    )
    return one, world


def test_the_driver_starts_it_on_the_tensors_device(launch_on_gpu_1):
    one, world = launch_on_gpu_1
    x = torch.zeros(64)
    for current in (0, 1):
        world.current = current
        one(x, None, x[16:])
        assert world.current == current
    where = [x.data_ptr(), x.data_ptr() + 64]
    assert world.log == [("driver", where, 101, 1)] * 2


@pytest.mark.parametrize("why", ["not compiled", "cannot be", "unaligned", "hooked", "refused"])
def test_triton_starts_it(launch_on_gpu_1, why):
    one, world = launch_on_gpu_1
    x = torch.zeros(64)
    one.start = {"not compiled": None, "cannot be": False}.get(why, one.start)
    world.hooked, world.starts = why == "hooked", why != "refused"
    one(x, x[1:] if why == "unaligned" else x)
    assert [entry[0] for entry in world.log] == ["driver"] * (why == "refused") + ["triton"]


def test_two_threads_start_one_kernel(cuda):
    """Each launch finds its own arguments and stream, however the threads take turns."""
    fake = cuda()
    start = driver.direct_start(compiled(), (1, 1, 1), SCALARS)

    def many(thread):
        return all(start([thread, i], thread) for i in range(2000))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(1, 5)))
    found = {(*launch.arguments[:2], launch.stream) for launch in fake.launches}
    assert found == {(thread, i, thread) for thread in range(1, 5) for i in range(2000)}


@pytest.mark.parametrize(
    ("width", "room", "element_size", "stages"),
    [
        (5120, 232448, 4, 3),
        (5120, 101376, 4, 1),
        (5120, 101376, 2, 3),
        (5120, None, 4, 3),
        (3072, 101376, 4, 1),
        (3072, 101376, 2, 4),
    ],
)
def test_a_pipeline_that_fits_the_gpu(monkeypatch, width, room, element_size, stages):
    launch = pytest.importorskip("gatednorm.launch", reason="needs triton")
    monkeypatch.setattr(launch, "_shared_memory", lambda device: room)
    dtype = {2: torch.bfloat16, 4: torch.float32}[element_size]
    loaded = [torch.empty(1, dtype=dtype)] * 3
    tile = launch._fit(launch.backward_tile(width, True), loaded[0].device, *loaded)
    assert tile == launch.backward_tile(width, True)._replace(stages=stages)


@pytest.mark.parametrize(
    ("group_size", "dtype", "capable", "cache", "ahead"),
    [
        (4096, torch.bfloat16, True, 50, True),
        (4092, torch.bfloat16, True, 50, False),
        (4092, torch.float32, True, 50, True),
        (4096, torch.bfloat16, False, 50, False),
        (12_288, torch.bfloat16, True, 60, True),
        (12_288, torch.bfloat16, True, 50, False),
        (2048, torch.bfloat16, True, 60, False),
    ],
    ids=[
        "whole",
        "half_of_16_bytes",
        "whole_fp32",
        "older_gpu",
        "wide_h200",
        "wide_h100",
        "narrow",
    ],
)
def test_rows_fetched_ahead(monkeypatch, group_size, dtype, capable, cache, ahead):
    """One instruction takes whole pieces of 16 bytes, on compute capability 9.0 and later; rows
    that are read twice need the L2 cache (MiB) of an H200."""
    launch = pytest.importorskip("gatednorm.launch", reason="needs triton")
    monkeypatch.setattr(launch, "_since_hopper", lambda device: capable)
    properties = SimpleNamespace(L2_cache_size=cache * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    problem = SimpleNamespace(group_size=group_size, device=torch.device("cuda"))
    tile = launch.backward_tile(group_size)
    loaded = (torch.empty(1, dtype=dtype), torch.empty(1), None)
    assert launch._fetches_ahead(problem, tile, *loaded) is ahead


@pytest.mark.parametrize(
    ("n_rows", "width", "long"),
    [(2**31 - 2**21, 64, False), (2**31 - 2**19, 64, True), (3, 2**31, True), (3, 2**30, False)],
)
def test_counters_of_64_bits_where_rows_or_channels_need_them(n_rows, width, long):
    launch = pytest.importorskip("gatednorm.launch", reason="needs triton")
    problem = SimpleNamespace(shape=(n_rows, width), n_rows=n_rows, width=width)
    x = torch.empty(n_rows, width, dtype=torch.bfloat16, device="meta")
    assert launch._geometry(problem, [x])[2]["LONG"] is long


def test_no_more_threads_than_an_amd_gpu_has(monkeypatch):
    launch = pytest.importorskip("gatednorm.launch", reason="needs triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for n in (128, 5120, 12_288, 16_384, 20_000):
        tile = launch._fit(launch.backward_tile(n), torch.device("cpu"))
        assert 64 * tile.num_warps <= 1024

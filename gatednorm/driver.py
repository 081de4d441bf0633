"""Start a compiled Triton kernel with one call into the CUDA driver.

Triton binds, checks and boxes some sixty arguments a call; of those only the tensors' addresses and
the stream change from one call to the next one like it. Everything else is laid out here once, as
the driver wants it. What this file does not know for certain it leaves to Triton.
"""

import ctypes
import functools
from collections.abc import Sequence

SIZES = {"i64": 8, "fp32": 4}
# Triton appends pointers to scratch memory, unused here, two of them today: zeros. The driver reads
# as many arguments as the code has.
MORE_ARGUMENTS = 8
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID: programmatic dependent launch


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest_of_value", ctypes.c_char * 60),
    ]


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


class _Slot:
    """The memory that one launch is described in; 8 bytes an argument."""

    __slots__ = ("config", "config_address", "keep", "values", "values_address")

    def __init__(self, n_arguments: int, config: _Config, n_pointers: int, scalars: Sequence):
        self.values = (ctypes.c_int64 * n_arguments)()
        for i, value in enumerate(scalars, n_pointers):
            if isinstance(value, float):
                ctypes.c_float.from_buffer(self.values, 8 * i).value = value
            else:
                self.values[i] = value
        begin = ctypes.addressof(self.values)
        addresses = (ctypes.c_void_p * n_arguments)(*(begin + 8 * i for i in range(n_arguments)))
        self.config = _Config.from_buffer_copy(config)
        self.keep = addresses
        self.values_address = ctypes.addressof(addresses)
        self.config_address = ctypes.addressof(self.config)


class Start:
    """`start(pointers, stream)` queues the kernel; False when it could not."""

    __slots__ = ("attribute", "call", "config", "function", "n_arguments", "n_pointers", "scalars",
                 "slots")  # fmt: skip

    def __init__(self, call, function: int, config: _Config, attribute, n_arguments, scalars, n):
        self.call = call
        self.function = function
        self.config = config
        self.attribute = attribute  # config points at it
        self.n_arguments = n_arguments
        self.scalars = scalars
        self.n_pointers = n
        self.slots: list[_Slot] = []

    def __call__(self, pointers: list[int], stream: int) -> bool:
        if len(pointers) != self.n_pointers:
            return False
        try:
            slot = self.slots.pop()  # no two threads get the same one
        except IndexError:
            slot = _Slot(self.n_arguments, self.config, self.n_pointers, self.scalars)
        slot.values[: self.n_pointers] = pointers
        slot.config.stream = stream
        code = self.call(slot.config_address, self.function, slot.values_address, None)
        self.slots.append(slot)
        return code == 0


def direct_start(compiled, grid: tuple[int, int, int], scalars: Sequence) -> Start | None:
    """A start for a kernel that Triton has compiled and loaded; None where something is unknown.

    Args:
        compiled: what a launch through Triton returned.
        grid: programs.
        scalars: the arguments after the pointers that are no constants.
    """
    try:
        return _direct_start(compiled, grid, scalars)
    except (AttributeError, OSError):  # another Triton, another driver
        return None


@functools.cache
def _libcuda() -> ctypes.CDLL:
    # CDLL gives Python's lock away: the call waits where the GPU's queue is full.
    return ctypes.CDLL("libcuda.so.1")


def _direct_start(compiled, grid, scalars) -> Start | None:
    meta = compiled.metadata
    scratch = meta.global_scratch_size or meta.profile_scratch_size
    if meta.num_ctas != 1 or meta.launch_cooperative_grid or scratch:
        return None
    types = [t for t in compiled.src.signature.values() if t != "constexpr"]
    n_pointers = len(types) - len(scalars)
    pointers, rest = types[:n_pointers], types[n_pointers:]
    if not all(t.startswith("*") for t in pointers) or not all(t in SIZES for t in rest):
        return None
    cuda = _libcuda()
    expected = [8] * n_pointers + [SIZES[t] for t in rest]
    if _argument_sizes(cuda, compiled.function, len(expected)) != expected:
        return None
    call = cuda.cuLaunchKernelEx
    call.argtypes = [ctypes.c_void_p] * 4
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1)
    config = _Config(
        (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(32 * meta.num_warps, 1, 1), meta.shared,
        None, ctypes.pointer(attribute), int(meta.launch_pdl),
    )  # fmt: skip
    n_arguments = len(expected) + MORE_ARGUMENTS
    return Start(
        call, compiled.function, config, attribute, n_arguments, tuple(scalars), n_pointers
    )


def _argument_sizes(cuda, function: int, count: int) -> list[int]:
    """Bytes of the first `count` arguments, as the compiled code itself says."""
    query = cuda.cuFuncGetParamInfo
    query.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    sizes = []
    for i in range(count):
        if query(function, i, ctypes.byref(offset), ctypes.byref(size)) != 0:
            break
        sizes.append(size.value)
    return sizes

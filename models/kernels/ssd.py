"""SSD on a GPU, as models/ssd_chunks.py has it: three Triton kernels forward, three backward, which
read the tokens in place.

Shape letters: B batch, T tokens, H heads, P head dimension, G groups, S state size, C chunk size.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.chunks import decay_dtype
from models.kernels import on_its_device
from models.kernels.ssd_kernels import (
    inputs_backward,
    maps_backward,
    outputs,
    pass_states,
    sum_decays,
)


class Steps(NamedTuple):
    """How step sizes come from dt: whether by softplus, and their limits."""

    softplus: bool
    low: float
    high: float


# By the bytes of an element: how many columns of a state a kernel takes at a time, for heads of up
# to 64 channels, and how it is computed. Neither follows from the number of chunks or sequences.
TILES = {
    2: {
        pass_states: (128, {"num_warps": 4}),
        outputs: (64, {"num_warps": 4, "num_stages": 2}),
        maps_backward: (128, {"num_warps": 8, "num_stages": 3}),
        inputs_backward: (128, {"num_warps": 4}),
    },
    4: {
        pass_states: (16, {"num_warps": 4, "num_stages": 1}),
        outputs: (32, {"num_warps": 8}),
        maps_backward: (16, {"num_warps": 8, "num_stages": 1}),
        inputs_backward: (16, {"num_warps": 8, "num_stages": 1}),
    },
}


def supports(x: Tensor, chunk_size: int) -> bool:
    """Whether a chunk of a head fits a program: x [B, T, H, P]."""
    return chunk_size <= 64 and chunk_size * x.shape[3] <= 8192


class _Call:
    """What the launches of a call share: sizes, and tensors with all tokens in one row."""

    def __init__(self, x, b, c, chunk_size, table, bounds):
        (self.heads, self.dim), (self.groups, self.state) = x.shape[2:], b.shape[2:]
        self.x, self.b, self.c = (_tokens(t.to(x.dtype)) for t in (x, b, c))
        self.table, self.bounds = table, bounds
        self.chunks, self.sequences, self.bytes = len(table), len(bounds) - 1, x.element_size()
        self.sizes = {
            "H": self.heads, "R": self.heads // self.groups, "C": chunk_size, "P": self.dim,
            "S": self.state, "BC": _tile(chunk_size), "BP": _tile(self.dim),
        }  # fmt: skip

    def tile(self, kernel) -> tuple[int, dict[str, int]]:
        """The columns that the kernel takes at a time, and how it is computed."""
        columns, options = TILES[self.bytes][kernel]
        if self.sizes["BP"] > 64:
            columns, options = columns * 64 // self.sizes["BP"], options | {"num_warps": 8}
        if _little_shared_memory(self.x.device):
            options = options | {"num_stages": 1}
        return min(_tile(self.state), max(16, columns)), options

    def slices(self, kernel) -> int:
        """How many programs share the columns of a state."""
        return triton.cdiv(self.state, self.tile(kernel)[0])

    def launch(self, kernel, grid: tuple[int, int], *arguments, strided, **constants) -> None:
        """``strided``: the tensors whose strides the kernel reads last."""
        columns, options = self.tile(kernel)
        options = {"BS": columns} | constants | self.sizes | options
        kernel[grid](*arguments, *_strides(*strided), **options)

    def pass_on(self, x, b, decays, initial, states, final, reverse: bool) -> None:
        grid = (self.sequences * self.heads, self.slices(pass_states))
        self.launch(
            pass_states, grid, x, b, decays, initial, self.table, self.bounds, states, final,
            strided=(x, b), REVERSE=reverse,
        )  # fmt: skip


@functools.cache
def _little_shared_memory(device: torch.device) -> bool:
    """Whether it holds what a program reads, and not what the next step of its loop will read."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) < 160 * 1024


def _tile(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _tokens(x: Tensor) -> Tensor:
    """[B, T, ...] as [B * T, ...] of unit last stride, a view if it has that."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def decay_shape(x: Tensor, chunk_size: int) -> tuple[torch.dtype, int]:
    """Of what ``forward`` keeps of a chunk besides its state: the dtype, and how many elements."""
    return decay_dtype(x.dtype), 2 * x.shape[2] * chunk_size


@on_its_device
def forward(x, dt, A, b, c, skip, bias, initial, room, steps, chunk_size, table, bounds):
    """y like x, the final states [sequences, H, P, S] fp32, and what ``backward`` reads of every
    chunk: the states before it [room, H, P, S] in the dtype of x, and step sizes and decays
    [room, 2, H, C]; with zeros where there is no chunk.

    x [B, T, H, P], dt [B, T, H], A, skip and bias [H], b and c [B, T, G, S], initial like the final
    states; skip, bias, initial may be None; the table of chunks, and the offsets in it of the
    sequences' chunks.
    """
    z = _Call(x, b, c, chunk_size, table, bounds)
    (skip,) = _contiguous(skip)
    final, states, decays = _begin(z, dt, A, bias, initial, room, steps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = (z.x, z.b, z.c)
    z.launch(
        outputs, (z.chunks * z.heads, 1), *tensors, decays, skip, states, table, y, strided=tensors
    )
    return y, final, states, decays


def _begin(z, dt, A, bias, initial, room, steps):
    """The final states, and what ``forward`` keeps."""
    A, bias, initial = _contiguous(A, bias, initial)
    kind, shape, size = {"device": z.x.device}, (z.heads, z.dim, z.state), z.sizes["C"]
    final = torch.empty(z.sequences, *shape, dtype=torch.float32, **kind)
    states = torch.empty(room, *shape, dtype=z.x.dtype, **kind)
    decays = torch.empty(room, 2, z.heads, size, dtype=decay_dtype(z.x.dtype), **kind)
    if room > z.chunks:
        states[z.chunks :], decays[z.chunks :] = 0, 0
    dt, block = dt.flatten(0, 1), min(32, triton.next_power_of_2(z.heads))
    sum_decays[(z.chunks * triton.cdiv(z.heads, block),)](
        dt, A, bias, z.table, decays, steps.low, steps.high, *_strides(dt),
        SOFTPLUS=steps.softplus, H=z.heads, C=size, BC=z.sizes["BC"], BH=block,
    )  # fmt: skip
    z.pass_on(z.x, z.b, decays, initial, states, final, reverse=False)
    return final, states, decays


@on_its_device
def backward(
    dy,
    dfinal,
    x,
    dt,
    A,
    b,
    c,
    skip,
    bias,
    initial,
    states,
    decays,
    steps,
    chunk_size,
    table,
    bounds,
):
    """The gradients of x, dt, A, b, c, skip, bias and initial, None for those that are None; dy
    like x, dfinal like the final states or None, and the rest as ``forward`` read and gave it: the
    last two None to compute them again, for chunks of another size."""
    z = _Call(x, b, c, chunk_size, table, bounds)
    if states is None:
        _, states, decays = _begin(z, dt, A, bias, initial, z.chunks, steps)
    A, skip, bias, dfinal = _contiguous(A, skip, bias, dfinal)
    dy, dt_rows, kind = _tokens(dy.to(x.dtype)), dt.flatten(0, 1), {"device": x.device}
    dends = torch.empty_like(states)
    dinitial = None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, **kind)
    z.pass_on(dy, z.c, decays, dfinal, dends, dinitial, reverse=True)

    # side by side, as x, B and C of a model are: their gradient is one tensor
    widths = [z.heads * z.dim, *(z.groups * z.state,) * 2]
    columns, tensors = sum(widths), (dy, z.x, z.b, z.c)
    grads = torch.empty(*x.shape[:2], columns, dtype=x.dtype, **kind).split(widths, -1)
    dx, db, dc = (part.view(t.shape) for part, t in zip(grads, (x, b, c), strict=True))
    slices = z.slices(maps_backward)
    kept = torch.empty(slices, z.chunks, z.heads, dtype=torch.float32, **kind)
    z.launch(
        maps_backward, (z.chunks * z.groups, slices), *tensors, decays, states, dends, table, db,
        dc, kept, z.chunks, columns, strided=tensors,
    )  # fmt: skip
    ddt = torch.empty(dt.shape, dtype=dt.dtype, **kind)
    sums = torch.empty(z.chunks, 3, z.heads, dtype=torch.float32, **kind)
    z.launch(
        inputs_backward, (z.chunks * z.heads, 1), *tensors, dt_rows, A, bias, decays, skip, states,
        dends, kept, table, dx, ddt, sums, z.chunks, columns, steps.low, steps.high,
        strided=(*tensors, dt_rows), SLICES=slices, SOFTPLUS=steps.softplus,
    )  # fmt: skip
    dA, dbias, dskip = sums.sum(0).unbind()
    dskip, dbias = None if skip is None else dskip, None if bias is None else dbias
    return dx, ddt, dA, db, dc, dskip, dbias, dinitial

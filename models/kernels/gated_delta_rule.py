"""The gated delta rule on a GPU: two kernels forward, three backward, which read tokens in place.

What needs no state has one program for each chunk and head, whose tile does not depend on how many
chunks there are: so the bits of a chunk do not either.

Shape letters: B batch, T tokens, HV value heads, K and V the head's dimensions, N chunks of a row
of the batch, X = N * B * HV.
"""

import functools
import itertools

import torch
import triton
from torch import Tensor

from models.chunks import chunk_bounds, chunk_table, decay_dtype, kept_for_graphs
from models.kernels import on_its_device
from models.kernels.delta_backward import (
    read_backward_kernel,
    scan_backward_kernel,
    system_backward_kernel,
)
from models.kernels.delta_forward import prepare_kernel, scan_kernel
from models.rows import gradient_like

# For operands of 2 and 4 bytes: columns of a state that a program has, and how it is compiled.
TILES = {
    2: {
        prepare_kernel: (32, {"num_warps": 4, "num_stages": 2}),
        scan_kernel: (64, {"num_warps": 4, "num_stages": 2}),
        scan_backward_kernel: (64, {"num_warps": 8, "num_stages": 2}),
        system_backward_kernel: (64, {"num_warps": 4, "num_stages": 2}),
        read_backward_kernel: (64, {"num_warps": 8, "num_stages": 2}),
    },
    4: {
        prepare_kernel: (32, {"num_warps": 4, "num_stages": 1}),
        scan_kernel: (16, {"num_warps": 4, "num_stages": 1}),
        scan_backward_kernel: (16, {"num_warps": 4, "num_stages": 1}),
        system_backward_kernel: (16, {"num_warps": 8, "num_stages": 1}),
        read_backward_kernel: (16, {"num_warps": 8, "num_stages": 1}),
    },
}
SHARED = 160 * 1024  # bytes of a multiprocessor's memory that two stages of these tiles need


def supports(q: Tensor, v: Tensor, size: int) -> bool:
    """Whether the kernels take chunks of a size, of q [B, T, H, K] and v [B, T, HV, V]: whether the
    keys of a chunk fit into registers."""
    wide = q.shape[3] * q.element_size()
    fit = wide <= 512 if size == 32 else size == 64 and wide <= 256 and q.element_size() == 2
    return fit and q.numel() > 0 and v.numel() > 0


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


class _Call:
    """Sizes and tables of a call, and its launches."""

    def __init__(self, q: Tensor, v: Tensor, offsets: list[int] | None, size: int):
        (self.batch, self.tokens, key_heads, self.dim_k), self.size = q.shape, size
        self.heads, self.dim_v = v.shape[2:]
        offsets = (0, self.tokens) if offsets is None else tuple(offsets)
        segments = tuple(-(-(end - start) // size) for start, end in itertools.pairwise(offsets))
        tables = chunk_table(offsets, size, q.device), chunk_bounds(segments, q.device)
        self.table, self.bounds = kept_for_graphs(*tables)
        self.chunks, self.sequences = sum(segments), len(segments)
        self.rows = self.batch * self.heads
        self.counts = (self.rows, self.heads, self.heads // key_heads)
        self.bytes, self.small = q.element_size(), _shared_memory(q.device) < SHARED

    def start(self, kernel, by_sequence: bool, *arguments, **constants) -> None:
        columns, options = TILES[self.bytes][kernel]
        if self.small:
            options = options | {"num_stages": 1}
        columns = columns if self.dim_k <= 128 else columns // 4
        keys = triton.next_power_of_2(self.dim_k)
        if self.bytes == 4:
            columns = max(16, min(columns, triton.next_power_of_2(self.dim_v)))
        else:
            keys = max(64, keys)  # smaller heads in the tiles of 64: what was checked on a GPU
        programs = self.rows * self.chunks
        if by_sequence:
            programs = self.rows * triton.cdiv(self.dim_v, columns) * self.sequences
        kernel[(programs,)](
            *arguments, **constants, C=self.size, K=self.dim_k, V=self.dim_v,
            BK=max(16, keys), BV=columns, **options,
        )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _readable(x: Tensor) -> Tensor:
    """x, a row of whose last dimension lies in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kept(q: Tensor, v: Tensor, size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What ``forward`` keeps of a chunk and head: G, inverses, attn, W, Vn, state before it."""
    dim_k, dim_v, dtype = q.shape[3], v.shape[3], q.dtype
    shapes = [(size, size), (size, size), (size, dim_k), (size, dim_v), (dim_k, dim_v)]
    return [((size,), decay_dtype(dtype)), *((shape, dtype) for shape in shapes)]


@on_its_device
def forward(q, k, v, g, beta, initial, offsets, scale, size, kept, keep):
    """o [B, T, HV, V] in the dtype of v, and the final states like initial, one of [HV, K, V] fp32
    for each row of the batch or sequence. Writes ``kept``, tensors [X, ...]; the last two for a
    backward only, if there is to be one."""
    call, (q, k, v) = _Call(q, v, offsets, size), map(_readable, (q, k, v))
    total, solve, attn, w, u, states = kept
    o, final = v.new_empty(v.shape), torch.empty_like(initial)
    call.start(
        prepare_kernel, False, q, k, v, g, beta, call.table, total, solve, attn, w, u,
        scale, *call.counts, *_strides(q, k, v, g, beta), LEVELS=(size // 2).bit_length() - 1,
    )  # fmt: skip
    call.start(
        scan_kernel, True, q, k, w, u, attn, total, initial, call.table, call.bounds, states,
        final, o, scale, *call.counts, *_strides(q, k, o), KEEP=keep,
    )  # fmt: skip
    return o, final


@on_its_device
def backward(do, dfinal, q, k, v, g, beta, offsets, scale, size, *kept, in_rows=False):
    """Gradients of q, k, v, g, beta and the initial states, which are like dfinal; ``in_rows``:
    those of q and k lie side by side, and that of v as v does."""
    call, (q, k, v, do) = _Call(q, v, offsets, size), map(_readable, (q, k, v, do))
    total, solve, attn, w, v_new, states = kept
    dfinal = dfinal.contiguous()
    dinitial, dends, dv_new = (torch.empty_like(t) for t in (dfinal, states, v_new))
    call.start(
        scan_backward_kernel, True, q, k, w, attn, total, do, dfinal, call.table,
        call.bounds, dends, dv_new, dinitial, scale, *call.counts, *_strides(q, k, do),
    )  # fmt: skip
    key_heads, (*rows, heads, dim_k) = q.shape[2], (*v.shape[:3], q.shape[3])
    if in_rows:
        dq, dk = q.new_empty(*rows, 2 * heads * dim_k).chunk(2, -1)
        dv = gradient_like(v.flatten(2))
    else:
        dq, dk = (x.new_empty(*rows, heads * dim_k) for x in (q, k))
        dv = v.new_empty(*rows, heads * v.shape[3])
    dg, dbeta = g.new_empty(g.shape), beta.new_empty(g.shape)
    dk_part, dt_part = torch.empty_like(w, dtype=torch.float32), torch.empty_like(total)
    call.start(
        system_backward_kernel, False, k, v, beta, total, solve, w, states, dv_new, call.table,
        dk_part, dt_part, dv, dbeta, *call.counts, *_strides(k, v, beta), call.tokens,
        dv.stride(1),
    )  # fmt: skip
    call.start(
        read_backward_kernel, False, q, k, total, attn, v_new, states, do, dends, call.table,
        dk_part, dt_part, dq, dk, dg, scale, *call.counts, *_strides(q, k, do), call.tokens,
        dq.stride(1),
    )  # fmt: skip
    dq, dk = (x.unflatten(2, (heads, dim_k)) for x in (dq, dk))
    if key_heads != heads:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dv.view(v.shape), dg, dbeta, dinitial

"""The gated delta rule: chunk-parallel over time, and one step at a time.

For each head, with decay ``a_t = exp(g_t)`` and a state ``S`` of shape [K, V]::

    S_t = a_t * S_{t-1} + beta_t * k_t (v_t - a_t * S_{t-1}^T k_t)^T
    o_t = scale * S_t^T q_t

`models.delta_chunks` has the chunk-parallel form of it, `models.kernels.gated_delta_rule` the same
for a GPU.

Source: Gated Delta Networks, arXiv 2412.06464.

Shape letters: B batch, T tokens, H key heads, HV value heads, K and V their dimensions, S
sequences.
"""

import functools
import itertools
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import delta_chunks, kernels, operators
from models.chunks import chunk_room, each_sequence, offsets_and_states, state_dtype
from models.ranges import check_positive


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, parallel over the tokens of a chunk.

    Args:
        q, k: [B, T, H, K], queries and keys; the caller normalises them.
        v: [B, T, HV, V], values; HV is a multiple of H, and key head i serves the value heads
            ``i * HV / H`` up to the next key head's.
        g: [B, T, HV], decay in log space, at most 0.
        beta: [B, T, HV], write strength, in (0, 1), or (0, 2) for negative eigenvalues.
        scale: factor on q; ``K ** -0.5`` if None.
        initial_state: [B, HV, K, V] fp32 (fp64 with fp64 inputs), zeros if None; with
            ``cu_seqlens`` [sequences, HV, K, V].
        output_final_state: whether to return the state after the last token of each sequence.
        chunk_size: tokens per chunk; None is 64 on a GPU in 16 bits for K up to 128, else 32.
        cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row (B = 1).
        exact: whether the bits of a chunk's outputs may not depend on how many chunks there are;
            on a GPU they do so only where no kernel takes the sizes.
    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state like ``initial_state``, or None.
    Raises:
        ValueError: for shapes, offsets, a chunk size or a state that do not fit, and with ``exact``
            for sizes that no kernel of a GPU takes.
    """
    _check(q, k, v, g, beta)
    if chunk_size is None:
        short = q.device.type == "cpu" or q.element_size() > 2 or q.shape[3] > 128
        chunk_size = 32 if short else 64
    check_positive(chunk_size=chunk_size)
    if exact and q.is_cuda and _scan(q, v, chunk_size) is delta_chunks:
        raise ValueError(
            "exact mode on a GPU needs triton, 16 or 32 bits and keys of at most 512 bytes, got "
            f"{q.dtype}, {q.shape[3]} channels and chunk_size={chunk_size}; use the CPU"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs, state_shape = (q, k, v, g, beta), (v.shape[2], q.shape[3], v.shape[3])
    if torch.compiler.is_compiling():
        o, final = _operator(*inputs, initial_state, cu_seqlens, scale, chunk_size)[:2]
        if output_final_state:
            final = final.view(-1, *state_shape)
    else:
        offsets, state = offsets_and_states(v, cu_seqlens, initial_state, state_shape)
        o, final = _ChunkScan.apply(*inputs, state.contiguous(), offsets, scale, chunk_size)
    return o, final if output_final_state else None


def _scan(q: Tensor, v: Tensor, chunk_size: int) -> ModuleType:
    """What computes with chunks of q and v."""
    found = kernels.find("gated_delta_rule", q)
    return delta_chunks if found is None or not found.supports(q, v, chunk_size) else found


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, offsets, scale, chunk_size):
        inputs, scan = (q, k, v, g, beta), _scan(q, v, chunk_size)
        kept = _empty(scan, q, v, chunk_size, _chunks(v, offsets, chunk_size))
        ctx.save_for_backward(*inputs, *kept)
        ctx.options = (offsets, scale, chunk_size)
        return scan.forward(*inputs, initial, *ctx.options, kept, any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, g, beta, *kept = ctx.saved_tensors
        scan = _scan(q, v, ctx.options[-1])
        layout = {} if scan is delta_chunks else {"in_rows": True}
        grads = scan.backward(do, dfinal, q, k, v, g, beta, *ctx.options, *kept, **layout)
        return *grads, None, None, None


def _chunks(v, offsets, chunk_size):
    offsets = (0, v.shape[1]) if offsets is None else offsets
    return sum(-(-(end - start) // chunk_size) for start, end in itertools.pairwise(offsets))


def _empty(scan, q, v, chunk_size, chunks):
    """Empty tensors [X, ...] for what a scan keeps of so many chunks."""
    rows = chunks * v.shape[0] * v.shape[2]
    kept = scan.kept(q, v, chunk_size)
    return [q.new_empty(rows, *shape, dtype=dtype) for shape, dtype in kept]


KEPT = 6  # at most; plain PyTorch keeps less


def _flat(q, kept):
    """The tensors that an operator keeps, flat, and tensors of no elements up to their number."""
    return [*(t.flatten() for t in kept), *(q.new_empty(0) for _ in range(KEPT - len(kept)))]


def _run(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size):
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    offsets, state = offsets_and_states(v, cu_seqlens, initial_state, state_shape)
    scan = _scan(q, v, chunk_size)
    kept = _empty(scan, q, v, chunk_size, chunk_room(v, chunk_size, cu_seqlens))
    used = _chunks(v, offsets, chunk_size) * v.shape[0] * v.shape[2]
    for x in kept:
        x[used:] = 0  # there may be more room than chunks
    options = (offsets, scale, chunk_size, kept, True)
    o, final = scan.forward(q, k, v, g, beta, state.contiguous(), *options)
    return o, final, *_flat(q, kept)


def _fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size):
    sequences = len(v) if cu_seqlens is None else cu_seqlens.numel() - 1
    size = sequences * v.shape[2] * q.shape[3] * v.shape[3]
    final = v.new_empty(size, dtype=state_dtype(v))
    scan, chunks = _scan(q, v, chunk_size), chunk_room(v, chunk_size, cu_seqlens)
    return v.new_empty(v.shape), final, *_flat(q, _empty(scan, q, v, chunk_size, chunks))


def _run_backward(do, dfinal, q, k, v, g, beta, _state, cu_seqlens, *rest):
    kept, (scale, chunk_size) = rest[:KEPT], rest[KEPT:]
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    dfinal = None if dfinal is None else dfinal.view(-1, *state_shape)
    offsets, dfinal = offsets_and_states(v, cu_seqlens, dfinal, state_shape)
    scan = _scan(q, v, chunk_size)
    shapes = [shape for shape, _ in scan.kept(q, v, chunk_size)]
    kept = (t.view(-1, *shape) for t, shape in zip(kept, shapes, strict=False))
    return scan.backward(do, dfinal, q, k, v, g, beta, offsets, scale, chunk_size, *kept)


_operator = operators.register(
    "gated_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state",
    "float scale, int chunk_size",
    KEPT,
    2,
    _run,
    _fake,
    _run_backward,
)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, one token after the other: for decoding, and to check the other one.

    Arguments, results and errors are those of ``chunk_gated_delta_rule``; ``chunk_size`` and
    ``exact`` are accepted and have no effect.
    """
    _check(q, k, v, g, beta)
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    offsets, state = offsets_and_states(v, cu_seqlens, initial_state, state_shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    steps = functools.partial(_steps, scale)
    with torch.autocast(q.device.type, enabled=False):
        o, state = each_sequence(steps, (q, k, v, g, beta), state, offsets)
    return o, state if output_final_state else None


def _steps(scale, q, k, v, g, beta, state):
    groups, acc = v.shape[2] // q.shape[2], state.dtype
    q = q.to(acc) * scale
    k, g, beta = k.to(acc), g.to(acc).exp(), beta.to(acc)
    if groups != 1:
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None]
        read = (k[:, t, :, None] @ state)[:, :, 0]
        write = (v[:, t].to(acc) - read) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * write[:, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    if not outputs:
        return v, state
    return torch.stack(outputs, dim=1).to(v.dtype), state


def _check(q, k, v, g, beta):
    if q.dim() != 4 or v.dim() != 4 or k.shape != q.shape or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "q and k must be [B, T, H, K] and v [B, T, HV, V] with the same B and T, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}; reshape them"
        )
    if len({t.dtype == torch.float64 for t in (q, k, v)}) > 1:
        raise ValueError(
            f"q, k and v must all be float64 or none of them, got {q.dtype}, {k.dtype} and "
            f"{v.dtype}; convert them"
        )
    heads = q.shape[2]
    if v.shape[2] % heads:
        raise ValueError(
            f"the value heads must be a multiple of the key heads, got {v.shape[2]} and {heads}; "
            "each key head serves the same number of value heads"
        )
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise ValueError(
            f"g and beta must be [B, T, HV] = {list(v.shape[:3])}, got {list(g.shape)} and "
            f"{list(beta.shape)}; they have one entry per token and value head"
        )

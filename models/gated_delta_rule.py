"""The gated delta rule in plain PyTorch: chunk-parallel over time, and one step at a time.

For each head, with decay ``a_t = exp(g_t)`` and a state ``S`` of shape [K, V]::

    S_t = a_t * S_{t-1} + beta_t * k_t (v_t - a_t * S_{t-1}^T k_t)^T
    o_t = scale * S_t^T q_t

`models.delta_chunks` has the chunk-parallel form of it.

Source: Gated Delta Networks, arXiv 2412.06464.

Shape letters: B batch, T tokens, H key heads, HV value heads, K and V their dimensions, S
sequences.
"""

import functools

import torch
from torch import Tensor

from models import delta_chunks, operators
from models.chunks import (
    ChunkLayout,
    block_ranges,
    chunk_room,
    each_sequence,
    offsets_and_states,
    operand_dtype,
    state_dtype,
    with_room,
)
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
        chunk_size: tokens per chunk; None is 32 on a CPU and 64 elsewhere.
        cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row (B = 1).
        exact: whether the bits of a chunk's outputs may not depend on how many chunks there are; a
            GPU is slower then.
    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state like ``initial_state``, or None.
    Raises:
        ValueError: for shapes, offsets, a chunk size or a state that do not fit.
    """
    _check(q, k, v, g, beta)
    if chunk_size is None:
        chunk_size = 32 if q.device.type == "cpu" else 64
    check_positive(chunk_size=chunk_size)
    heads = v.shape[2]
    if q.shape[2] != heads:
        q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens)
    if torch.compiler.is_compiling():
        o, final = _operator(*inputs, scale, chunk_size, exact)[:2]
        if output_final_state:
            final = final.view(-1, heads, q.shape[3], v.shape[3])
    else:
        layout, cut, state, shape = _cut(*inputs, chunk_size)
        o, final = delta_chunks.ChunkScan.apply(*cut, state, scale, layout.segments, exact)
        o, final = layout.join(o).to(v.dtype), final.view(shape)
    return o, final if output_final_state else None


def _cut(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size):
    """The layout of the chunks, the inputs in it, the states as [S, B * HV, K, V], their shape."""
    shape = (v.shape[2], q.shape[3], v.shape[3])
    offsets, state = offsets_and_states(v, cu_seqlens, initial_state, shape)
    layout, shape = ChunkLayout(q, chunk_size, offsets), state.shape
    # packed sequences have B = 1, a batch is cut into chunks as one sequence
    state = (state if offsets is not None else state.flatten(0, 1)[None]).contiguous()
    return layout, [layout.split(x) for x in (q, k, v, g, beta)], state, shape


def _run(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, exact):
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens)
    layout, cut, state, shape = _cut(*inputs, chunk_size)
    room = chunk_room(v, chunk_size, cu_seqlens)
    parts = (*cut, state, scale, layout.segments, exact, room)
    o, final, states, *kept = delta_chunks.forward(*parts)
    states[layout.chunks :] = 0
    kept = (with_room(blocks, room * state.shape[1]) for blocks in kept)
    return layout.join(o), final.view(shape), states, *kept


def _fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, exact):
    (batch, _, heads, dim_v), dim_k = v.shape, q.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    final = v.new_empty(sequences * heads * dim_k * dim_v, dtype=state_dtype(v))
    rows = chunk_room(v, chunk_size, cu_seqlens) * batch * heads
    states = final.new_empty(rows * dim_k * dim_v)
    solves = q.new_empty(rows * chunk_size * chunk_size, dtype=operand_dtype(q))
    return v.new_empty(v.shape), final, states, solves, solves.new_empty(rows * chunk_size * dim_v)


def _run_backward(
    do, dfinal, q, k, v, g, beta, _state, cu_seqlens, states, solves, v_news, scale, chunk_size, _
):
    if dfinal is not None:
        dfinal = dfinal.view(-1, v.shape[2], q.shape[3], v.shape[3])
    layout, cut, dfinal, shape = _cut(q, k, v, g, beta, dfinal, cu_seqlens, chunk_size)
    rows, dim_v = dfinal.shape[1], v.shape[3]
    blocks = [slice(lo * rows, hi * rows) for lo, hi in block_ranges(cut[2], 0)]
    solves, v_news = (
        t.view(-1, chunk_size, size) for t, size in ((solves, chunk_size), (v_news, dim_v))
    )
    kept = ([t[block] for block in blocks] for t in (solves, v_news))
    parts = (*cut, states.view(-1, *dfinal.shape[1:]), *kept, scale, layout.segments)
    *grads, dinitial = delta_chunks.backward(layout.split(do), dfinal, *parts)
    return *(layout.join(grad) for grad in grads), dinitial.view(shape)


_operator = operators.register(
    "chunk_gated_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state",
    "float scale, int chunk_size, bool exact",
    3,
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

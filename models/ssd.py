"""State-space duality (SSD), the scan of Mamba-2, in plain PyTorch: chunked, and step by step.

For each head, with ``a_t = exp(dt_t * A)`` and a state ``h`` of shape [P, S]::

    h_t = a_t * h_{t-1} + dt_t * x_t B_t^T
    y_t = h_t C_t + D * x_t

`models.ssd_chunks` has the chunk-parallel form of it.

Source: Mamba-2, arXiv 2405.21060.

Shape letters: B batch, T tokens, H heads, P head dimension, G groups, R = H / G, S state size.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from models import operators, ssd_chunks
from models.chunks import (
    ChunkLayout,
    chunk_room,
    each_sequence,
    offsets_and_states,
    state_dtype,
)
from models.ranges import check_positive


def chunk_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """SSD, parallel over the tokens of a chunk.

    Args:
        x: [B, T, H, P], inputs.
        dt: [B, T, H], step sizes, before bias, softplus and limits.
        A: [H], decay rate of each head, negative.
        B, C: [B, T, G, S], input and output maps; group i serves heads ``i * H / G`` and on.
        D: [H], skip from x to y, or None.
        dt_bias: [H], added to dt first, or None.
        dt_softplus: whether to apply softplus to dt, after the bias.
        dt_limit: the range that dt is clamped to, last.
        initial_state: [B, H, P, S] fp32 (fp64 with fp64 inputs), zeros if None; with
            ``cu_seqlens`` [sequences, H, P, S].
        output_final_state: whether to return the state after the last token of each sequence.
        chunk_size: tokens per chunk; None is 64.
        cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row (B = 1).
        exact: whether the bits of a chunk's outputs may not depend on how many chunks there are; a
            GPU is slower then.
    Returns:
        y [B, T, H, P] in the dtype of x, and the final state like ``initial_state``, or None.
    Raises:
        ValueError: for shapes, offsets, limits, a chunk size or a state that do not fit.
    """
    _check(x, dt, A, B, C, D, dt_bias, dt_limit)
    chunk_size = 64 if chunk_size is None else chunk_size
    check_positive(chunk_size=chunk_size)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, state_dtype(x))
    skip = None if D is None else D.to(dt.dtype)
    inputs = (x, dt, dt * A.to(dt.dtype), B, C)
    if torch.compiler.is_compiling():
        options = (skip, initial_state, cu_seqlens, chunk_size, exact)
        y, final = _operator(*inputs, *options)[:2]
        if output_final_state:
            final = final.view(-1, *x.shape[2:], B.shape[3])
    else:
        layout, cut, state = _cut(*inputs, initial_state, cu_seqlens, chunk_size)
        y, final = ssd_chunks.ChunkScan.apply(*cut, skip, state, layout.segments, exact)
        y, final = layout.uncut(y), _rows(final, x)
    return y, final if output_final_state else None


def _cut(x, dt, g, b, c, initial_state, cu_seqlens, chunk_size):
    """The layout of the chunks, the inputs in it, and the states by group, the heads of a group as
    columns: [sequences, B, G, S, R, P], where a batch counts as one sequence."""
    (heads, dim), (groups, size) = x.shape[2:], b.shape[2:]
    offsets, state = offsets_and_states(x, cu_seqlens, initial_state, (heads, dim, size))
    layout = ChunkLayout(x, chunk_size, offsets)
    state = state.view(-1, groups, heads // groups, dim, size).movedim(4, 2)
    state = state[:, None] if offsets is not None else state[None]
    return layout, [layout.cut(t) for t in (x, dt, g, b, c)], state.contiguous()


def _rows(state, x):
    """[sequences, B, G, S, R, P] to [sequences or B, H, P, S]."""
    return state.flatten(0, 1).movedim(2, 4).reshape(-1, *x.shape[2:], state.shape[3])


def _run(x, dt, g, b, c, skip, initial_state, cu_seqlens, chunk_size, exact):
    x = _unit_stride(x)
    layout, cut, state = _cut(x, dt, g, b, c, initial_state, cu_seqlens, chunk_size)
    room = chunk_room(x, chunk_size, cu_seqlens)
    y, final, states = ssd_chunks.forward(*cut, skip, state, layout.segments, exact, room)
    states[:, layout.chunks :] = 0
    return layout.uncut(y), _rows(final, x), states


def _fake(x, dt, g, b, c, skip, initial_state, cu_seqlens, chunk_size, exact):
    (batch, _, heads, dim), size = x.shape, b.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    final = x.new_empty(sequences * heads * dim * size, dtype=state_dtype(x))
    chunk = x.new_empty(1, 1, chunk_size, heads, dim)
    rows = batch * chunk_room(x, chunk_size, cu_seqlens) * heads
    states = (final if ssd_chunks.find_kernels(chunk) is None else x).new_empty(rows * size * dim)
    return x.new_empty(x.shape), final, states


def _run_backward(dy, dfinal, x, dt, g, b, c, skip, _state, cu_seqlens, states, chunk_size, _exact):
    x = _unit_stride(x)
    if dfinal is not None:
        dfinal = dfinal.view(-1, *x.shape[2:], b.shape[3])
    layout, cut, dfinal = _cut(x, dt, g, b, c, dfinal, cu_seqlens, chunk_size)
    states = states.view(len(x), -1, *dfinal.shape[2:])[:, : layout.chunks]
    parts = (*cut, skip, states, layout.segments)
    *grads, dskip, dinitial = ssd_chunks.backward(layout.cut(dy), dfinal, *parts)
    return *(layout.uncut(grad) for grad in grads), dskip, _rows(dinitial, x)


def _unit_stride(x):
    """x, or a copy, so that whether kernels compute does not depend on its strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


_operator = operators.register(
    "chunk_ssd",
    "Tensor x, Tensor dt, Tensor g, Tensor b, Tensor c, Tensor? skip, Tensor? initial_state",
    "int chunk_size, bool exact",
    1,
    0,
    _run,
    _fake,
    _run_backward,
)


def recurrent_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """SSD, one token after the other: for decoding, and to check the other one.

    Arguments, results and errors are those of ``chunk_ssd``; ``chunk_size`` and ``exact``
    are accepted and have no effect.
    """
    _check(x, dt, A, B, C, D, dt_bias, dt_limit)
    state_shape = (*x.shape[2:], B.shape[3])
    offsets, state = offsets_and_states(x, cu_seqlens, initial_state, state_shape)
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, state.dtype)
    y, state = each_sequence(functools.partial(_steps, A, D), (x, dt, B, C), state, offsets)
    return y, state if output_final_state else None


def _steps(A, D, x, dt, B, C, state):
    acc, ratio = state.dtype, x.shape[2] // B.shape[2]
    decay = (dt * A.to(acc)).exp()
    x_acc = x.to(acc)
    write, B, C = x_acc * dt[..., None], B.to(acc), C.to(acc)
    if ratio != 1:
        B, C = (t.repeat_interleave(ratio, dim=2) for t in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        state = state * decay[:, t, :, None, None] + write[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((state @ C[:, t, :, :, None])[..., 0])
    if not outputs:
        return x, state
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + x_acc * D.to(acc)[:, None]
    return y.to(x.dtype), state


def step_size(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    acc: torch.dtype,
) -> Tensor:
    """The step sizes in ``acc`` that a scan makes of its argument dt [B, T, H]."""
    dt = dt.to(acc)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt if tuple(dt_limit) == (0.0, float("inf")) and dt_softplus else dt.clamp(*dt_limit)


def _check(x, dt, A, B, C, D, dt_bias, dt_limit):
    if x.dim() != 4 or B.dim() != 4 or C.shape != B.shape or B.shape[:2] != x.shape[:2]:
        raise ValueError(
            "x must be [B, T, H, P] and B and C [B, T, G, S] with the same B and T, got "
            f"{list(x.shape)}, {list(B.shape)} and {list(C.shape)}; reshape them"
        )
    heads = x.shape[2]
    if heads % B.shape[2]:
        raise ValueError(
            f"the heads must be a multiple of the groups, got {heads} heads and {B.shape[2]} "
            "groups; each group serves the same number of heads"
        )
    if dt.shape != x.shape[:3]:
        raise ValueError(
            f"dt must be [B, T, H] = {list(x.shape[:3])}, got {list(dt.shape)}; "
            "it has one entry per token and head"
        )
    for name, value in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if value is not None and tuple(value.shape) != (heads,):
            raise ValueError(
                f"{name} must be [H] = [{heads}], got {list(value.shape)}; "
                "it has one entry per head"
            )
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(
            f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}; "
            "use (0.0, float('inf')) for no limit"
        )

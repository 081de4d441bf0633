"""State-space duality (SSD), the scan of Mamba-2, in plain PyTorch: chunked, and step by step.

For each head, with ``a_t = exp(dt_t * A)`` and a state ``h`` of shape [P, S]::

    h_t = a_t * h_{t-1} + dt_t * x_t B_t^T
    y_t = h_t C_t + D * x_t

`models.ssd_chunks` has the chunk-parallel form of it.

Source: Mamba-2, arXiv 2405.21060.

Shape letters: B batch, T tokens, H heads, P head dimension, G groups, R = H / G, S state size.
"""

import functools
import itertools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels, operators, ssd_chunks
from models.chunks import (
    ChunkLayout,
    check_state,
    chunk_bounds,
    chunk_room,
    chunk_table,
    each_sequence,
    kept_for_graphs,
    offsets_and_states,
    sequence_offsets,
    state_dtype,
)
from models.exact import by_chunks
from models.ranges import check_positive

CHUNK = 64  # tokens, where a caller does not say


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
        exact: whether the bits of a chunk's outputs may not depend on how many chunks there are.
    Returns:
        y [B, T, H, P] in the dtype of x, and the final state like ``initial_state``, or None.
    Raises:
        ValueError: for shapes, offsets, limits, a chunk size or a state that do not fit.
    """
    _check(x, dt, A, B, C, D, dt_bias, dt_limit)
    chunk_size = CHUNK if chunk_size is None else chunk_size
    check_positive(chunk_size=chunk_size)
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens)
    options = (dt_softplus, *map(float, dt_limit), chunk_size, exact)
    if torch.compiler.is_compiling():
        y, final = _operator(*tensors, *options)[:2]
        if output_final_state:
            final = final.view(-1, *x.shape[2:], B.shape[3])
    else:
        y, final = _Scan.apply(*tensors, *options)
    return y, final if output_final_state else None


class _Scan(torch.autograd.Function):
    """For eager code what the operator below is to a compiler."""

    @staticmethod
    def forward(ctx, *arguments):
        y, final, *kept = _run(*arguments)
        ctx.set_materialize_grads(False)  # a gradient of zeros costs as much as any
        ctx.save_for_backward(*arguments[:9], *kept)
        ctx.options = arguments[9:]
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        saved = ctx.saved_tensors  # once: activation checkpointing gives them away
        dy = torch.zeros_like(saved[0]) if dy is None else dy
        grads = _run_backward(dy, dfinal, *saved, *ctx.options)
        return *grads, None, *(None for _ in ctx.options)


def _run(x, dt, A, b, c, skip, bias, initial, cu_seqlens, softplus, low, high, chunk_size, exact):
    """y, the final states, and for the backward, with room for more chunks, the states before every
    chunk, and of the kernels the decays."""
    shape = (*x.shape[2:], b.shape[3])
    found = _kernels(x, chunk_size)
    if found is not None:
        offsets = sequence_offsets(cu_seqlens, *x.shape[:2])
        chunks = _chunks(x, offsets, chunk_size)
        if initial is not None:
            check_state(initial, (len(chunks[1]) - 1, *shape), state_dtype(x), x)
        inputs = (x, dt, A, b, c, skip, bias, initial, _room(x, chunk_size, cu_seqlens))
        steps = found.Steps(softplus, low, high)
        y, final, *kept = found.forward(*inputs, steps, chunk_size, *chunks)
        if exact:
            kept = [t.new_empty(0) for t in kept]
        return y, final, *kept
    if exact and x.is_cuda:
        raise ValueError(
            "exact mode on a GPU needs triton, 16 or 32 bits and heads of at most 8192 / "
            f"chunk_size channels, got {x.dtype}, {x.shape[3]} and chunk_size={chunk_size}; "
            "use the CPU"
        )
    size = functools.partial(
        step_size,
        dt_bias=bias,
        dt_softplus=softplus,
        dt_limit=(low, high),
        acc=state_dtype(x),
    )
    dt = by_chunks(exact, size, dt)
    inputs = (x, dt, dt * A.to(dt.dtype), b, c)
    layout, cut, state = _cut(*inputs, initial, cu_seqlens, chunk_size)
    skip = None if skip is None else skip.to(dt.dtype)
    room = chunk_room(x, chunk_size, cu_seqlens)
    y, final, states = ssd_chunks.forward(*cut, skip, state, layout.segments, room)
    states[:, layout.chunks :] = 0
    return layout.uncut(y), _rows(final, x), states, states.new_empty(0)


def _run_backward(
    dy, dfinal, x, dt, A, b, c, skip, bias, initial, cu_seqlens, states, decays, softplus, low,
    high, chunk_size, exact,
):  # fmt: skip
    """Gradients of all tensors before the offsets, None for those that are None."""
    shape = (*x.shape[2:], b.shape[3])
    if dfinal is not None:
        dfinal = dfinal.reshape(-1, *shape)
    found = _kernels(x, chunk_size)
    if found is not None:
        kept = (None, None)
        if not exact:
            kept = states.view(-1, *shape), decays.view(-1, 2, x.shape[2], chunk_size)
        elif found.supports(x, CHUNK):
            chunk_size = CHUNK  # faster, and a gradient's bits may depend on anything
        chunks = _chunks(x, sequence_offsets(cu_seqlens, *x.shape[:2]), chunk_size)
        inputs = (x, dt, A, b, c, skip, bias, initial, *kept, found.Steps(softplus, low, high))
        return found.backward(dy, dfinal, *inputs, chunk_size, *chunks)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (dt, bias, A)]
        dt = step_size(*leaves[:2], softplus, (low, high), state_dtype(x))
        g = dt * leaves[2].to(dt.dtype)
    inputs = (x, dt.detach(), g.detach(), b, c)
    layout, cut, dfinal = _cut(*inputs, dfinal, cu_seqlens, chunk_size)
    states = states.view(len(x), -1, *dfinal.shape[2:])[:, : layout.chunks]
    width = None if skip is None else skip.to(dt.dtype)
    parts = (*cut, width, states, layout.segments)
    *grads, dskip, dinitial = ssd_chunks.backward(layout.cut(dy), dfinal, *parts)
    dx, *dsteps, db, dc = (layout.uncut(grad) for grad in grads)
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad((dt, g), there, dsteps))
    ddt, dbias, dA = (None if t is None else next(found) for t in leaves)
    dinitial = None if initial is None else _rows(dinitial, x)
    return dx, ddt, dA, db, dc, dskip, dbias, dinitial


def _kernels(x: Tensor, chunk_size: int) -> ModuleType | None:
    """The kernels that compute with x [B, T, H, P] in such chunks, if there are some."""
    found = kernels.find("ssd", x)
    return found if found is not None and found.supports(x, chunk_size) else None


def _chunks(x, offsets, chunk_size):
    """What kernels read of the layout: the rows of a batch are sequences."""
    if offsets is None:
        offsets = [x.shape[1] * row for row in range(len(x) + 1)]
    segments = tuple(-(-(b - a) // chunk_size) for a, b in itertools.pairwise(offsets))
    table = chunk_table(tuple(offsets), chunk_size, x.device)
    return kept_for_graphs(table, chunk_bounds(segments, x.device))


def _room(x, chunk_size, cu_seqlens):
    return len(x) * chunk_room(x, chunk_size, cu_seqlens)


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


def _fake(x, dt, A, b, c, skip, bias, initial, cu_seqlens, softplus, low, high, chunk_size, exact):
    (batch, _, heads, dim), size = x.shape, b.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    final = x.new_empty(sequences * heads * dim * size, dtype=state_dtype(x))
    room, found = _room(x, chunk_size, cu_seqlens), _kernels(x, chunk_size)
    room = 0 if exact and found is not None else room
    states = (final if found is None else x).new_empty(room * heads * dim * size)
    decays = final.new_empty(0)
    if found is not None:
        dtype, elements = found.decay_shape(x, chunk_size)
        decays = x.new_empty(room * elements, dtype=dtype)
    return x.new_empty(x.shape), final, states, decays


_operator = operators.register(
    "ssd",
    "Tensor x, Tensor dt, Tensor A, Tensor b, Tensor c, Tensor? skip, Tensor? bias, "
    "Tensor? initial_state",
    "bool softplus, float low, float high, int chunk_size, bool exact",
    2,
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
    with torch.autocast(x.device.type, enabled=False):
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

"""State-space duality (SSD), the scan of Mamba-2, in plain PyTorch: chunked, and step by step.

For each head, with ``a_t = exp(dt_t * A)`` and a state ``h`` of shape [P, S]::

    h_t = a_t * h_{t-1} + dt_t * x_t B_t^T
    y_t = h_t C_t + D * x_t

Within a chunk that starts from state ``h``, and with ``G`` the running sum of ``dt * A`` in it::

    y  = tril(C B^T * exp(G_i - G_j)) (dt x) + e^G C h^T + D x
    h' = e^G_C h + (e^(G_C - G) dt x)^T B

Only ``h'`` is sequential, elementwise; all the rest runs for all chunks at once. B and C are
shared by the heads of a group, and the products with the state are done for a group at a time:
the heads of a group lie side by side, as columns. The backward is closed-form.

Source: Mamba-2, arXiv 2405.21060.

Shape letters: B batch, T tokens, H heads, P head dimension, G groups, R = H / G, S state size,
C chunk size, N chunks.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.chunks import (
    ChunkLayout,
    block_ranges,
    bmm_acc,
    decay_dtype,
    decay_matrix,
    each_sequence,
    offsets_and_states,
    operand_dtype,
    sequence_ends,
)
from models.ranges import check_positive


class _BlockTerms:
    """What one block of chunks needs in both passes. x [B, n, C, H, P], dt and g [B, n, C, H],
    b and c [B, n, C, G, S]; "by group" is [B * n * G, C, ...], "by head" [B * n * H, C, ...]."""

    def __init__(self, x, dt, g, b, c, acc):
        operands = operand_dtype(x)
        batch, chunks, size, self.heads = x.shape[:4]
        self.groups = b.shape[3]
        self.lead = (batch, chunks)
        self.x, self.dt = x.to(operands), dt.to(acc)[..., None]
        total = g.cumsum(2, dtype=decay_dtype(operands))
        self.pair = decay_matrix(total.mT.contiguous(), acc)  # [B, n, H, C, C]
        total = total[..., None]
        self.shrink = (total[:, :, -1:] - total).to(acc).exp_()
        self.grow = total.to(acc).exp()
        self.last = self.grow[:, :, -1:]
        self.b, self.c = self.by_group(b.to(operands)), self.by_group(c.to(operands))
        scores = bmm_acc(self.c, self.b.mT).view(*self.lead, self.groups, 1, size, size)
        self.attn = (self.pair.unflatten(2, (self.groups, -1)) * scores).to(operands)
        self.attn = self.attn.view(-1, size, size)
        write = self.x * self.dt
        self.write = self.by_head(write.to(operands))
        self.write_out = self.by_group((write * self.shrink).to(operands))

    def by_group(self, x):
        """[B, n, C, ..., D] to [B * n * G, C, R * D]; a view if there is one group."""
        x = x.reshape(*x.shape[:3], self.groups, -1).transpose(2, 3)
        return x.reshape(-1, *x.shape[3:])

    def by_head(self, x):
        """[B, n, C, H, P] to [B * n * H, C, P]."""
        x = x.transpose(2, 3)
        return x.reshape(-1, *x.shape[3:])

    def tokens(self, x):
        """[B * n * G, C, R * D] or [B * n * H, C, D] back to [B, n, C, G or H, ...]."""
        return x.unflatten(0, (*self.lead, -1)).transpose(2, 3)

    def columns(self, x):
        """[B * n * G, C, R * P] to [B, n, C, H, P]."""
        x = self.tokens(x)
        return x.reshape(*x.shape[:3], self.heads, -1)

    def state_decay(self):
        """The decay of a whole chunk for each column of a state: [B, n, G, 1, R, 1]."""
        return self.last.transpose(2, 3).unflatten(2, (self.groups, -1)).transpose(3, 4)


class _ChunkScan(torch.autograd.Function):
    """x [B, N, C, H, P], dt and g = dt * A [B, N, C, H], b and c [B, N, C, G, S], skip [H] or None,
    initial [sequences, B, G, S, R, P]; returns y like x and the final states like initial.

    Works through blocks of chunks, small enough on a CPU that the temporaries stay in its cache;
    the backward recomputes them and keeps the states alone.
    """

    @staticmethod
    def forward(ctx, x, dt, g, b, c, skip, initial, segments, exact):
        ctx.segments, ctx.kernels = segments, _kernels(x)
        if exact and ctx.kernels is None and x.is_cuda:
            raise ValueError(
                "exact mode on a GPU needs triton, 16 or 32 bits and heads of at most 8192 / "
                f"chunk_size channels, got {x.dtype}, {x.shape[4]} and chunk_size={x.shape[2]}; "
                "use the CPU"
            )
        if ctx.kernels is not None:
            with torch.autocast(x.device.type, enabled=False):
                parts = (x, dt, g, b, c, skip, initial, segments, exact)
                y, final, states = ctx.kernels.forward(*parts)
            ctx.save_for_backward(x, dt, g, b, c, skip, initial, states)
            return y, final
        final, y = initial.clone(), torch.empty_like(x, memory_format=torch.contiguous_format)
        states = initial.new_empty(x.shape[0], x.shape[1], *initial.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            for lo, hi in block_ranges(x, 1):
                p = _BlockTerms(*(t[:, lo:hi] for t in (x, dt, g, b, c)), initial.dtype)
                add = bmm_acc(p.b.mT, p.write_out).view(*p.lead, *initial.shape[2:])
                _scan_states(p, add, initial, segments, lo, hi, states, final)
                out = y[:, lo:hi]
                start = states[:, lo:hi].to(p.c.dtype)
                start = start.reshape(-1, p.c.shape[-1], p.write_out.shape[-1])
                torch.mul(p.columns(torch.bmm(p.c, start)), p.grow, out=out)
                out += p.tokens(torch.bmm(p.attn, p.write))
                if skip is not None:
                    out.addcmul_(p.x, skip[:, None])
        ctx.save_for_backward(x, dt, g, b, c, skip, initial, states)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        x, dt, g, b, c, skip, initial, states = ctx.saved_tensors
        dfinal = dfinal.contiguous()  # kernels write to tensors made like it
        if ctx.kernels is not None:
            with torch.autocast(x.device.type, enabled=False):
                parts = (dy, dfinal, x, dt, g, b, c, skip, states, ctx.segments)
                return (*ctx.kernels.backward(*parts), None, None)
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, g, b, c)]
        dskip = None if skip is None else torch.zeros_like(skip, dtype=initial.dtype)
        dinitial, carry = dfinal.clone(), torch.empty_like(dfinal[0])
        with torch.autocast(x.device.type, enabled=False):
            for lo, hi in reversed(block_ranges(x, 1)):
                p = _BlockTerms(*(t[:, lo:hi] for t in (x, dt, g, b, c)), initial.dtype)
                dout = dy[:, lo:hi].to(p.x.dtype)
                dread = p.by_group((dout * p.grow).to(p.x.dtype))
                add = bmm_acc(p.c.mT, dread).view(*p.lead, *initial.shape[2:])
                dends = torch.empty_like(add)
                _scan_states_backward(p, add, dfinal, ctx.segments, lo, hi, dends, dinitial, carry)
                block = _backward_block(p, states[:, lo:hi], dends, dout, dread)
                if skip is not None:
                    dskip += (dout * p.x).sum((0, 1, 2, 4), dtype=dskip.dtype)
                    block[0].addcmul_(dout, skip[:, None])
                for grad, value in zip(grads, block, strict=True):
                    grad[:, lo:hi] = value
        return (*grads, dskip, dinitial, None, None)


def _kernels(x: Tensor) -> ModuleType | None:
    found = kernels.find("ssd", x)
    return found if found is not None and found.supports(x) else None


def _scan_states(p: _BlockTerms, add, initial, segments, lo, hi, states, final):
    """The sequential phase for chunks lo to hi: writes their states and final states."""
    first, final_of = sequence_ends(segments)
    decay = p.state_decay()
    for n in range(lo, hi):
        if n in first:
            states[:, n] = initial[first[n]]
        end = final[final_of[n]] if n in final_of else states[:, n + 1]
        torch.addcmul(add[:, n - lo], states[:, n], decay[:, n - lo], out=end)


def _scan_states_backward(p: _BlockTerms, add, dfinal, segments, lo, hi, dends, dinitial, carry):
    """The same backwards: writes the gradients of the states after each chunk and of the initial
    ones. ``carry`` holds the gradient of the state between two blocks."""
    first, final_of = sequence_ends(segments)
    decay = p.state_decay()
    for n in reversed(range(lo, hi)):
        i = n - lo
        if n in final_of:
            dends[:, i] = dfinal[final_of[n]]
        elif n == hi - 1:
            dends[:, i] = carry
        start = dinitial[first[n]] if n in first else dends[:, i - 1] if i else carry
        torch.addcmul(add[:, i], dends[:, i], decay[:, i], out=start)


def _backward_block(p, states, dends, dout, dread):
    """Gradients of x, dt, g, b, c of one block, given those of its outputs and end states."""
    operands, width = p.x.dtype, p.write_out.shape[-1]
    start, dend = (s.to(operands).reshape(-1, p.c.shape[-1], width) for s in (states, dends))

    # Through the state: y = e^G C h^T, h' = e^G_C h + (e^(G_C - G) dt x)^T B.
    dc = bmm_acc(dread, start.mT)
    db = bmm_acc(p.write_out, dend.mT)
    dwrite = torch.bmm(p.b, dend)
    read = p.columns(torch.bmm(p.c, start) * dread).sum(-1, dtype=dc.dtype)
    shrunk = p.columns(dwrite * p.write_out).sum(-1, dtype=dc.dtype)
    dlast = (states * dends).sum((3, 5)).flatten(2) * p.last[:, :, 0, :, 0]
    sum_dtype = decay_dtype(operands)  # the running sum below cancels digits
    shrunk = shrunk.to(sum_dtype)
    dtotal = read - shrunk
    dtotal[:, :, -1] += shrunk.sum(2) + dlast
    dwrite = p.columns(dwrite) * p.shrink

    # Within the chunk: y = (C B^T * pair) (dt x).
    dout = p.by_head(dout)
    dattn = bmm_acc(dout, p.write.mT)
    weighted = (dattn * p.attn).to(sum_dtype)
    dtotal += p.tokens((weighted.sum(-1) - weighted.sum(-2))[..., None])[..., 0]
    dscores = dattn.view_as(p.pair).mul_(p.pair).unflatten(2, (p.groups, -1)).sum(3)
    dscores = dscores.flatten(0, 2).to(operands)
    dc += bmm_acc(dscores, p.b)
    db += bmm_acc(dscores.mT, p.c)
    dwrite += p.tokens(torch.bmm(p.attn.mT, dout))
    ddt = (dwrite * p.x).sum(-1)
    # g enters through its running sum, so its gradient is the running sum from the end
    dg = dtotal.flip(2).cumsum(2).flip(2)
    return dwrite.mul_(p.dt), ddt, dg, p.tokens(db), p.tokens(dc)


@torch.compiler.disable  # see ChunkLayout
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
    heads, groups, size = x.shape[2], B.shape[2], B.shape[3]
    offsets, state = offsets_and_states(x, cu_seqlens, initial_state, (*x.shape[2:], size))
    dt = step_size(dt, dt_bias, dt_softplus, dt_limit, state.dtype)
    layout = ChunkLayout(x, chunk_size, offsets)
    # by group, the heads of a group as columns; packed sequences have B = 1, a batch counts as one
    state = state.view(-1, groups, heads // groups, x.shape[3], size).movedim(4, 2)
    state = state[:, None] if offsets is not None else state[None]
    cut = [layout.cut(t) for t in (x, dt, dt * A.to(dt.dtype), B, C)]
    skip = None if D is None else D.to(dt.dtype)
    y, final = _ChunkScan.apply(*cut, skip, state.contiguous(), layout.segments, exact)
    if output_final_state:
        final = final.flatten(0, 1).movedim(2, 4).reshape(-1, heads, x.shape[3], size)
    return layout.uncut(y), final if output_final_state else None


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

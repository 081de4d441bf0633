"""The gated delta rule in plain PyTorch: chunk-parallel over time, and one step at a time.

For each head, with decay ``a_t = exp(g_t)`` and a state ``S`` of shape [K, V]::

    S_t = a_t * S_{t-1} + beta_t * k_t (v_t - a_t * S_{t-1}^T k_t)^T
    o_t = scale * S_t^T q_t

Within a chunk that starts from state ``S``, and with ``G`` the running sum of ``g`` in it, the
updates condense into one unit lower triangular system (the WY form)::

    A_ij = beta_i (k_i . k_j) exp(G_i - G_j)  for i > j,      [U | W] = (I + A)^-1 beta [v | e^G k]
    Vn   = U - W S,      o = e^G scale q S + tril(scale q k^T * exp(G_i - G_j)) Vn
    S'   = e^G_C S + (e^(G_C - G) k)^T Vn

Only Vn and S' are sequential, two small matrix products per chunk; all the rest runs for all
chunks at once. The backward is closed-form and has the same two phases.

Source: Gated Delta Networks, arXiv 2412.06464; DeltaNet's WY form, arXiv 2406.06484.

Shape letters: B batch, T tokens, H key heads, HV value heads, K and V their dimensions, C chunk
size, N chunks, S sequences, X = N * B * HV.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from models import kernels
from models.chunks import (
    ChunkLayout,
    add_bmm,
    block_ranges,
    bmm,
    bmm_acc,
    decay_dtype,
    decay_matrix,
    dot_rows,
    each_sequence,
    empty_chunks,
    offsets_and_states,
    operand_dtype,
    running_sum,
    sequence_ends,
)
from models.ranges import check_positive


def unit_lower_inverse(a: Tensor, exact: bool = False) -> Tensor:
    """``(I + a)^-1`` for strictly lower triangular ``a`` [X, C, C], by merging diagonal blocks.

    ``[[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]``, doubling the blocks from 1 to C.
    Every intermediate is a block of the result, which keeps it accurate on correlated keys,
    where powers of ``a`` overflow. ``exact``: see ``chunk_gated_delta_rule``.
    """
    size = a.shape[-1]
    if size > 8 and size % 2 == 0:
        half = size // 2
        blocks = torch.stack((a[:, :half, :half], a[:, half:, half:]), dim=1)
        inverses = unit_lower_inverse(blocks.flatten(0, 1), exact)
        first, second = inverses.unflatten(0, (-1, 2)).unbind(1)
        out = torch.zeros_like(a)
        out[:, :half, :half] = first
        out[:, half:, half:] = second
        corner = bmm(a[:, half:, :half], first, exact)
        out[:, half:, :half] = bmm(second, corner, exact).neg_()
        return out
    index = torch.arange(size, device=a.device)
    out = torch.eye(size, dtype=a.dtype, device=a.device).expand_as(a)
    width = 1
    while width < size:
        row, column = index[:, None] // width, index[None, :] // width
        corner = a * ((row == column + 1) & (row % 2 == 1))
        out = out - (corner if width == 1 else bmm(bmm(out, corner, exact), out, exact))
        width *= 2
    return out


class _BlockTerms(NamedTuple):
    """What one block of chunks needs in both passes; see the module's docstring for the symbols."""

    q: Tensor  # [X, C, K], like k
    k: Tensor
    v: Tensor  # [X, C, V]
    beta: Tensor  # [X, C, 1], fp32 as all the decays
    grow: Tensor  # [X, C, 1], exp(G)
    shrink: Tensor  # [X, C, 1], exp(G_C - G)
    last: Tensor  # [X, 1, 1], exp(G_C)
    pair: Tensor  # [X, C, C], exp(G_i - G_j) for i >= j, else 0
    keys: Tensor  # [X, C, C], k k^T * pair
    attn: Tensor  # [X, C, C], scale q k^T * pair
    solve: Tensor  # [X, C, C], (I + A)^-1
    u_w: Tensor  # [X, C, V + K], U and W side by side
    k_out: Tensor  # [X, C, K], shrink k


def _block_terms(q, k, v, g, beta, scale, acc, solve=None, exact=False) -> _BlockTerms:
    """All that does not depend on the state. q, k, v, g, beta: blocks [n, B, HV, C, ...]."""
    operands = operand_dtype(q)
    size, dim_k, dim_v = q.shape[3], q.shape[4], v.shape[4]
    q, k, v = (x.to(operands).reshape(-1, size, x.shape[4]) for x in (q, k, v))
    beta = beta.to(acc).reshape(-1, size, 1)
    total = running_sum(g, decay_dtype(operands), exact).reshape(-1, size)
    pair, total = decay_matrix(total, acc), total[..., None]
    shrink = (total[:, -1:] - total).to(acc).exp_()
    grow = total.to(acc).exp()
    last = grow[:, -1:]
    keys = bmm_acc(k, k.mT, exact).mul_(pair)
    attn = bmm_acc(q, k.mT, exact).mul_(pair).mul_(scale).to(operands)
    if solve is None:
        solve = unit_lower_inverse((keys * beta).tril_(-1), exact).to(operands)
    rhs = q.new_empty(q.shape[0], size, dim_v + dim_k)
    torch.mul(v, beta, out=rhs[..., :dim_v])
    torch.mul(k, beta * grow, out=rhs[..., dim_v:])
    u_w = bmm(solve, rhs, exact)
    k_out = (k * shrink).to(operands).contiguous()  # a single chunk may be a view of the inputs
    return _BlockTerms(q, k, v, beta, grow, shrink, last, pair, keys, attn, solve, u_w, k_out)


class _ChunkScan(torch.autograd.Function):
    """q, k [N, B, HV, C, K], v [N, B, HV, C, V], g, beta [N, B, HV, C] in chunks, initial
    [S, B * HV, K, V]; returns o like v and the final states like initial.

    Works through blocks of chunks, small enough on a CPU that the temporaries stay in its cache.
    Kept for the backward: the inputs, the states, the inverses and Vn; the rest is recomputed.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, scale, segments, exact):
        dim_v, operands = v.shape[-1], operand_dtype(q)
        final, o = initial.clone(), empty_chunks(v)
        states = initial.new_empty(q.shape[0], *initial.shape[1:])
        kept = []
        with torch.autocast(q.device.type, enabled=False):
            for lo, hi in block_ranges(v, 0):
                block = (x[lo:hi] for x in (q, k, v, g, beta))
                c = _block_terms(*block, scale, initial.dtype, exact=exact)
                v_new = torch.empty_like(c.v, memory_format=torch.contiguous_format)
                _scan_states(c, dim_v, initial, segments, lo, hi, states, v_new, final)
                start = states[lo:hi].flatten(0, 1).to(operands)
                read = bmm((c.q * (c.grow * scale)).to(operands), start, exact)
                if exact:
                    read += bmm_acc(c.attn, v_new, exact)
                else:
                    read.baddbmm_(c.attn, v_new)
                o[lo:hi] = read.view(o[lo:hi].shape)
                kept += [c.solve, v_new]
        ctx.save_for_backward(q, k, v, g, beta, initial, states, *kept)
        ctx.scale, ctx.segments = scale, segments
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, g, beta, initial, states, *kept = ctx.saved_tensors
        dim_v, scale = v.shape[-1], ctx.scale
        grads = [empty_chunks(x) for x in (q, k, v, g, beta)]
        dfinal = dfinal.contiguous()  # kernels write to tensors made like it
        dinitial, carry = dfinal.clone(), torch.empty_like(dfinal[0])
        blocks = list(zip(block_ranges(v, 0), kept[::2], kept[1::2], strict=True))
        with torch.autocast(q.device.type, enabled=False):
            for (lo, hi), solve, v_new in reversed(blocks):
                block = (x[lo:hi] for x in (q, k, v, g, beta))
                c = _block_terms(*block, scale, initial.dtype, solve)
                dout = do[lo:hi].to(c.q.dtype).reshape(c.v.shape)
                dv_new = torch.bmm(c.attn.mT, dout)
                dread = bmm_acc((c.q * (c.grow * scale)).to(c.q.dtype).mT, dout)
                dends = torch.empty_like(dread)
                _scan_states_backward(
                    c, dim_v, dread, dfinal, ctx.segments, lo, hi, dends, dv_new, dinitial, carry
                )
                start = states[lo:hi].flatten(0, 1)
                values = _backward_block(c, start, dends, dout, v_new, dv_new, scale)
                for grad, value in zip(grads, values, strict=True):
                    grad[lo:hi] = value.view(grad[lo:hi].shape)
        return (*grads, dinitial, None, None, None)


def _scan_states(c: _BlockTerms, dim_v, initial, segments, lo, hi, states, v_new, final):
    """The sequential phase for chunks lo to hi: writes their states, Vn, and final states."""
    u, w, heads = c.u_w[..., :dim_v], c.u_w[..., dim_v:], initial.shape[1]
    kernel = _kernels(c, lo, hi, segments)
    if kernel is not None:
        kernel.forward(c.last, c.k_out, w, u, initial, segments, states, v_new, final)
        return
    first, final_of = sequence_ends(segments)
    rows = (c.last, c.k_out.mT, w, u, v_new)
    last, k_out, w, u, v_new = (x.unflatten(0, (-1, heads)) for x in rows)
    for n in range(lo, hi):
        i = n - lo
        if n in first:
            states[n] = initial[first[n]]
        torch.baddbmm(u[i], w[i], states[n].to(w.dtype), alpha=-1, out=v_new[i])
        end = final[final_of[n]] if n in final_of else states[n + 1]
        add_bmm(torch.mul(states[n], last[i], out=end), k_out[i], v_new[i])


def _scan_states_backward(
    c: _BlockTerms, dim_v, dread, dfinal, segments, lo, hi, dends, dv_new, dinitial, carry
):
    """The same backwards: writes the gradients of the states after each chunk and of the initial
    ones, completes that of Vn. ``carry`` holds the gradient of the state between two blocks."""
    w, heads = c.u_w[..., dim_v:], dfinal.shape[1]
    kernel = _kernels(c, lo, hi, segments)
    if kernel is not None:
        kernel.backward(c.last, c.k_out, w, dread, dfinal, segments, dends, dv_new, dinitial)
        return
    first, final_of = sequence_ends(segments)
    rows = (c.last, c.k_out, w.mT, dread, dends, dv_new)
    last, k_out, w, dread, dends, dv_new = (x.unflatten(0, (-1, heads)) for x in rows)
    for n in reversed(range(lo, hi)):
        i = n - lo
        if n in final_of:
            dends[i] = dfinal[final_of[n]]
        elif n == hi - 1:
            dends[i] = carry
        dv_new[i].baddbmm_(k_out[i], dends[i].to(k_out.dtype))
        start = dinitial[first[n]] if n in first else dends[i - 1] if i else carry
        add_bmm(torch.addcmul(dread[i], dends[i], last[i], out=start), w[i], dv_new[i], -1)


def _kernels(c: _BlockTerms, lo: int, hi: int, segments: tuple[int, ...]) -> ModuleType | None:
    """The kernels of the sequential phase, if lo to hi are all chunks and have a size they take."""
    found = kernels.find("gated_delta_rule", c.k) if hi - lo == sum(segments) else None
    return found if found is not None and found.supports(*c.k.shape[1:]) else None


def _backward_block(c: _BlockTerms, states, dends, dout, v_new, dv_new, scale):
    """Gradients of q, k, v, g, beta of one block, given those of its outputs, Vn, end states."""
    operands, dim_v = c.q.dtype, c.v.shape[-1]
    start, dend = states.to(operands), dends.to(operands)
    u, w = c.u_w[..., :dim_v], c.u_w[..., dim_v:]
    dw = torch.bmm(dv_new, start.mT).neg_()
    dq_in = bmm_acc(dout, start.mT)
    dk_out = bmm_acc(v_new, dend.mT)
    dattn = bmm_acc(dout, v_new.mT)
    dlast = dot_rows(dends.flatten(1), states.flatten(1))[:, None, None] * c.last

    # The triangular system: [U | W] = (I + A)^-1 [beta v | beta e^G k].
    dv, dk_rhs = torch.bmm(c.solve.mT, dv_new), torch.bmm(c.solve.mT, dw)
    dkeys = add_bmm(bmm_acc(dv, u.mT), dk_rhs, w.mT).neg_().tril_(-1)
    acc = c.grow.dtype
    inner = (dk_rhs * c.k).sum(-1, keepdim=True, dtype=acc) * c.grow
    dbeta = (dv * c.v).sum(-1, keepdim=True, dtype=acc).add_(inner)
    weighted = dkeys * c.keys
    dbeta += weighted.sum(-1, keepdim=True)
    sum_dtype = decay_dtype(operands)  # the running sum below cancels digits
    weighted = weighted.mul_(c.beta).add_(dattn * c.attn).to(sum_dtype)
    dtotal = inner * c.beta + weighted.sum(-1, keepdim=True) - weighted.sum(-2)[..., None]
    dv = dv * c.beta

    # The products of q and k, and what decays them.
    dattn = dattn.mul_(c.pair).mul_(scale).to(operands)
    dkeys = dkeys.mul_(c.pair).mul_(c.beta).to(operands)
    dq_in *= c.grow * scale
    dtotal += (dq_in * c.q).sum(-1, keepdim=True)
    dq = add_bmm(dq_in, dattn, c.k)
    dk_out *= c.shrink
    shrunk = (dk_out * c.k).sum(-1, keepdim=True).to(sum_dtype)
    dtotal -= shrunk
    dtotal[:, -1:] += shrunk.sum(1, keepdim=True) + dlast
    dk = add_bmm(add_bmm(dk_out, dattn.mT, c.q), dkeys + dkeys.mT, c.k)
    dk.addcmul_(dk_rhs, c.beta * c.grow)
    # g enters through its running sum, so its gradient is the running sum from the end
    dg = dtotal.flip(1).cumsum(1).flip(1)
    return dq, dk, dv, dg, dbeta


@torch.compiler.disable  # see ChunkLayout
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
    state_shape = (heads, q.shape[3], v.shape[3])
    offsets, state = offsets_and_states(v, cu_seqlens, initial_state, state_shape)
    if q.shape[2] != heads:
        q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    layout = ChunkLayout(q, chunk_size, offsets)
    shape = state.shape
    # [S, B * HV, K, V]: packed sequences have B = 1, a batch is cut into chunks as one sequence
    state = (state if offsets is not None else state.flatten(0, 1)[None]).contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v_chunks, g, beta = (layout.split(x) for x in (q, k, v, g, beta))
    o, final = _ChunkScan.apply(q, k, v_chunks, g, beta, state, scale, layout.segments, exact)
    final = final.view(shape) if output_final_state else None
    return layout.join(o).to(v.dtype), final


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

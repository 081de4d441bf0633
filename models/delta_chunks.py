"""The chunk-parallel gated delta rule of `models.gated_delta_rule` in plain PyTorch, forward and
backward: for a CPU, fp64, and sizes that models/kernels/gated_delta_rule.py does not take.

Within a chunk that starts from state ``S``, and with ``G`` the running sum of ``g`` in it, the
updates condense into one unit lower triangular system (the WY form)::

    A_ij = beta_i (k_i . k_j) exp(G_i - G_j)  for i > j,      [U | W] = (I + A)^-1 beta [v | e^G k]
    Vn   = U - W S,      o = e^G scale q S + tril(scale q k^T * exp(G_i - G_j)) Vn
    S'   = e^G_C S + (e^(G_C - G) k)^T Vn

Only Vn and S' are sequential, two small matrix products per chunk; all the rest runs for all
chunks at once. The backward is closed-form and has the same two phases.

Source: DeltaNet's WY form, arXiv 2406.06484.

Shape letters: B batch, HV value heads, K and V the dimensions of keys and values, C chunk size,
N chunks, S sequences, X = N * B * HV.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.chunks import (
    ChunkLayout,
    add_bmm,
    block_ranges,
    bmm_acc,
    decay_dtype,
    decay_matrix,
    dot_rows,
    empty_chunks,
    operand_dtype,
    sequence_ends,
    state_dtype,
)


def unit_lower_inverse(a: Tensor) -> Tensor:
    """``(I + a)^-1`` for strictly lower triangular ``a`` [X, C, C]: accurate on correlated keys,
    where powers of ``a`` overflow. By halves down to 16 rows, since on some processors a solver of
    64 loses a digit."""
    size = a.shape[-1]
    if size <= 16:
        identity = torch.eye(size, dtype=a.dtype, device=a.device)
        return torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
    half = size // 2
    result = torch.zeros_like(a)
    upper = result[:, :half, :half] = unit_lower_inverse(a[:, :half, :half])
    lower = result[:, half:, half:] = unit_lower_inverse(a[:, half:, half:])
    result[:, half:, :half] = -lower.bmm(a[:, half:, :half].bmm(upper))
    return result


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


def _block_terms(q, k, v, g, beta, scale, acc, solve=None) -> _BlockTerms:
    """All that does not depend on the state. q, k, v, g, beta: blocks [n, B, HV, C, ...]."""
    operands = operand_dtype(q)
    size, dim_k, dim_v = q.shape[3], q.shape[4], v.shape[4]
    q, k, v = (x.to(operands).reshape(-1, size, x.shape[4]) for x in (q, k, v))
    beta = beta.to(acc).reshape(-1, size, 1)
    total = g.cumsum(-1, dtype=decay_dtype(operands)).reshape(-1, size)
    pair, total = decay_matrix(total, acc), total[..., None]
    shrink = (total[:, -1:] - total).to(acc).exp_()
    grow = total.to(acc).exp()
    last = grow[:, -1:]
    keys = bmm_acc(k, k.mT).mul_(pair)
    attn = bmm_acc(q, k.mT).mul_(pair).mul_(scale).to(operands)
    if solve is None:
        solve = unit_lower_inverse((keys * beta).tril_(-1)).to(operands)
    rhs = q.new_empty(q.shape[0], size, dim_v + dim_k)
    torch.mul(v, beta, out=rhs[..., :dim_v])
    torch.mul(k, beta * grow, out=rhs[..., dim_v:])
    u_w = torch.bmm(solve, rhs)
    k_out = (k * shrink).to(operands).contiguous()  # a single chunk may be a view of the inputs
    return _BlockTerms(q, k, v, beta, grow, shrink, last, pair, keys, attn, solve, u_w, k_out)


def kept(q: Tensor, v: Tensor, size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What ``forward`` keeps of a chunk and head: inverses, Vn, and the state before the chunk."""
    operands, dim_v = operand_dtype(q), v.shape[3]
    shapes = [((size, size), operands), ((size, dim_v), operands)]
    return [*shapes, ((q.shape[3], dim_v), state_dtype(v))]


def _cut(offsets, size, *tensors):
    """The layout, and [B, T, H, ...] as [N, B, HV, C, ...]: with as many heads as the last has."""
    layout, heads = ChunkLayout(tensors[0], size, offsets), tensors[-1].shape[2]
    cut = [layout.split(x) for x in tensors]
    each = [x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2) for x in cut]
    return layout, each


def _rows(state, offsets):
    """States of a batch or of packed sequences as [S, B * HV, K, V]: a batch counts as one."""
    return (state.flatten(0, 1)[None] if offsets is None else state).contiguous()


def forward(q, k, v, g, beta, initial, offsets, scale, size, kept, _keep):
    """o [B, T, HV, V] in the dtype of v, and the final states like initial, one of [HV, K, V] for
    each row of the batch or sequence. Writes ``kept``, tensors [X, ...].

    Works through blocks of chunks, small enough on a CPU that the temporaries stay in its cache.
    """
    layout, (q, k, v, g, beta) = _cut(offsets, size, q, k, v, g, beta)
    shape, initial = initial.shape, _rows(initial, offsets)
    dim_v, operands, rows = v.shape[-1], operand_dtype(q), initial.shape[1]
    final, o = initial.clone(), empty_chunks(v)
    solves, v_news, states = kept
    states = states.unflatten(0, (-1, rows))
    with torch.autocast(q.device.type, enabled=False):
        for lo, hi in block_ranges(v, 0):
            block = (x[lo:hi] for x in (q, k, v, g, beta))
            c = _block_terms(*block, scale, initial.dtype)
            v_new = v_news[lo * rows : hi * rows]
            _scan_states(c, dim_v, initial, layout.segments, lo, hi, states, v_new, final)
            start = states[lo:hi].flatten(0, 1).to(operands)
            read = torch.bmm((c.q * (c.grow * scale)).to(operands), start)
            o[lo:hi] = read.baddbmm_(c.attn, v_new).view(o[lo:hi].shape)
            solves[lo * rows : hi * rows] = c.solve
    return layout.join(o), final.view(shape)


def backward(do, dfinal, q, k, v, g, beta, offsets, scale, size, solves, v_news, states):
    """The gradients of q, k, v, g, beta and the initial states, which are like dfinal; the rest is
    what ``forward`` read and kept. What it did not keep is computed again."""
    key_heads = q.shape[2]
    layout, (q, k, v, g, beta, do) = _cut(offsets, size, q, k, v, g, beta, do)
    shape, dfinal = dfinal.shape, _rows(dfinal, offsets)
    dim_v, rows = v.shape[-1], dfinal.shape[1]
    states = states.unflatten(0, (-1, rows))
    grads = [empty_chunks(x) for x in (q, k, v, g, beta)]
    dinitial, carry = dfinal.clone(), torch.empty_like(dfinal[0])
    with torch.autocast(q.device.type, enabled=False):
        for lo, hi in reversed(block_ranges(v, 0)):
            block, here = (x[lo:hi] for x in (q, k, v, g, beta)), slice(lo * rows, hi * rows)
            c = _block_terms(*block, scale, states.dtype, solves[here])
            dout = do[lo:hi].to(c.q.dtype).reshape(c.v.shape)
            dv_new = torch.bmm(c.attn.mT, dout)
            dread = bmm_acc((c.q * (c.grow * scale)).to(c.q.dtype).mT, dout)
            dends = torch.empty_like(dread)
            _scan_states_backward(
                c, dim_v, dread, dfinal, layout.segments, lo, hi, dends, dv_new, dinitial, carry
            )
            start = states[lo:hi].flatten(0, 1)
            values = _backward_block(c, start, dends, dout, v_news[here], dv_new, scale)
            for grad, value in zip(grads, values, strict=True):
                grad[lo:hi] = value.view(grad[lo:hi].shape)
    dq, dk, *others = (layout.join(grad) for grad in grads)
    if key_heads != dq.shape[2]:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
    return dq, dk, *others, dinitial.view(shape)


def _scan_states(c: _BlockTerms, dim_v, initial, segments, lo, hi, states, v_new, final):
    """The sequential phase for chunks lo to hi: writes their states, Vn, and final states."""
    heads = initial.shape[1]
    first, final_of = sequence_ends(segments)
    rows = (c.last, c.k_out.mT, c.u_w[..., dim_v:], c.u_w[..., :dim_v], v_new)
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
    heads = dfinal.shape[1]
    first, final_of = sequence_ends(segments)
    rows = (c.last, c.k_out, c.u_w[..., dim_v:].mT, dread, dends, dv_new)
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

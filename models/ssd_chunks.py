"""The chunk-parallel SSD of `models.ssd`, forward and backward, for tokens cut into chunks.

Within a chunk that starts from state ``h``, and with ``G`` the running sum of ``dt * A`` in it::

    y  = tril(C B^T * exp(G_i - G_j)) (dt x) + e^G C h^T + D x
    h' = e^G_C h + (e^(G_C - G) dt x)^T B

Only ``h'`` is sequential, elementwise; all the rest runs for all chunks at once. B and C are
shared by the heads of a group, and the products with the state are done for a group at a time:
the heads of a group lie side by side, as columns. The backward is closed-form.

Source: Mamba-2, arXiv 2405.21060.

Shape letters: B batch, H heads, P head dimension, G groups, R = H / G, S state size, C chunk size,
N chunks.
"""

import torch

from models.chunks import (
    block_ranges,
    bmm_acc,
    decay_dtype,
    decay_matrix,
    operand_dtype,
    sequence_ends,
)


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


def forward(x, dt, g, b, c, skip, initial, segments, room):
    """x [B, N, C, H, P], dt and g = dt * A [B, N, C, H], b and c [B, N, C, G, S], skip [H] or None,
    initial [sequences, B, G, S, R, P]; returns y like x, the final states like initial, and for the
    backward the states before each chunk, with room for more.

    Works through blocks of chunks, small enough on a CPU that the temporaries stay in its cache.
    """
    final, y = initial.clone(), torch.empty_like(x, memory_format=torch.contiguous_format)
    states = initial.new_empty(x.shape[0], room, *initial.shape[2:])
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
    return y, final, states


def backward(dy, dfinal, x, dt, g, b, c, skip, states, segments):
    """The gradients of x, dt, g, b, c, skip (None without) and the initial states, which are like
    dfinal; the rest is what ``forward`` read and kept. What it did not keep is computed again."""
    acc = states.dtype
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, g, b, c)]
    dskip = None if skip is None else torch.zeros_like(skip, dtype=acc)
    dinitial, carry = dfinal.clone(), torch.empty_like(dfinal[0])
    with torch.autocast(x.device.type, enabled=False):
        for lo, hi in reversed(block_ranges(x, 1)):
            p = _BlockTerms(*(t[:, lo:hi] for t in (x, dt, g, b, c)), acc)
            dout = dy[:, lo:hi].to(p.x.dtype)
            dread = p.by_group((dout * p.grow).to(p.x.dtype))
            add = bmm_acc(p.c.mT, dread).view(*p.lead, *states.shape[2:])
            dends = torch.empty_like(add)
            _scan_states_backward(p, add, dfinal, segments, lo, hi, dends, dinitial, carry)
            block = _backward_block(p, states[:, lo:hi], dends, dout, dread)
            if skip is not None:
                dskip += (dout * p.x).sum((0, 1, 2, 4), dtype=dskip.dtype)
                block[0].addcmul_(dout, skip[:, None])
            for grad, value in zip(grads, block, strict=True):
                grad[:, lo:hi] = value
    return *grads, dskip, dinitial


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

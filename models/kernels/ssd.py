"""SSD on a GPU: matrix products by PyTorch, and all between them in seven Triton kernels.

Steps and symbols are those of models/ssd_chunks.py. There each line of arithmetic is an operator
that reads and writes tensors as large as the input; here a kernel does all that one pass allows.

Shape letters: B batch, N chunks, C chunk size, H heads, P head dimension, G groups, R = H / G,
S state size. "By head" is [B * N * H, C, P], "by group" [B * N * G, C, R * P]. Most
kernels have one program per chunk and head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.chunks import bmm, bmm_acc, chunk_bounds, decay_dtype, running_sum


@triton.jit
def _places(H, R, C, P, BC: tl.constexpr, BP: tl.constexpr):
    """The program's head as an index into [B, N, H], and the offsets of its [C, P] tile by head, by
    group and by token, and a mask of the elements that exist."""
    bn, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, p = tl.arange(0, BC)[:, None], tl.arange(0, BP)[None, :]
    head = bn * H + h
    group = bn * (H // R) + h // R
    by_head = (head * C + i) * P + p
    by_group = (group * C + i) * (R * P) + h % R * P + p
    by_token = ((bn * C + i) * H + h) * P + p
    return head, group, by_head, by_group, by_token, (i < C) & (p < P)


@triton.jit
def _input_tile(x, ok, N, C, sxb, sxt, sxh, BC: tl.constexpr, BP: tl.constexpr):
    """The program's tile of x [B, T, H, P], whose tokens have a stride of their own, fp32."""
    bn, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, p = tl.arange(0, BC)[:, None], tl.arange(0, BP)[None, :]
    row = bn // N * sxb + (bn % N * C + i) * sxt + h * sxh
    return tl.load(x + row + p, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _prepare(x, dt, total, scores, write, write_out, attn, N, H, R, C, P, sxb, sxt, sxh,
             BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """write = dt x by head; write_out = e^(G_C - G) dt x by group; attn = tril(e^(G_i - G_j) C B^T)
    by head."""
    head, group, by_head, by_group, _, ok = _places(H, R, C, P, BC, BP)
    i = tl.arange(0, BC)
    t = tl.load(total + head * C + i, mask=i < C, other=0.0)
    step = tl.load(dt + head * C + i, mask=i < C, other=0.0)
    shrink = tl.exp((tl.load(total + head * C + C - 1) - t).to(tl.float32))
    new = _input_tile(x, ok, N, C, sxb, sxt, sxh, BC, BP) * step[:, None]
    tl.store(write + by_head, new.to(write.dtype.element_ty), mask=ok)
    new *= shrink[:, None]
    tl.store(write_out + by_group, new.to(write_out.dtype.element_ty), mask=ok)
    there = (i < C)[:, None] & (i < C)[None, :]
    place = i[:, None] * C + i[None, :]
    score = tl.load(scores + group * C * C + place, mask=there, other=0.0)
    lower = (t[:, None] - t[None, :]).to(tl.float32)
    score *= tl.exp(tl.where(there & (i[:, None] >= i[None, :]), lower, float("-inf")))
    tl.store(attn + head * C * C + place, score.to(attn.dtype.element_ty), mask=there)


@triton.jit
def _combine(inter, intra, x, skip, total, y, N, H, R, C, P, sxb, sxt, sxh,
             HAS_SKIP: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """y = e^G inter + intra + D x, by token."""
    head, _, by_head, by_group, by_token, ok = _places(H, R, C, P, BC, BP)
    i = tl.arange(0, BC)
    grow = tl.exp(tl.load(total + head * C + i, mask=i < C, other=0.0).to(tl.float32))
    out = tl.load(inter + by_group, mask=ok, other=0.0).to(tl.float32) * grow[:, None]
    out += tl.load(intra + by_head, mask=ok, other=0.0).to(tl.float32)
    if HAS_SKIP:
        tile = _input_tile(x, ok, N, C, sxb, sxt, sxh, BC, BP)
        out += tile * tl.load(skip + tl.program_id(1)).to(tl.float32)
    tl.store(y + by_token, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _spread(dy, total, dread, dout, H, R, C, P, BC: tl.constexpr, BP: tl.constexpr):
    """dread = e^G dy by group; dout = dy by head."""
    head, _, by_head, by_group, by_token, ok = _places(H, R, C, P, BC, BP)
    i = tl.arange(0, BC)
    grow = tl.exp(tl.load(total + head * C + i, mask=i < C, other=0.0).to(tl.float32))
    tile = tl.load(dy + by_token, mask=ok, other=0.0)
    tl.store(dout + by_head, tile.to(dout.dtype.element_ty), mask=ok)
    tile = tile.to(tl.float32) * grow[:, None]
    tl.store(dread + by_group, tile.to(dread.dtype.element_ty), mask=ok)


@triton.jit
def _scores_backward(dattn, total, scores, dscores, dtotal, R, C, BC: tl.constexpr):
    """Of one chunk and group: the gradient of C B^T, summed over the heads, and of the running sums
    G through the decays between the tokens of a chunk."""
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BC)
    there = (i < C)[:, None] & (i < C)[None, :]
    place = i[:, None] * C + i[None, :]
    score = tl.load(scores + group * C * C + place, mask=there, other=0.0)
    sums = tl.zeros((BC, BC), tl.float32)
    for r in tl.range(0, R, num_stages=3):  # loads of the next heads while this one is summed
        head = group * R + r
        t = tl.load(total + head * C + i, mask=i < C, other=0.0)
        lower = (t[:, None] - t[None, :]).to(tl.float32)
        decay = tl.exp(tl.where(there & (i[:, None] >= i[None, :]), lower, float("-inf")))
        grad = tl.load(dattn + head * C * C + place, mask=there, other=0.0) * decay
        sums += grad
        # summed in the dtype of G: the running sum that follows cancels what the two have in common
        weighted = (grad * score).to(total.dtype.element_ty)
        balance = tl.sum(weighted, axis=1) - tl.sum(weighted, axis=0)
        tl.store(dtotal + head * C + i, balance, mask=i < C)
    tl.store(dscores + group * C * C + place, sums.to(dscores.dtype.element_ty), mask=there)


@triton.jit
def _chunk_decay_backward(states, dends, total, dlast, H, R, C, P, S, BS: tl.constexpr,
                          BP: tl.constexpr):  # fmt: skip
    """The gradient of G_C through the decay of the state: e^G_C <h, dh'>, one number a head."""
    bn, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, group = bn * H + h, bn * (H // R) + h // R
    p = tl.arange(0, BP)[None, :]
    sums = tl.zeros((BP,), tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)[:, None]
        place = (group * S + s) * (R * P) + h % R * P + p
        there = (s < S) & (p < P)
        start = tl.load(states + place, mask=there, other=0.0).to(tl.float32)
        end = tl.load(dends + place, mask=there, other=0.0).to(tl.float32)
        sums += tl.sum(start * end, axis=0)
    grow = tl.exp(tl.load(total + head * C + C - 1).to(tl.float32))
    tl.store(dlast + head, tl.sum(sums, axis=0) * grow)


@triton.jit
def _tokens_backward(dwrite, after, inter, x, dy, skip, dt, total, dlast, dtotal, ddt, dx, dskip,
                     N, H, R, C, P, sxb, sxt, sxh, HAS_SKIP: tl.constexpr, BC: tl.constexpr,
                     BP: tl.constexpr):  # fmt: skip
    """Gradients of x by token, of dt and D, and all that G gets besides the decays within a chunk.

    dwrite, of e^(G_C - G) dt x, and inter, what the state gave, by group; after, of dt x within the
    chunk, by head; dy by token.
    """
    head, _, by_head, by_group, by_token, ok = _places(H, R, C, P, BC, BP)
    i = tl.arange(0, BC)
    sum_dtype = total.dtype.element_ty
    t = tl.load(total + head * C + i, mask=i < C, other=0.0)
    step = tl.load(dt + head * C + i, mask=i < C, other=0.0)
    shrink = tl.exp((tl.load(total + head * C + C - 1) - t).to(tl.float32))
    tile = _input_tile(x, ok, N, C, sxb, sxt, sxh, BC, BP)
    out = tl.load(dy + by_token, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(dwrite + by_group, mask=ok, other=0.0).to(tl.float32) * shrink[:, None]
    shrunk = tl.sum((grad * tile * step[:, None]).to(sum_dtype), axis=1)
    grad += tl.load(after + by_head, mask=ok, other=0.0).to(tl.float32)
    read = tl.load(inter + by_group, mask=ok, other=0.0).to(tl.float32) * out
    read = tl.sum(read, axis=1) * tl.exp(t.to(tl.float32))
    change = tl.load(dtotal + head * C + i, mask=i < C, other=0.0) + read - shrunk
    change += tl.where(i == C - 1, tl.sum(shrunk, axis=0) + tl.load(dlast + head), 0.0)
    tl.store(dtotal + head * C + i, change, mask=i < C)
    tl.store(ddt + head * C + i, tl.sum(grad * tile, axis=1), mask=i < C)
    grad *= step[:, None]
    if HAS_SKIP:
        grad += out * tl.load(skip + tl.program_id(1)).to(tl.float32)
        tl.store(dskip + head, tl.sum(tl.sum(out * tile, axis=1), axis=0))
    tl.store(dx + by_token, grad.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def _decay_scan(add, decay, initial, bounds, states, final, N, F, H, per_group, R, P,
                REVERSE: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Writes s to states[n], then s = s * decay[n] + add[n], over the chunks of one sequence."""
    sequence, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    ok = f < F
    head = f // per_group * R + f // P % R
    here = (sequence * tl.num_programs(2) + b) * F + f
    s = tl.load(initial + here, mask=ok, other=0.0)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    for step in range(end - begin):
        row = b * N + (end - 1 - step if REVERSE else begin + step)
        tl.store(states + row * F + f, s, mask=ok)
        s *= tl.load(decay + row * H + head, mask=ok, other=0.0)
        s += tl.load(add + row * F + f, mask=ok, other=0.0)
    tl.store(final + here, s, mask=ok)


def decay_scan(add, decay, initial, segments, states, final, reverse: bool) -> None:
    """Writes states [B, N, G, S, R, P] and final: the states before each chunk and after the last,
    or with ``reverse``, from the last chunk to the first, the gradients of those after each chunk
    and before the first. add like states, decay [B, N, H] and initial [sequences, B, ...] fp32."""
    batch, chunks, _, size, ratio, dim = add.shape
    features = add[0, 0].numel()
    _decay_scan[(triton.cdiv(features, 512), len(segments), batch)](
        add.contiguous(), decay.contiguous(), initial,
        chunk_bounds(segments, add.device), states, final, chunks, features, decay.shape[2],
        size * ratio * dim, ratio, dim, REVERSE=reverse, BF=512,
    )  # fmt: skip


class _Sizes:
    """Shapes, grid and tile of a call: x [B, N, C, H, P] and b [B, N, C, G, S]."""

    def __init__(self, x: Tensor, b: Tensor):
        self.batch, self.chunks, self.size, self.heads, self.dim = x.shape
        self.groups, self.state = b.shape[3:]
        self.ratio = self.heads // self.groups
        self.grid = (self.batch * self.chunks, self.heads)
        self.shape = (self.heads, self.ratio, self.size, self.dim)
        # the stride of a single element says nothing
        token = x.stride(2) if self.size > 1 else x.stride(1)
        self.strides = (x.stride(0), token, x.stride(3))
        self.tile = {
            "BC": triton.next_power_of_2(self.size),
            "BP": triton.next_power_of_2(self.dim),
        }

    def empty(self, like: Tensor, layout: str) -> Tensor:
        """By head, by group or by token, in the dtype of ``like``."""
        rows = self.batch * self.chunks
        shape = {
            "head": (rows * self.heads, self.size, self.dim),
            "group": (rows * self.groups, self.size, self.ratio * self.dim),
            "token": (self.batch, self.chunks, self.size, self.heads, self.dim),
        }[layout]
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def state_shape(self, chunks: int) -> tuple[int, ...]:
        return (self.batch, chunks, self.groups, self.state, self.ratio, self.dim)


def supports(x: Tensor) -> bool:
    """Whether a chunk of a head fits a program: x [B, N, C, H, P] of unit last stride."""
    size, dim = x.shape[2], x.shape[4]
    return size <= 64 and size * dim <= 8192 and x.stride(-1) == 1


def _common(x, dt, g, b, c, exact=False):
    """Sizes; b and c by group; dt and the running sum G as [B, N, H, C]; C B^T; and _prepare."""
    z = _Sizes(x, b)
    b, c = (t.to(x.dtype).transpose(2, 3).reshape(-1, z.size, z.state) for t in (b, c))
    dt = dt.mT.contiguous()
    total = running_sum(g.mT.contiguous(), decay_dtype(x.dtype), exact)
    scores = bmm_acc(c, b.mT, exact)
    write, write_out = z.empty(x, "head"), z.empty(x, "group")
    attn = x.new_empty(write.shape[0], z.size, z.size)
    _prepare[z.grid](
        x, dt, total, scores, write, write_out, attn, z.chunks, *z.shape, *z.strides, **z.tile
    )
    return z, b, c, dt, total, scores, write, write_out, attn


def forward(x, dt, g, b, c, skip, initial, segments, exact, room) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, the final states like initial, and the states before every chunk, in the dtype of
    x, for ``backward``. As ``models.ssd_chunks.forward``; x as ``supports`` says."""
    z, b, c, _, total, _, write, write_out, attn = _common(x, dt, g, b, c, exact)
    final = initial.clone()
    kept = x.new_empty(z.state_shape(room))
    states = kept[:, : z.chunks]
    add = bmm_acc(b.mT, write_out, exact).view(states.shape)
    last = total[..., -1].float().exp()
    decay_scan(add, last, initial, segments, states, final, reverse=False)
    inter = bmm(c, states.view(-1, z.state, z.ratio * z.dim), exact)
    intra = bmm(attn, write, exact)
    y = z.empty(x, "token")
    _combine[z.grid](
        inter, intra, x, skip, total, y, z.chunks, *z.shape, *z.strides,
        HAS_SKIP=skip is not None, **z.tile,
    )  # fmt: skip
    return y, final, kept


def backward(dy, dfinal, x, dt, g, b, c, skip, states, segments):
    """Gradients of x, dt, g, b, c, skip (None without) and of the initial states."""
    z, b, c, dt, total, scores, write, write_out, attn = _common(x, dt, g, b, c)
    dy = dy.contiguous()
    dread, dout = z.empty(x, "group"), z.empty(x, "head")
    _spread[z.grid](dy, total, dread, dout, *z.shape, **z.tile)

    # Through the states.
    dinitial, dends = dfinal.clone(), torch.empty_like(states)
    add = bmm_acc(c.mT, dread).view(states.shape)
    last = total[..., -1].float().exp()
    decay_scan(add, last, dfinal, segments, dends, dinitial, reverse=True)
    dlast = torch.empty_like(last)
    _chunk_decay_backward[z.grid](
        states, dends, total, dlast, *z.shape, z.state, BS=16, BP=z.tile["BP"]
    )
    start, dend = (s.view(-1, z.state, z.ratio * z.dim) for s in (states, dends))
    dc, db = bmm_acc(dread, start.mT), bmm_acc(write_out, dend.mT)
    inter, dwrite = torch.bmm(c, start), torch.bmm(b, dend)

    # Within the chunks.
    dattn = bmm_acc(dout, write.mT)
    dscores = x.new_empty(scores.shape)
    dtotal = torch.empty_like(total)
    _scores_backward[(scores.shape[0],)](
        dattn, total, scores, dscores, dtotal, z.ratio, z.size, BC=z.tile["BC"], num_warps=8
    )
    dc += bmm_acc(dscores, b)
    db += bmm_acc(dscores.mT, c)
    after = torch.bmm(attn.mT, dout)

    dx, ddt = z.empty(x, "token"), torch.empty_like(dt)
    dskip = None if skip is None else torch.empty_like(last)
    _tokens_backward[z.grid](
        dwrite, after, inter, x, dy, skip, dt, total, dlast, dtotal, ddt, dx, dskip,
        z.chunks, *z.shape, *z.strides, HAS_SKIP=skip is not None, **z.tile,
    )  # fmt: skip
    # g enters through its running sum, so its gradient is the running sum from the end
    dg = dtotal.flip(-1).cumsum(-1).flip(-1).to(g.dtype)
    dskip = None if skip is None else dskip.sum((0, 1))
    db, dc = (
        t.to(x.dtype).view(z.batch, z.chunks, z.groups, z.size, z.state).transpose(2, 3)
        for t in (db, dc)
    )
    return dx, ddt.mT, dg.mT, db, dc, dskip, dinitial

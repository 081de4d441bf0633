"""The exact mode: a token has the same bits in the training forward, in a prefill of any split and
in decoding, whatever else is in the batch.

Three rules make it so. Every sequence is cut into chunks of `CHUNK` tokens that begin where it
begins, padded at its end, so that a token has the same place in its chunk wherever it is computed.
Every operator gives a chunk bits that do not depend on the other chunks: it works row by row, or is
a product with one tile (`models.products`), or is called once a chunk (`by_chunks`). And a row of
a chunk does not see later rows. Decoding then needs no code of its own: its state is the layers'
states at the start of the open chunk and that chunk's tokens, and it runs the chunk again for each
new token.

Shape letters: B batch, S sequences, T tokens, V vocabulary.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.chunks import check_state, sequence_offsets

CHUNK = 32  # decoding takes as long as a chunk; more and smaller ones take training longer

Layers = list[tuple[Tensor, ...]]
Run = Callable[[Tensor, Layers | None, bool, Tensor | None], tuple[Tensor, Layers | None]]


class _Rounded(torch.autograd.Function):
    """`value`, with the gradient of `near`, which differs from it by rounding alone."""

    @staticmethod
    def forward(ctx, near, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def by_chunks(exact: bool, function: Callable, *tensors: Tensor | None) -> Tensor:
    """``function(*tensors)``, which works row by row on tensors [1, T, ...] or None. In exact mode
    on a CPU it gets one chunk at a time: PyTorch's vectorised functions round differently at the
    end of a buffer, so that a row's bits depend on how many rows there are. For the backward, all
    chunks at once are faster."""
    if not exact or tensors[0].device.type != "cpu" or tensors[0].shape[1] == CHUNK:
        return function(*tensors)
    with torch.no_grad():
        cut = (itertools.repeat(None) if t is None else t.split(CHUNK, dim=1) for t in tensors)
        value = torch.cat([function(*chunk) for chunk in zip(*cut, strict=False)], dim=1)
    return _Rounded.apply(function(*tensors), value) if torch.is_grad_enabled() else value


def forward(
    run: Run, tokens: Tensor, state: Layers | None, output_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Layers | None]:
    """``LanguageModel.forward`` in exact mode; arguments and results are those explained there.

    ``run`` is that forward for whole chunks: tokens packed as [1, T], and offsets that are
    multiples of `CHUNK`. A state has one entry more than there are layers: the tokens of each
    sequence's open chunk, [S, CHUNK] int64, and their number, below `CHUNK`, [S] int64.
    """
    offsets, tokens = sequence_offsets(cu_seqlens, *tokens.shape), tokens.long()
    if offsets is None:
        pieces = tokens.unbind()
    else:
        pieces = tokens[0].split([end - start for start, end in itertools.pairwise(offsets)])
    layers, before = None, [0] * len(pieces)
    if state is not None:
        *layers, (opened, filled) = state
        check_state(opened, (len(pieces), CHUNK), torch.int64, tokens, "the open chunk")
        check_state(filled, (len(pieces),), torch.int64, tokens, "the open chunk's length")
        if offsets is None and tokens.shape[1] == 1 and output_state:
            return _step(run, tokens, layers, opened, filled)
        before = filled.tolist()
        pieces = [torch.cat((opened[i, :n], pieces[i])) for i, n in enumerate(before)]
    if output_state:
        rows, state = _prefill(run, pieces, layers)
    else:
        rows, state = _run_padded(run, pieces, layers, False)
    rows = [row[n:] for row, n in zip(rows, before, strict=True)]
    return (torch.stack(rows) if offsets is None else torch.cat(rows)[None]), state


def _run_padded(
    run: Run, pieces: Sequence[Tensor], layers: Layers | None, output_state: bool
) -> tuple[list[Tensor], Layers | None]:
    """The logits [T, V] of each of some sequences of tokens [T], padded to whole chunks for `run`,
    at least one, and the states after their last chunks."""
    sizes = [max(1, -(-len(piece) // CHUNK)) * CHUNK for piece in pieces]
    padded = [
        F.pad(piece, (0, size - len(piece))) for piece, size in zip(pieces, sizes, strict=True)
    ]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device="cpu")
    logits, layers = run(torch.cat(padded)[None], layers, output_state, offsets)
    rows = logits[0].split(sizes)
    return [row[: len(piece)] for row, piece in zip(rows, pieces, strict=True)], layers


def _prefill(
    run: Run, pieces: Sequence[Tensor], layers: Layers | None
) -> tuple[list[Tensor], Layers]:
    """The logits of each sequence, and the state after it: whole chunks first, open ones after."""
    whole = [len(piece) // CHUNK * CHUNK for piece in pieces]
    some = [i for i, length in enumerate(whole) if length]
    rows: list[list[Tensor]] = [[] for _ in pieces]
    if some:
        given = layers
        if given is not None:
            given = [tuple(t[some] for t in layer) for layer in given]
        logits, ends = _run_padded(run, [pieces[i][: whole[i]] for i in some], given, True)
        for i, part in zip(some, logits, strict=True):
            rows[i].append(part)
        layers = _replaced(layers, len(pieces), some, ends)
    rest = [piece[length:] for piece, length in zip(pieces, whole, strict=True)]
    opened = torch.stack([F.pad(piece, (0, CHUNK - len(piece))) for piece in rest])
    filled = torch.tensor([len(piece) for piece in rest], device=opened.device)
    logits, ends = _run_padded(run, opened.unbind(), layers, layers is None)
    if layers is None:
        layers = [tuple(map(torch.zeros_like, layer)) for layer in ends]
    for row, part, piece in zip(rows, logits, rest, strict=True):
        row.append(part[: len(piece)])
    return [torch.cat(row) for row in rows], [*layers, (opened, filled)]


def _replaced(layers: Layers | None, count: int, some: list[int], new: Layers) -> Layers:
    """The states of `count` sequences, zeros if None, with those of `some` of them new."""
    if len(some) == count:
        return new
    if layers is None:
        layers = [tuple(t.new_zeros(count, *t.shape[1:]) for t in layer) for layer in new]
    index = torch.tensor(some, device=new[0][0].device)
    return [
        tuple(t.index_copy(0, index, n) for t, n in zip(*pair, strict=True))
        for pair in zip(layers, new, strict=True)
    ]


def _step(
    run: Run, tokens: Tensor, layers: Layers, opened: Tensor, filled: Tensor
) -> tuple[Tensor, Layers]:
    """One token [S, 1] for each sequence, without a branch that a CUDA graph could not hold: the
    open chunk with the token in its place, and the state at its end where that fills it."""
    count = len(opened)
    opened = opened.scatter(1, filled[:, None], tokens)
    offsets = CHUNK * torch.arange(count + 1, dtype=torch.int32, device="cpu")
    logits, ends = run(opened.view(1, -1), layers, True, offsets)
    rows = torch.arange(count, device=filled.device)
    logits = logits.unflatten(1, (count, CHUNK))[0, rows, filled]
    full = filled == CHUNK - 1
    layers = [
        tuple(
            torch.where(full.view(-1, *[1] * (end.dim() - 1)), end, start)
            for start, end in zip(*pair, strict=True)
        )
        for pair in zip(layers, ends, strict=True)
    ]
    return logits[:, None], [*layers, (opened, (filled + 1) % CHUNK)]

"""What the two scans share: checks of offsets and states, the layout of tokens in chunks.

Shape letters: B batch, T tokens, H heads, D features per head, C chunk size, N chunks.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_offsets(cu_seqlens: Tensor | None, batch: int, tokens: int) -> list[int] | None:
    """The offsets of packed sequences as Python integers, checked.

    Args:
        cu_seqlens: ``[sequences + 1]`` integer tensor of token offsets, or None. Reading a tensor
            that lies on a GPU waits for the GPU, so a caller with many layers passes a CPU tensor.
        batch: batch size of the packed input, which has to be 1.
        tokens: number of tokens of the packed input.
    Raises:
        ValueError: for a batch other than 1, and for offsets that are not a 1-D integer tensor,
            do not start at 0, decrease, or do not end at ``tokens``.
    """
    if cu_seqlens is None:
        return None
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be a 1-D integer tensor of sequences + 1 offsets, got shape "
            f"{list(cu_seqlens.shape)} and {cu_seqlens.dtype}; use for example "
            "torch.tensor([0, 5, 12], dtype=torch.int32)"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens needs all sequences packed into one row, got batch size {batch}; "
            "concatenate them along the token dimension"
        )
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}; prepend a 0")
    for index, (left, right) in enumerate(itertools.pairwise(offsets)):
        if right < left:
            raise ValueError(
                f"cu_seqlens must not decrease, got {left} then {right} at index {index + 1}; "
                "use the running sum of the sequence lengths"
            )
    if offsets[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must end at the number of tokens, got {offsets[-1]} and {tokens} tokens; "
            "every token belongs to one sequence"
        )
    return offsets


def check_state(
    state: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    like: Tensor,
    name: str = "initial_state",
) -> None:
    """Raises ValueError unless ``state`` has ``shape``, ``dtype`` and the device of ``like``."""
    if tuple(state.shape) != shape:
        raise ValueError(
            f"{name} must have shape {list(shape)}, got {list(state.shape)}; a state belongs to "
            "one model and one batch size"
        )
    if state.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {state.dtype}; convert it with .to({dtype})")
    if state.device != like.device:
        raise ValueError(
            f"{name} must be on the device of the input, {like.device}, got {state.device}; "
            f"move it with .to({str(like.device)!r})"
        )


def offsets_and_states(
    x: Tensor, cu_seqlens: Tensor | None, given: Tensor | None, shape: tuple[int, ...]
) -> tuple[list[int] | None, Tensor]:
    """The offsets of the sequences packed into x [B, T, ...], None for a batch, and the states of
    `shape` that the sequences begin with, [sequences, *shape] or [B, *shape]: `given`, or zeros.
    Raises ValueError for offsets or states that do not fit."""
    offsets = sequence_offsets(cu_seqlens, *x.shape[:2])
    shape = (len(x) if offsets is None else len(offsets) - 1, *shape)
    if given is None:
        return offsets, x.new_zeros(shape, dtype=state_dtype(x))
    check_state(given, shape, state_dtype(x), x)
    return offsets, given


def each_sequence(
    steps: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    offsets: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """`steps(*inputs, state)` over a batch, inputs [B, T, ...], or over each packed sequence:
    outputs [B, T, ...] and final states."""
    if offsets is None:
        return steps(*inputs, state)
    parts = [
        steps(*(x[:, start:end] for x in inputs), state[i : i + 1])
        for i, (start, end) in enumerate(itertools.pairwise(offsets))
    ]
    outputs, states = zip(*parts, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


class ChunkLayout:
    """Where the tokens of a batch, or of packed sequences, lie when cut into chunks.

    Every sequence starts at a chunk boundary, so no chunk holds tokens of two sequences; the
    slots left over at its end are zeros, which leave a state untouched.

    The layout consists of Python numbers that differ from length to length, and the scans loop over
    its chunks. torch.compile would unroll these loops again for each length, which takes minutes;
    so it sees the chunk-parallel scans as operators (`models.operators`). ``cut`` and ``uncut`` are
    the adjoints of each other, as are ``split`` and ``join``: an operator's backward needs no more.

    Attributes:
        chunks: chunks in all, N.
        segments: chunks of each sequence, in order; ``(N,)`` for a batch.
    """

    def __init__(self, x: Tensor, chunk_size: int, offsets: list[int] | None):
        self.tokens, self.chunk_size = x.shape[1], chunk_size
        offsets = [0, self.tokens] if offsets is None else offsets
        lengths = [right - left for left, right in itertools.pairwise(offsets)]
        self.segments = tuple(-(-length // chunk_size) for length in lengths)
        self.chunks = sum(self.segments)
        self.slots = None
        if any(length % chunk_size for length in lengths[:-1]):  # else all lie where they belong
            starts = torch.tensor((0, *self.segments)).cumsum(0)[:-1] * chunk_size
            shift = torch.repeat_interleave(
                starts - torch.tensor(offsets[:-1]), torch.tensor(lengths)
            )
            self.slots = (torch.arange(self.tokens) + shift).to(x.device)

    def cut(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[B, N, C, ...]``: a view where nothing has to be moved."""
        size = self.chunks * self.chunk_size
        if self.slots is not None:
            x = x.new_zeros(x.shape[0], size, *x.shape[2:]).index_copy(1, self.slots, x)
        elif size != self.tokens:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, size - self.tokens))
        return x.unflatten(1, (self.chunks, self.chunk_size))

    def uncut(self, x: Tensor) -> Tensor:
        """``[B, N, C, ...]`` back to ``[B, T, ...]``, the unused slots dropped."""
        x = x.flatten(1, 2)
        return x[:, : self.tokens] if self.slots is None else x.index_select(1, self.slots)

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, H, ...]`` to ``[N, B, H, C, ...]``."""
        return self.cut(x).movedim((1, 0, 3, 2), (0, 1, 2, 3))

    def join(self, x: Tensor) -> Tensor:
        """``[N, B, H, C, ...]`` back to ``[B, T, H, ...]``."""
        return self.uncut(x.movedim((0, 1, 2, 3), (1, 0, 3, 2)))


def chunk_room(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> int:
    """The number of chunks that x [B, T, ...] is cut into, and of packed sequences one that is
    large enough, which needs none of the offsets' values."""
    if cu_seqlens is None:
        return -(-x.shape[1] // chunk_size)
    return x.shape[1] // chunk_size + cu_seqlens.numel() - 1


def empty_chunks(x: Tensor) -> Tensor:
    """An empty tensor like x ``[N, B, H, C, ...]`` that ``ChunkLayout.join`` reads as a view."""
    chunks, batch, heads, size, *rest = x.shape
    memory = torch.empty(batch, chunks, size, heads, *rest, dtype=x.dtype, device=x.device)
    return memory.movedim((0, 1, 2, 3), (1, 0, 3, 2))


@functools.lru_cache(maxsize=64)  # every layer asks for the same ones
def chunk_bounds(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets in chunks: sequence i has the chunks from bounds[i] up to bounds[i + 1]."""
    bounds = torch.tensor((0, *segments), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return bounds.to(device)


@functools.lru_cache(maxsize=64)  # every layer asks for the same ones
def chunk_table(offsets: tuple[int, ...], chunk_size: int, device: torch.device) -> Tensor:
    """Where each chunk lies, for kernels that read tokens in place: int32 [N, 3], its first token,
    its number of tokens and its sequence, in the order of ``ChunkLayout``. ``offsets``: those of
    packed sequences, or ``(0, T)`` for each row of a batch."""
    rows = [
        (start, min(chunk_size, right - start), sequence)
        for sequence, (left, right) in enumerate(itertools.pairwise(offsets))
        for start in range(left, right, chunk_size)
    ]
    return torch.tensor(rows, dtype=torch.int32).view(-1, 3).to(device)


_captured: dict[int, Tensor] = {}


def kept_for_graphs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, which come from a cache that forgets. A CUDA graph that is being captured will
    read them, so they are held from then on: as many as there are layouts of captured calls."""
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.update((t.data_ptr(), t) for t in tensors)
    return tensors


# Elements of one head-dimension tensor per block: fastest of 2^15 to 2^20 on two EPYC cores.
BLOCK_ELEMENTS = 1 << 17


def block_ranges(x: Tensor, dim: int) -> list[tuple[int, int]]:
    """Ranges of chunks to work on together, for x with its chunks along ``dim``.

    On a CPU the temporaries of a block stay near the cache; a GPU gets all chunks in one block.
    """
    chunks = x.shape[dim]
    step = chunks
    if x.device.type == "cpu" and x.numel():
        step = max(1, BLOCK_ELEMENTS * chunks // x.numel())
    return [(lo, min(lo + step, chunks)) for lo in range(0, chunks, max(1, step))]


def sequence_ends(segments: tuple[int, ...]) -> tuple[dict[int, int], dict[int, int]]:
    """Which chunk is the first, and which the last, of which sequence."""
    first, last, chunk = {}, {}, 0
    for sequence, count in enumerate(segments):
        if count:
            first[chunk], last[chunk + count - 1] = sequence, sequence
        chunk += count
    return first, last


def operand_dtype(x: Tensor) -> torch.dtype:
    """What the chunk-parallel products read: 16 bits on a GPU where the input has them.

    Decays, triangular systems and states stay in fp32 (fp64 for fp64) everywhere.
    """
    if x.dtype == torch.float64:
        return torch.float64
    return x.dtype if x.device.type == "cuda" else torch.float32


def state_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bmm_acc(a: Tensor, b: Tensor) -> Tensor:
    """Batched product [X, I, J] x [X, J, K] in fp32 (fp64), whatever the operands' dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def add_bmm(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """``total += alpha * a @ b``, in place and in the dtype of total, fp32 or fp64."""
    if a.dtype == total.dtype:
        return total.baddbmm_(a, b, alpha=alpha)
    return total.add_(bmm_acc(a, b), alpha=alpha)


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a * b, -1)`` of two matrices."""
    if a.device.type == "cpu":
        return torch.bmm(a[:, None], b[..., None])[:, 0, 0]  # no product in memory
    return (a * b).sum(-1)  # a GPU's library has no kernel for matrices of one row and column


def decay_dtype(operands: torch.dtype) -> torch.dtype:
    """What decays are summed and subtracted in, for chunk-parallel products that read ``operands``.

    Their exponentials come from differences of long sums: in fp32 these lose digits that fp32
    products would keep. 16-bit products have none to lose.
    """
    return torch.float64 if operands in (torch.float32, torch.float64) else torch.float32


def decay_matrix(total: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(total_i - total_j)`` for i >= j, else 0, in ``dtype``: [..., C] to [..., C, C]."""
    size = total.shape[-1]
    upper = torch.ones(size, size, dtype=torch.bool, device=total.device).triu_(1)
    # mask first: exp of the values outside the mask could overflow
    pair = (total[..., :, None] - total[..., None, :]).to(dtype)
    return pair.masked_fill_(upper, float("-inf")).exp_()

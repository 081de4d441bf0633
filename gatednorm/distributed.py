"""Rows whose channels lie on several ranks: what travels between them is one number a row.

Every rank of a process group has `D` neighbouring columns of each row, in the order of the ranks. A
group of channels lies within a rank, which is the plain call, or covers whole ranks. Then each rank
reads its columns once for their means, the means travel, and a second read, by the kernel of wide
rows, uses those of the whole group. docs/many-gpus.md says what is promised.
"""

import weakref
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .call import Call
from .options import Options


class _Known:
    """A process group that a call has named, and the kinds of calls that its ranks found alike. One
    that is destroyed must not live on in here: gloo's threads would end the process with an error.
    """

    __slots__ = ("alike", "reference")

    def __init__(self, process_group: "dist.ProcessGroup"):
        self.reference = weakref.ref(process_group)
        self.alike: set[tuple[Any, ...]] = set()

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        return self.reference()


# By name: operators, and modules that are copied or saved, can carry a string only.
_known: dict[str, _Known] = {}


class Ranks(NamedTuple):
    """The ranks of a process group that share this rank's norm group: `size` from `first` on."""

    process_group: "dist.ProcessGroup"
    first: int
    size: int


def name_of(process_group: Any) -> str:
    """The name by which options, operators and modules call a process group.

    Raises:
        TypeError: for anything else.
        ValueError: where this rank is no part of it.
    """
    name: str
    if torch.compiler.is_compiling():
        name = process_group.group_name
        return name
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group must be one that this rank is part of, got that of other ranks (what "
            "torch.distributed.new_group returns there); call the norm on its own ranks only"
        )
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}; a DeviceMesh has get_group()"
        )
    name = process_group.group_name
    known = _known.get(name)
    if known is None or known.process_group is not process_group:
        _known[name] = _Known(process_group)
    return name


def process_group_of(name: str | None) -> "dist.ProcessGroup":
    """The process group that :func:`name_of` has named."""
    return _find(name)[1]


def _find(name: str | None) -> tuple[_Known, "dist.ProcessGroup"]:
    known = _known.get(name or "")
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if (world is not None and world.group_name == name) and (
        known is None or known.process_group is not world  # a name may outlive a world
    ):
        known = _known[name] = _Known(world)
    process_group = None if known is None else known.process_group
    if known is None or process_group is None:
        raise RuntimeError(
            f"process_group {name!r} is not known in this process; before a compiled or loaded "
            "program uses it, call the norm once with it, or make an RMSNorm with it"
        )
    return known, process_group


def local_groups(options: Options, width: int) -> int:
    """How many norm groups have channels among this rank's `width`."""
    if options.group_size is None or options.group_size > width:
        return 1
    return width // options.group_size


def share(options: Options, width: int) -> tuple[Ranks | None, Options]:
    """The ranks that share the norm group of this rank, None for this one alone; and the options of
    a call on this rank's `width` columns.

    Raises:
        ValueError: groups that do not fit the ranks.
    """
    process_group = process_group_of(options.process_group)
    size, channels = process_group.size(), options.group_size
    whole = width * size
    local = options._replace(process_group=None)
    if channels is None:
        channels = whole
    if size == 1 or (0 < channels <= width and width % channels == 0):
        return None, local
    if channels < 1 or channels % width or whole % channels:
        raise ValueError(
            "group_size must divide the channels of a rank, or be a multiple of them that divides "
            f"the whole row's, got group_size={options.group_size}, {width} channels a rank and "
            f"{size} ranks; split the row into columns that end where a group does"
        )
    ranks = channels // width
    first = process_group.rank() // ranks * ranks
    return Ranks(process_group, first, ranks), local._replace(group_size=None)


class RanksDifferError(ValueError):
    """The ranks of a process group were called with different shapes, dtypes or options."""


def enter(name: str, options: Options, **tensors: object) -> tuple[Ranks | None, Options]:
    """:func:`share` of a checked call. At a process group's first call with these options, dtypes
    and widths, and at each under `TORCH_DISTRIBUTED_DEBUG=DETAIL`, the ranks tell each other what
    they were called with.

    Raises:
        ValueError: on every rank, where these differ; groups that do not fit the ranks.
        RuntimeError: where a CUDA graph captures it.
    """
    known, process_group = _find(options.process_group)
    kind = (name, options, *map(_kind, tensors.values()))
    if kind not in known.alike or dist.get_debug_level() == dist.DebugLevel.DETAIL:
        _check_alike(process_group, name, options, tensors)
        known.alike.add(kind)
    x = tensors["x"]
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0:
        return None, options._replace(process_group=None)  # which is refused
    return share(options, x.shape[-1])


def _kind(t: object) -> tuple[Any, ...] | None:
    """What a tensor has in common with those of other batches: dtype and width."""
    return (t.dtype, t.shape[-1:]) if isinstance(t, Tensor) else None


def _check_alike(
    process_group: "dist.ProcessGroup", name: str, options: Options, tensors: dict[str, object]
) -> None:
    mine = {"the function": name}
    for key, t in tensors.items():
        shape = f"{list(t.shape)} in {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        mine[key] = "None" if t is None else shape
    mine |= {key: repr(value) for key, value in options._asdict().items()}
    mine.pop("process_group")
    everyone: list[dict[str, str]] = [{}] * process_group.size()
    found = next((t for t in tensors.values() if isinstance(t, Tensor)), torch.empty(0))
    with torch.cuda.device_of(found):  # NCCL sends objects by way of the current device
        if found.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "process_group: the call at which ranks compare their shapes and options must not "
                "be captured in a CUDA graph, got the first one with these options, or "
                "TORCH_DISTRIBUTED_DEBUG=DETAIL; call the norm once before the capture"
            )
        dist.all_gather_object(everyone, mine, group=process_group)
    for key in mine:
        for rank, theirs in enumerate(everyone):
            if theirs.get(key) != everyone[0].get(key):
                raise RanksDifferError(
                    f"process_group: {key} must be the same on every rank, got "
                    f"{everyone[0].get(key)} on rank 0 and {theirs.get(key)} on rank {rank} of the "
                    "group; pass equal shapes, dtypes and options"
                )


def all_gather(everyone: Tensor, own: Tensor, process_group: "dist.ProcessGroup") -> None:
    """`own` `[n]` of each rank, one after the other, to `everyone` `[ranks * n]`."""
    # The name that PyTorch 2.13 gives to what older ones call by the other.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, own, group=process_group)


def _parts_of_group(ranks: Ranks, own: Tensor) -> Tensor:
    """`own` `[numbers, rows]` of each rank that shares the group: `[ranks, numbers, rows]`, the
    same on every one of them."""
    everyone = own.new_empty(ranks.process_group.size() * own.numel())
    all_gather(everyone, own.view(-1), ranks.process_group)
    return everyone.view(-1, *own.shape)[ranks.first : ranks.first + ranks.size]


def forward(
    kernels: ModuleType,
    ranks: Ranks,
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """The forward of `kernels` with the statistics of the whole group, which are written to `mean`
    and `rstd` `[rows, 1]` unless None."""
    n_rows, rms, eps = x.numel() // call.width, call.options.is_rms_norm, call.options.eps
    own = torch.empty(1 if rms else 2, n_rows, dtype=call.compute_dtype, device=x.device)
    kernels.forward_means(call, x, z, None if rms else own[1], own[0])
    if rstd is None:
        rstd = torch.empty(n_rows, 1, dtype=own.dtype, device=own.device)
        mean = None if rms else torch.empty_like(rstd)
    kernels.combine(_parts_of_group(ranks, own), rstd, mean, eps)
    kernels.forward(call, x, weight, bias, z, out, mean, rstd, True)


def backward(
    kernels: ModuleType,
    ranks: Ranks,
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dz: Tensor | None,
    y: Tensor | None,
    parameters: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward of `kernels` with the sums of the whole group; returns `dw`, `db`."""
    n_rows, rms = x.numel() // call.width, call.options.is_rms_norm
    own = torch.empty(1 if rms else 2, n_rows, dtype=call.compute_dtype, device=x.device)
    c1, c2 = own[0], None if rms else own[1]
    kernels.backward_means(call, dy, x, weight, z, mean, rstd, c1, c2)
    kernels.combine(_parts_of_group(ranks, own), c1, c2)
    dw, db = kernels.backward(
        call, dy, x, weight, bias, z, mean, rstd, dx, dz, y, parameters, c1, c2
    )
    return dw, db

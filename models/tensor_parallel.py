"""Tensor parallelism: the heads of mixers and the channels of MLPs, spread over several ranks.

Each rank computes its heads from the same hidden states, and the residual's updates are summed: one
all-reduce in the forward and one in the backward for each mixer and each MLP. Embedding, head and
the norms of the residual stream are on every rank, where they have the same gradients, bit for
bit within a group (groups average theirs apart from each other).
Parameters are plain tensors: the rows, or columns, of the whole ones that are a rank's own. What a
fused projection holds side by side is taken head by head.

Source: the operators f and g of Megatron-LM, arXiv 1909.08053.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatednorm import RMSNorm
from models.language_model import MLP, LanguageModel
from models.mixer import Fused, Mixer


class _Enter(torch.autograd.Function):
    """x on every rank, for parts of a computation on each: their gradients are summed."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.process_group)
        return dx, None


class _Leave(torch.autograd.Function):
    """The sum of what each rank has computed, on every rank."""

    @staticmethod
    def forward(ctx, y, process_group):
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=process_group)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, None


@dataclass(frozen=True)
class Share:
    """What the ranks have of one parameter.

    Attributes:
        dim: 0 for rows, 1 for columns.
        rows: of each rank, in order, their places in the whole parameter.
        size: of the whole parameter in this dimension.
    """

    dim: int
    rows: list[Tensor]
    size: int

    @functools.cached_property
    def copies(self) -> Tensor:
        """How many ranks have each row of the whole parameter, [size]."""
        return torch.cat(self.rows).bincount(minlength=self.size)

    @functools.cached_property
    def common(self) -> Tensor:
        """The rows that several ranks have."""
        return (self.copies > 1).nonzero().flatten()


def check_ranks(model: LanguageModel, ranks: int) -> None:
    """Raises ValueError where the heads of `model` cannot be spread over so many ranks."""
    if model.exact and ranks > 1:
        raise ValueError(
            f"exact mode needs a single rank, got {ranks}: sums over ranks round otherwise than "
            "one product; leave the mode, or the other ranks"
        )
    for block in model.blocks:
        mixer = block.mixer
        if mixer.out_proj.bias is not None and ranks > 1:
            raise ValueError(f"bias must be False for several ranks, got True for {ranks}; use one")
        for name, count in mixer.head_counts().items():
            shared = name == mixer.SHARED
            if count % ranks and not (shared and ranks % count == 0):
                raise ValueError(
                    f"{name} must be a multiple of the number of ranks{', or divide it' * shared}, "
                    f"got {count} for {ranks}; use {math.gcd(count, ranks)} of them, "
                    "or change the model"
                )
        if block.mlp is not None and block.mlp.out_proj.in_features % ranks:
            raise ValueError(
                "the MLP's inner size must be a multiple of the number of ranks, got "
                f"{block.mlp.out_proj.in_features} for {ranks}; change mlp_size or mlp_ratio"
            )
        norm, own = mixer.norm, mixer.inner_size // ranks
        group = norm.group_size or norm.hidden_size
        if norm.hidden_size == mixer.inner_size and own % group and group % own:
            raise ValueError(
                "norm_groups must cover whole ranks, or lie within one, got groups of "
                f"{group} channels for {ranks} ranks of {own}; use another number of them"
            )


class TensorParallel:
    """A model of which this rank keeps its share; every rank begins with the same whole model.

    Args:
        model: is changed in place: afterwards each call of it is one of all ranks together, with
            the same arguments, and returns the same on all of them.
        process_group: of the ranks.
    Attributes:
        shares: by name, of the parameters that are not whole, with whole gradients, on every rank.
    Raises:
        ValueError: as :func:`check_ranks`.
    """

    def __init__(self, model: LanguageModel, process_group: dist.ProcessGroup):
        self.model, self.process_group = model, process_group
        self.rank, self.ranks = process_group.rank(), process_group.size()
        check_ranks(model, self.ranks)
        self.shares: dict[str, Share] = {}
        self._found: dict[tuple[str, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        for index, block in enumerate(model.blocks):
            block.enter = functools.partial(_apply, _Enter, process_group)
            block.leave = functools.partial(_apply, _Leave, process_group)
            self._share_mixer(f"blocks.{index}.mixer", block.mixer)
            if block.mlp is not None:
                self._share_mlp(f"blocks.{index}.mlp", block.mlp)
        parameters = dict(model.named_parameters())
        for name in self.shares:
            parameters[name].data = self.part(name, parameters[name].data)
        model.ranks = self.ranks

    def _share_mixer(self, name: str, mixer: Mixer) -> None:
        parts, inner = mixer.fused_parts(), mixer.fused_inner()
        for parameter in ("in_proj.weight", "in_proj.bias"):
            self._share(mixer, name, parameter, [piece for part in parts for piece in part])
        for parameter in ("conv_weight", "conv_bias"):
            self._share(mixer, name, parameter, parts[mixer.convolved])
        for parameter in ("A_log", "dt_bias", "D"):
            self._share(mixer, name, parameter, parts[-1])
        self._share(mixer, name, "out_proj.weight", inner, dim=1)
        norm = mixer.norm
        if norm.hidden_size == mixer.inner_size:  # the groups of a whole row
            self._share(mixer, name, "norm.weight", inner)
            mixer.norm = RMSNorm(
                norm.hidden_size // self.ranks, norm.eps, norm.group_size, norm.norm_before_gate,
                activation=norm.activation, path=norm.path, process_group=self.process_group,
            )  # fmt: skip
            mixer.norm.weight = norm.weight
        else:  # of a head: whole on every rank, with the gradient of the rank's own heads
            everything = torch.arange(norm.hidden_size)
            self.shares[f"{name}.norm.weight"] = Share(
                0, [everything] * self.ranks, norm.hidden_size
            )
        mixer.keep_share(self.ranks)

    def _share_mlp(self, name: str, mlp: MLP) -> None:
        inner = mlp.out_proj.in_features
        self._share(mlp, name, "in_proj.weight", [(inner, 1)] * 2)
        self._share(mlp, name, "out_proj.weight", [(inner, 1)], dim=1)
        mlp.in_proj.out_features = 2 * inner // self.ranks
        mlp.out_proj.in_features = inner // self.ranks

    def _share(
        self, module: nn.Module, name: str, parameter: str, fused: Fused, dim: int = 0
    ) -> None:
        if any(own == parameter for own, _ in module.named_parameters()):
            rows = [_rows(fused, rank, self.ranks) for rank in range(self.ranks)]
            size = sum(count * width for count, width in fused)
            self.shares[f"{name}.{parameter}"] = Share(dim, rows, size)

    # ---------------------------------------------------------------------- whole tensors, and back

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share of a tensor that has the shape of a whole parameter."""
        if name not in self.shares:
            return whole
        share = self.shares[name]
        return whole.index_select(share.dim, share.rows[self.rank].to(whole.device))

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The tensor of which every rank has its share; called by all ranks together."""
        if name not in self.shares:
            return part
        share, part = self.shares[name], part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        dist.all_gather(parts, part, group=self.process_group)
        whole = part.new_empty(
            [share.size if dim == share.dim else n for dim, n in enumerate(part.shape)]
        )
        for rows, own in zip(share.rows, parts, strict=True):
            whole.index_copy_(share.dim, rows.to(part.device), own)
        return whole

    # --------------------------------------------------------------------------------- gradients

    def reduce_gradients(self, copies: dist.ProcessGroup | None = None) -> None:
        """What is left to do after a step's backward: sum the gradients of rows that several ranks
        have, B and C of a Mamba-2 with one group for example; one all-reduce for all of them.

        Args:
            copies: of the ranks that have the same share, and other data; gradients become the mean
                over them.
        """
        found = list(self._common())
        flat = torch.cat([sums.flatten() for _, _, _, sums in found]) if found else None
        if flat is not None:
            dist.all_reduce(flat, group=self.process_group)
            sizes = [sums.numel() for *_, sums in found]
            for (grad, own, places, sums), total in zip(found, flat.split(sizes), strict=True):
                grad[own] = total.view_as(sums)[places]
        if copies is not None and copies.size() > 1:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            for work in [dist.all_reduce(g, group=copies, async_op=True) for g in grads]:
                work.wait()
            for grad in grads:
                grad /= copies.size()

    def _common(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each gradient with rows that several ranks have: itself, which of its rows these are,
        their places among all such, and these with zeros where this rank has none."""
        parameters = dict(self.model.named_parameters())
        for name, share in self.shares.items():
            grad = parameters[name].grad
            if grad is None or len(share.common) == 0:
                continue
            own, places, _ = self._common_rows(name, grad.device)
            sums = grad.new_zeros(len(share.common), *grad.shape[1:])
            sums[places] = grad[own]
            yield grad, own, places, sums

    def _common_rows(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Which of the rank's rows others have too, their places among all such, and of each row
        of the rank how many have it; on the device, so that only the first step waits for it."""
        if (name, device) not in self._found:
            share = self.shares[name]
            rows = share.rows[self.rank]
            own = (share.copies[rows] > 1).nonzero().flatten()
            places = torch.searchsorted(share.common, rows[own])
            found = own.to(device), places.to(device), share.copies[rows].to(device)
            self._found[name, device] = found
        return self._found[name, device]

    def clip_gradients(self, max_norm: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` by the norm of the whole model's gradients, which it
        returns; after `reduce_gradients`."""
        squares = []
        for name, parameter in self.model.named_parameters():
            if (grad := parameter.grad) is None:
                continue
            share, square, copies = self.shares.get(name), grad.square(), self.ranks
            if share is not None:
                copies = 1
                if len(share.common):
                    *_, copies = self._common_rows(name, grad.device)
                    square = square.flatten(1).sum(1) if grad.ndim > 1 else square
            squares.append((square / copies).sum())
        total = torch.stack(squares).sum()
        dist.all_reduce(total, group=self.process_group)
        norm = total.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm


@torch.compiler.disable
def _apply(function: type[torch.autograd.Function], process_group, x: Tensor) -> Tensor:
    return function.apply(x, process_group)


def _rows(fused: Fused, rank: int, ranks: int) -> Tensor:
    """Where a rank's heads lie among heads, or groups of them, side by side. Where there are fewer
    than ranks, neighbouring ranks have the same one."""
    rows, start = [], 0
    for count, width in fused:
        first, own = rank * count // ranks, max(1, count // ranks)
        rows.append(torch.arange(start + first * width, start + (first + own) * width))
        start += count * width
    return torch.cat(rows)

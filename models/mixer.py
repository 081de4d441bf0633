"""What both mixers have around their scan: a projection, a short convolution, a gated norm, and a
projection back; and the state of convolution and scan.

Shape letters: B batch, T tokens, D hidden size, E channels of the convolution, W its taps.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatednorm import RMSNorm, norm_then_linear
from models.exact import CHUNK, by_chunks
from models.products import PLAIN, Linear, multiply, rows_to
from models.rows import PRODUCT, ROW, side_by_side
from models.short_conv import short_conv

# Heads, or groups of them, that lie side by side in one dimension: how many and how wide.
Fused = list[tuple[int, int]]


class PaddedLinear(Linear):
    """`Linear` whose product on a GPU has rows padded to a multiple of 64 channels, for fast matrix
    kernels and for vector loads from slices of the result. For a few tokens it is not worth it,
    but in exact mode a row's place is the same for any number.
    """

    MULTIPLE = ROW

    def forward(self, x: Tensor) -> Tensor:
        rest = -self.out_features % ROW
        plain = type(self.weight) in PLAIN
        if self.exact or rest == 0 or not plain or not pays_to_pad(x):
            return super().forward(x)
        if torch.compiler.is_compiling():
            y = F.linear(x, rows_to(ROW, self.weight), rows_to(ROW, self.bias))
            return y[..., : self.out_features]
        return multiply(_padded_product, x, self.weight, self.bias)

    PLAIN_FORWARD = forward


def _padded_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In padded rows."""
    columns = len(weight)
    weight, bias = rows_to(PRODUCT, weight), rows_to(PRODUCT, bias)
    y = x.new_empty(len(x), columns + -columns % ROW)[:, : len(weight)]
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)
    return y[:, :columns]


class _Split(torch.autograd.Function):
    """``x.split(widths, -1)``, whose gradient is that of all parts where they lie side by side, and
    else in padded rows."""

    @staticmethod
    def forward(ctx, x, *widths):
        ctx.widths = widths
        return x.split(widths, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        columns, first = sum(ctx.widths), grads[0]
        starts = itertools.accumulate(ctx.widths, initial=first.storage_offset())
        memory = first.untyped_storage().data_ptr()
        whole = first.stride(-1) == 1 and all(
            (part.untyped_storage().data_ptr(), part.storage_offset(), part.stride())
            == (memory, start, first.stride())
            for part, start in zip(grads, starts, strict=False)
        )
        if whole:
            dx = first.as_strided((*first.shape[:-1], columns), first.stride())
        else:
            dx = side_by_side(grads)
        return dx, *(None for _ in ctx.widths)


def split(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """``x.split(widths, -1)`` of x [B, T, D]; on a GPU with a gradient that is copied less."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and pays_to_pad(x)):
        return x.split(widths, -1)
    return _Split.apply(x, *widths)


def pays_to_pad(x: Tensor) -> bool:
    """Whether a product of x [..., T, D] gains by the padding: on a GPU, from 256 rows on. Compiled
    code does not ask for the number of rows, so that it serves all of them but steps of decoding.
    """
    if x.device.type != "cuda":
        return False
    if torch.compiler.is_compiling():
        return x.shape[-2] > 1
    return x.numel() >= 256 * x.shape[-1]


class Mixer(nn.Module, ABC):
    """A token mixer, from normalised hidden states to the residual's update. A subclass has
    `SCANS`, the chunk-parallel scan and the recurrent one, and `mix`, and calls `reset_parameters`.

    Args:
        hidden_size, inner_size: D, and the channels that the projection back reads.
        widths: channels of the parts that the one input projection makes, in order.
        convolved: which of them the convolution reads.
        conv_size, conv_bias: W, and whether the convolution has a bias.
        heads: of the scan's state, each with a decay and a step size of its own.
        norm: the gated norm.
        bias: whether the two projections have a bias.
        decay_init, dt_init: ranges that decays, uniformly, and step sizes, log-uniformly, are
            drawn from at first.
        chunk_size: tokens per chunk of the scan, outside exact mode; None for its default.
    Attributes:
        SHARED: counts of heads or groups that fewer than all ranks of tensor parallelism may have.
        exact: whether this is part of a model in exact mode; see `models.exact`.
        fuse_norm_linear: whether training keeps no output of the norm for the backward, which
            writes it again; outside exact mode.
        norm_linear_precision: with that, the precision of the norm and the projection after it:
            None, or `fp8` or `fp8_emulated` of `gatednorm.gated_norm_linear`.
    """

    SCANS: tuple[Callable, Callable]
    SHARED: str
    exact = False
    fuse_norm_linear = False
    norm_linear_precision: str | None = None

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        widths: list[int],
        *,
        convolved: int,
        conv_size: int,
        conv_bias: bool,
        heads: int,
        norm: RMSNorm,
        bias: bool = False,
        decay_init: tuple[float, float] = (1.0, 16.0),
        dt_init: tuple[float, float] = (1e-3, 1e-1),
        chunk_size: int | None = None,
    ):
        super().__init__()
        self.hidden_size, self.inner_size = hidden_size, inner_size
        self.widths, self.convolved = widths, convolved
        self.decay_init, self.dt_init, self.chunk_size = decay_init, tuple(dt_init), chunk_size
        self.in_proj = PaddedLinear(hidden_size, sum(widths), bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(widths[convolved], conv_size))
        self.conv_bias = nn.Parameter(torch.empty(widths[convolved])) if conv_bias else None
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = norm
        self.out_proj = Linear(inner_size, hidden_size, bias=bias)

    def reset_parameters(self) -> None:
        """The initial values of the published models for convolution, decay and step size."""
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)
        with torch.no_grad():
            self.A_log.uniform_(*self.decay_init).log_()
            low, high = (math.log(value) for value in self.dt_init)
            step = torch.empty_like(self.dt_bias).uniform_(low, high).exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """One layer over some tokens.

        Args:
            x: [B, T, D]; one token with a state takes the recurrent step, outside exact mode.
            state: what an earlier call returned for the tokens before these: the convolution's
                last inputs [B, W - 1, E] and the scan's state, fp32; with
                ``cu_seqlens`` the number of sequences stands for B.
            output_state: whether to return the state after the last token.
            cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row.
        Returns:
            y [B, T, D] and the new state, or None.
        Raises:
            ValueError: for a state or offsets that do not fit.
        """
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.cpu()  # read twice: waits for a GPU once
        parts = list(split(self.in_proj(x), self.widths))
        conv_state, scan_state = (None, None) if state is None else state
        parts[self.convolved], conv_state = short_conv(
            parts[self.convolved],
            self.conv_weight,
            self.conv_bias,
            conv_state,
            cu_seqlens,
            output_final_state=output_state,
            exact=self.exact,
        )
        chunked, recurrent = self.SCANS
        one_step = x.shape[1] == 1 and state is not None and not self.exact and cu_seqlens is None
        scan = functools.partial(
            recurrent if one_step else chunked,
            initial_state=scan_state,
            output_final_state=output_state,
            chunk_size=CHUNK if self.exact else self.chunk_size,
            cu_seqlens=cu_seqlens,
            exact=self.exact,
        )
        y, z, scan_state = self.mix(scan, *parts)
        if self.fuse_norm_linear and not self.exact and torch.is_grad_enabled():
            y = norm_then_linear(
                self.norm, self.out_proj, y, z, heads=y.dim() == 4,
                precision=self.norm_linear_precision,
            )  # fmt: skip
        else:
            y = self.out_proj(self.by_rows(self.norm, y, z).flatten(2))
        return y, (conv_state, scan_state) if output_state else None

    def by_rows(self, function: Callable, *tensors: Tensor | None) -> Tensor:
        """``function(*tensors)``, which works row by row on tensors [B, T, ...]."""
        return by_chunks(self.exact, function, *tensors)

    @abstractmethod
    def head_counts(self) -> dict[str, int]:
        """The counts that tensor parallelism divides by the number of ranks, by attribute."""

    @abstractmethod
    def fused_parts(self) -> list[Fused]:
        """What lies side by side in each part of the projection."""

    @abstractmethod
    def fused_inner(self) -> Fused:
        """The same of the channels that the projection back reads."""

    def keep_share(self, ranks: int) -> None:
        """Set all sizes to those of one of so many ranks; `models.tensor_parallel` has cut the
        parameters accordingly."""
        for name, count in self.head_counts().items():
            setattr(self, name, max(1, count // ranks))
        self.inner_size //= ranks
        self.widths = [sum(count * width for count, width in part) for part in self.fused_parts()]
        self.in_proj.out_features = sum(self.widths)
        self.out_proj.in_features = self.inner_size

    @abstractmethod
    def mix(self, scan: Callable, *parts: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The parts of the projection, [B, T, width] each, through the scan: what the norm reads,
        its gate or None, [B, T, inner_size] or heads [B, T, HV, V], and the scan's final state."""

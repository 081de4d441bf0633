"""The Mamba-2 mixer: short convolution, SSD, grouped gated norm.

Source: Mamba-2, arXiv 2405.21060.

Shape letters: B batch, T tokens, D hidden size, E = expand * D, H heads, P head dimension, G
groups, S state size. The convolution has E + 2 G S channels; the scan's state is [B, H, P, S].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gatednorm import RMSNorm
from models.chunks import state_dtype
from models.mixer import Fused, Mixer, split
from models.ranges import check_positive
from models.ssd import chunk_ssd, recurrent_ssd


class Mamba2(Mixer):
    """Mamba-2: the token mixer, from normalised hidden states to the residual's update.

    Args:
        hidden_size: D.
        d_state: S, the state size of a head's channel.
        head_dim: P; the heads are ``expand * hidden_size / head_dim``.
        expand: E over D.
        n_groups: groups of heads that share B and C; divides the heads.
        conv_size: taps of the short convolution.
        conv_bias, bias: whether the convolution, and the two projections, have a bias.
        chunk_size: tokens per chunk of the scan; None for the default.
        dt_limit: range of the step size, applied in every mode.
        dt_init: range that the initial step sizes are drawn from, log-uniformly.
        norm_groups: groups of the output norm; None for ``n_groups``, as published.
        norm_eps: inside the root of the output norm.
        norm_path: "training" (autograd) or "inference".
    Raises:
        ValueError: for sizes that do not fit each other.
    """

    SCANS = (chunk_ssd, recurrent_ssd)
    SHARED = "n_groups"

    def __init__(
        self,
        hidden_size: int,
        *,
        d_state: int,
        head_dim: int = 64,
        expand: float = 2,
        n_groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        chunk_size: int | None = None,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        dt_init: tuple[float, float] = (1e-3, 1e-1),
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        norm_path: str = "training",
    ):
        norm_groups = n_groups if norm_groups is None else norm_groups
        check_positive(
            hidden_size=hidden_size,
            d_state=d_state,
            head_dim=head_dim,
            n_groups=n_groups,
            conv_size=conv_size,
            chunk_size=1 if chunk_size is None else chunk_size,
            norm_groups=norm_groups,
        )
        inner = round(expand * hidden_size)
        if inner < 1 or abs(inner - expand * hidden_size) > 1e-6 * hidden_size or inner % head_dim:
            raise ValueError(
                f"head_dim must divide expand * hidden_size, got head_dim={head_dim} and "
                f"{expand} * {hidden_size} = {expand * hidden_size}; change one of them"
            )
        if (inner // head_dim) % n_groups:
            raise ValueError(
                f"n_groups must divide the heads, got n_groups={n_groups} and {inner // head_dim} "
                "heads (expand * hidden_size / head_dim); use a divisor"
            )
        if inner % norm_groups:
            raise ValueError(
                f"norm_groups must divide expand * hidden_size, got norm_groups={norm_groups} and "
                f"{inner}; use a divisor"
            )
        heads = inner // head_dim
        super().__init__(
            hidden_size,
            inner,
            [inner, inner + 2 * n_groups * d_state, heads],  # gate; x, B, C; dt
            convolved=1,
            conv_size=conv_size,
            conv_bias=conv_bias,
            heads=heads,
            norm=RMSNorm(
                inner, norm_eps, inner // norm_groups, norm_before_gate=False, path=norm_path
            ),
            bias=bias,
            dt_init=dt_init,
            chunk_size=chunk_size,
        )
        self.d_state, self.head_dim, self.num_heads = d_state, head_dim, heads
        self.n_groups, self.dt_limit = n_groups, tuple(dt_limit)
        self.D = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of the published models, the skip's too."""
        super().reset_parameters()
        nn.init.ones_(self.D)

    def head_counts(self) -> dict[str, int]:
        return {"num_heads": self.num_heads, "n_groups": self.n_groups}

    def fused_parts(self) -> list[Fused]:
        inner, maps = self.fused_inner(), (self.n_groups, self.d_state)
        return [inner, [*inner, maps, maps], [(self.num_heads, 1)]]

    def fused_inner(self) -> Fused:
        return [(self.num_heads, self.head_dim)]

    def mix(
        self, scan: Callable, z: Tensor, xbc: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        maps = self.n_groups * self.d_state
        inputs, b, c = split(xbc, [self.inner_size, maps, maps])
        inputs = inputs.unflatten(-1, (self.num_heads, self.head_dim))
        b, c = (t.unflatten(-1, (self.n_groups, self.d_state)) for t in (b, c))
        acc = state_dtype(dt)
        decay = -self.A_log.to(acc).exp()
        steps = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
        y, state = scan(inputs, dt, decay, b, c, D=self.D, **steps)
        return y.flatten(2), z, state

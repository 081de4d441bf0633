"""The Mamba-2 mixer: short convolution, SSD, grouped gated norm.

Source: Mamba-2, arXiv 2405.21060.

Shape letters: B batch, T tokens, D hidden size, E = expand * D, H heads, P head dimension, G
groups, S state size, W taps of the convolution.
"""

import math

import torch
from torch import Tensor, nn

from gatednorm import RMSNorm
from models.chunks import check_mixer_state, packed_projection, sequence_offsets, state_dtype
from models.short_conv import short_conv
from models.ssd import chunk_ssd, recurrent_ssd


class Mamba2(nn.Module):
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
        super().__init__()
        norm_groups = n_groups if norm_groups is None else norm_groups
        inner = _check_sizes(
            hidden_size, d_state, head_dim, expand, n_groups, conv_size, chunk_size, norm_groups
        )
        self.hidden_size, self.inner_size, self.d_state = hidden_size, inner, d_state
        self.head_dim, self.num_heads, self.n_groups = head_dim, inner // head_dim, n_groups
        self.dt_limit, self.dt_init, self.chunk_size = tuple(dt_limit), tuple(dt_init), chunk_size
        # One projection, in this order: gate, x B C (what the convolution reads), dt.
        self.conv_dim = inner + 2 * n_groups * d_state
        self.widths = [inner, self.conv_dim, self.num_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, conv_size))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_dim)) if conv_bias else None
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(
            inner, norm_eps, inner // norm_groups, norm_before_gate=False, path=norm_path
        )
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of the published models for decay, step size, skip, convolution."""
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)
        nn.init.ones_(self.D)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            low, high = (math.log(value) for value in self.dt_init)
            step = torch.empty_like(self.dt_bias).uniform_(low, high).exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a state's two tensors: the convolution's and the scan's."""
        conv = (batch, self.conv_weight.shape[1] - 1, self.conv_dim)
        return conv, (batch, self.num_heads, self.head_dim, self.d_state)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """One layer over some tokens.

        Args:
            x: [B, T, D]; one token with a state takes the recurrent step.
            state: what an earlier call returned for the tokens before these: the convolution's
                last inputs [B, W - 1, E + 2 G S] and the scan's state [B, H, P, S], fp32; with
                ``cu_seqlens`` the number of sequences stands for B.
            output_state: whether to return the state after the last token.
            cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row.
        Returns:
            y [B, T, D] and the new state, or None.
        Raises:
            ValueError: for a state or offsets that do not fit.
        """
        batch, tokens = x.shape[:2]
        offsets = sequence_offsets(cu_seqlens, batch, tokens)
        shapes = self.state_shapes(batch if offsets is None else len(offsets) - 1)
        conv_state, scan_state = check_mixer_state(state, shapes, x, self.in_proj.weight)
        z, xbc, dt = packed_projection(self.in_proj, x, self.widths)
        xbc, conv_state = short_conv(xbc, self.conv_weight, self.conv_bias, conv_state, offsets)

        maps = self.n_groups * self.d_state
        inputs, b, c = xbc.split([self.inner_size, maps, maps], dim=-1)
        inputs = inputs.unflatten(-1, (self.num_heads, self.head_dim))
        b, c = (t.unflatten(-1, (self.n_groups, self.d_state)) for t in (b, c))
        wide = state_dtype(x)
        scan = chunk_ssd
        if tokens == 1 and state is not None and offsets is None:
            scan = recurrent_ssd
        y, scan_state = scan(
            inputs,
            dt,
            -self.A_log.to(wide).exp(),
            b,
            c,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=scan_state,
            output_final_state=output_state,
            chunk_size=self.chunk_size,
            cu_seqlens=None if offsets is None else torch.tensor(offsets),
        )
        y = self.out_proj(self.norm(y.flatten(2), z))
        return y, (conv_state, scan_state) if output_state else None


def _check_sizes(
    hidden_size, d_state, head_dim, expand, n_groups, conv_size, chunk_size, norm_groups
):
    sizes = {
        "hidden_size": hidden_size,
        "d_state": d_state,
        "head_dim": head_dim,
        "n_groups": n_groups,
        "conv_size": conv_size,
        "chunk_size": 1 if chunk_size is None else chunk_size,
        "norm_groups": norm_groups,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    inner = round(expand * hidden_size)
    if inner < 1 or abs(inner - expand * hidden_size) > 1e-6 * hidden_size or inner % head_dim:
        raise ValueError(
            f"head_dim must divide expand * hidden_size, got head_dim={head_dim} and {expand} * "
            f"{hidden_size} = {expand * hidden_size}; change one of them"
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
    return inner

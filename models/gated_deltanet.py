"""The Gated DeltaNet layer: short convolution, gated delta rule, gated norm per head.

Source: Gated Delta Networks, arXiv 2412.06464; negative eigenvalues, arXiv 2411.12537.

Shape letters: B batch, T tokens, D hidden size, H key heads, HV value heads, K and V their
dimensions, W taps of the convolution.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatednorm import RMSNorm, rmsnorm_fn
from models.chunks import check_mixer_state, packed_projection, sequence_offsets
from models.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from models.short_conv import short_conv

L2_EPS = 1e-6  # inside the root of the L2 norm of q and k, as in the published models


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet: the token mixer, from normalised hidden states to the residual's update.

    Args:
        hidden_size: D.
        num_heads, head_dim: heads of q and k, and their dimension.
        expand_v: a value head is ``head_dim * expand_v`` wide.
        num_v_heads: value heads, a multiple of ``num_heads``; None for as many.
        conv_size: taps of the short convolution.
        conv_bias: whether the convolution has a bias.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        use_gate: whether the output norm is gated.
        gate_activation: of that gate, "silu" or "sigmoid".
        chunk_size: tokens per chunk of the scan; None for the device's default.
        norm_eps: inside the root of the output norm.
        norm_path: "training" (autograd) or "inference".
    Raises:
        ValueError: for sizes that do not fit each other.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        expand_v: float = 2.0,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        use_gate: bool = True,
        gate_activation: str = "silu",
        chunk_size: int | None = None,
        norm_eps: float = 1e-5,
        norm_path: str = "training",
    ):
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        _check_sizes(hidden_size, num_heads, head_dim, expand_v, num_v_heads, conv_size, chunk_size)
        self.hidden_size, self.num_heads, self.num_v_heads = hidden_size, num_heads, num_v_heads
        self.head_dim, self.v_head_dim = head_dim, round(head_dim * expand_v)
        self.allow_neg_eigval, self.chunk_size = allow_neg_eigval, chunk_size
        key_dim, value_dim = num_heads * head_dim, num_v_heads * self.v_head_dim
        # One projection, in this order: q, k, v (what the convolution reads), gate, b, a.
        self.conv_dim = 2 * key_dim + value_dim
        self.widths = [self.conv_dim, value_dim if use_gate else 0, num_v_heads, num_v_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, conv_size))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_dim)) if conv_bias else None
        self.A_log = nn.Parameter(torch.empty(num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
        self.norm = RMSNorm(
            self.v_head_dim,
            norm_eps,
            norm_before_gate=True,
            activation=gate_activation,
            path=norm_path,
        )
        self.out_proj = nn.Linear(value_dim, hidden_size, bias=False)
        # rmsnorm(x) * K^-0.5 with eps / K is x / sqrt(sum(x^2) + eps)
        self.register_buffer("l2_scale", torch.full((head_dim,), head_dim**-0.5), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of the published models for decay, step size and convolution."""
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()
            step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a state's two tensors: the convolution's and the scan's."""
        conv = (batch, self.conv_weight.shape[1] - 1, self.conv_dim)
        return conv, (batch, self.num_v_heads, self.head_dim, self.v_head_dim)

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
                last inputs [B, W - 1, 2 H K + HV V] and the scan's state [B, HV, K, V], fp32;
                with ``cu_seqlens`` the number of sequences stands for B.
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
        qkv, z, b, a = packed_projection(self.in_proj, x, self.widths)
        qkv, conv_state = short_conv(qkv, self.conv_weight, self.conv_bias, conv_state, offsets)

        qk, v = qkv.split(
            [2 * self.num_heads * self.head_dim, self.num_v_heads * self.v_head_dim], -1
        )
        qk = qk.unflatten(-1, (2 * self.num_heads, self.head_dim))
        qk = rmsnorm_fn(qk, self.l2_scale, None, eps=L2_EPS / self.head_dim)
        q, k = qk.chunk(2, dim=2)
        v = v.unflatten(-1, (self.num_v_heads, self.v_head_dim))
        beta = torch.sigmoid(b.float() if b.dtype.itemsize < 4 else b)
        if self.allow_neg_eigval:
            beta = 2 * beta
        wide = beta.dtype
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))

        scan = chunk_gated_delta_rule
        if tokens == 1 and state is not None and offsets is None:
            scan = recurrent_gated_delta_rule
        o, scan_state = scan(
            q,
            k,
            v,
            g,
            beta,
            initial_state=scan_state,
            output_final_state=output_state,
            chunk_size=self.chunk_size,
            cu_seqlens=None if offsets is None else torch.tensor(offsets),
        )
        z = z.unflatten(-1, (self.num_v_heads, self.v_head_dim)) if z.shape[-1] else None
        y = self.out_proj(self.norm(o, z).flatten(2))
        return y, (conv_state, scan_state) if output_state else None


def _check_sizes(hidden_size, num_heads, head_dim, expand_v, num_v_heads, conv_size, chunk_size):
    sizes = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "num_v_heads": num_v_heads,
        "conv_size": conv_size,
        "chunk_size": 1 if chunk_size is None else chunk_size,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if num_v_heads % num_heads:
        raise ValueError(
            f"num_v_heads must be a multiple of num_heads, got {num_v_heads} and {num_heads}; "
            f"use for example num_v_heads={num_heads * max(1, num_v_heads // num_heads)}"
        )
    if expand_v <= 0 or abs(head_dim * expand_v - round(head_dim * expand_v)) > 1e-6 * head_dim:
        raise ValueError(
            f"head_dim * expand_v must be a whole number, got {head_dim} * {expand_v} = "
            f"{head_dim * expand_v}; use for example expand_v=1 or expand_v=2"
        )

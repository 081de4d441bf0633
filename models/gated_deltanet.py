"""The Gated DeltaNet layer: short convolution, gated delta rule, gated norm per head.

Source: Gated Delta Networks, arXiv 2412.06464; negative eigenvalues, arXiv 2411.12537.

Shape letters: B batch, T tokens, D hidden size, H key heads, HV value heads, K and V their
dimensions. The convolution has 2 H K + HV V channels; the scan's state is [B, HV, K, V].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gatednorm import RMSNorm, rmsnorm_fn
from models.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from models.mixer import Fused, Mixer, split
from models.ranges import check_positive

L2_EPS = 1e-6  # inside the root of the L2 norm of q and k, as in the published models


class GatedDeltaNet(Mixer):
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

    SCANS = (chunk_gated_delta_rule, recurrent_gated_delta_rule)
    SHARED = "num_heads"

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
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        check_positive(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            num_v_heads=num_v_heads,
            conv_size=conv_size,
            chunk_size=1 if chunk_size is None else chunk_size,
        )
        if num_v_heads % num_heads:
            raise ValueError(
                f"num_v_heads must be a multiple of num_heads, got {num_v_heads} and {num_heads}; "
                f"use for example num_v_heads={num_heads * max(1, num_v_heads // num_heads)}"
            )
        v_head_dim = round(head_dim * expand_v)
        if v_head_dim < 1 or abs(head_dim * expand_v - v_head_dim) > 1e-6 * head_dim:
            raise ValueError(
                f"head_dim * expand_v must be a whole number from 1, got {head_dim} * {expand_v} = "
                f"{head_dim * expand_v}; use for example expand_v=1 or expand_v=2"
            )
        key_dim, value_dim = num_heads * head_dim, num_v_heads * v_head_dim
        super().__init__(
            hidden_size,
            value_dim,
            # q, k, v; gate; b; a
            [2 * key_dim + value_dim, value_dim if use_gate else 0, num_v_heads, num_v_heads],
            convolved=0,
            conv_size=conv_size,
            conv_bias=conv_bias,
            heads=num_v_heads,
            norm=RMSNorm(
                v_head_dim,
                norm_eps,
                norm_before_gate=True,
                activation=gate_activation,
                path=norm_path,
            ),
            decay_init=(0.01, 16.0),
            chunk_size=chunk_size,
        )
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads, self.v_head_dim = num_v_heads, v_head_dim
        self.allow_neg_eigval, self.use_gate = allow_neg_eigval, use_gate
        # rmsnorm(x) * K^-0.5 with eps / K is x / sqrt(sum(x^2) + eps)
        self.register_buffer("l2_scale", torch.empty(head_dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Also after `to_empty`: no checkpoint holds the scale of the keys."""
        super().reset_parameters()
        self.l2_scale.fill_(self.head_dim**-0.5)

    def head_counts(self) -> dict[str, int]:
        return {"num_v_heads": self.num_v_heads, "num_heads": self.num_heads}

    def fused_parts(self) -> list[Fused]:
        keys, each = (self.num_heads, self.head_dim), [(self.num_v_heads, 1)]
        values = self.fused_inner()
        return [[keys, keys, *values], values if self.use_gate else [], each, each]

    def fused_inner(self) -> Fused:
        return [(self.num_v_heads, self.v_head_dim)]

    def mix(
        self, scan: Callable, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        keys = self.num_heads * self.head_dim
        qk, v = split(qkv, [2 * keys, self.inner_size])
        qk = qk.unflatten(-1, (2 * self.num_heads, self.head_dim))
        qk = self.by_rows(self._l2_norm, qk)
        q, k = (
            part.unflatten(-1, (self.num_heads, self.head_dim))
            for part in split(qk.flatten(2), [keys, keys])
        )
        v = v.unflatten(-1, (self.num_v_heads, self.v_head_dim))
        beta = self.by_rows(torch.sigmoid, b.float() if b.dtype.itemsize < 4 else b)
        if self.allow_neg_eigval:
            beta = 2 * beta
        acc = beta.dtype
        g = -self.A_log.to(acc).exp() * self.by_rows(F.softplus, a.to(acc) + self.dt_bias.to(acc))
        o, state = scan(q, k, v, g, beta)
        z = z.unflatten(-1, (self.num_v_heads, self.v_head_dim)) if z.shape[-1] else None
        return o, z, state

    def _l2_norm(self, x: Tensor) -> Tensor:
        return rmsnorm_fn(x, self.l2_scale, None, eps=L2_EPS / self.head_dim)

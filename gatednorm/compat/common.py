"""What the doors share: the calls that the peers' callers make, on the one operator.

The peers copy what their kernels cannot address, and their callers rely on it; so these functions
do, while :func:`gatednorm.layernorm_fn` refuses. What can be addressed is still not copied.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..call import check_tensors
from ..functional import layernorm_backward, layernorm_fn, layernorm_forward
from ..linear import GatedNormLinearFn, check_projection
from ..options import Options, make_options

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def addressable(t: MaybeTensor) -> MaybeTensor:
    """The tensor itself, or a contiguous copy where the kernels need one."""
    if not isinstance(t, Tensor) or t.is_contiguous() or (0 < t.dim() <= 4 and t.stride(-1) == 1):
        return t
    return t.contiguous()


def in_one_shape(x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both addressable, and `x` in the shape of `z` where that has as many rows. Not the reverse:
    the gate is often a slice of a packed projection, which another shape would copy."""
    x, z = addressable(x), addressable(z)
    if not isinstance(z, Tensor) or z.shape == x.shape:
        return x, z
    same_rows = z.numel() == x.numel() and z.shape[-1:] == x.shape[-1:]
    return x.reshape(z.shape) if same_rows else x, z


def gated_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
    out_dtype: torch.dtype | None = None,
    numerics: str = "fp32",
) -> Tensor:
    """The gated norm with the peers' freedom of shapes.

    Args:
        x: `[..., D]` with any strides.
        weight, bias: `[D]` or None.
        z: the gate, with the shape of `x` or another shape of as many rows of `D`, such as
            `[tokens, heads, D]` beside an `x` of `[tokens * heads, D]`; or None.

    Options as in :func:`gatednorm.layernorm_fn`.

    Returns:
        `[..., D]` in the shape of `x`.

    Raises:
        ValueError, TypeError: as :func:`gatednorm.layernorm_fn`.
    """
    read, z = in_one_shape(x, z)
    y = layernorm_fn(
        read, addressable(weight), addressable(bias), z, eps, group_size, norm_before_gate,
        is_rms_norm=is_rms_norm, activation=activation, numerics=numerics, out_dtype=out_dtype,
    )  # fmt: skip
    return y if read is x else y.view(x.shape)


def layernorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> Tensor:
    """:func:`gated_norm` with the arguments that `layernorm_fn` has in every peer."""
    return gated_norm(
        x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation
    )


def rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "swish",
) -> Tensor:
    """:func:`layernorm` with RMS norm, as `rmsnorm_fn` in every peer."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, True, activation)


class LayerNormFn:
    """`LayerNormFn.apply(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm,
    activation)`, for code that calls the peers' autograd Function by name."""

    apply = staticmethod(layernorm)


class Affine(nn.Module):
    """`weight` and `bias` of `[size]`, or None."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def _add_parameters(
        self,
        size: int,
        weight: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        for name, wanted in (("weight", weight), ("bias", bias)):
            data = torch.empty(size, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if data is None else nn.Parameter(data))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones and zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class GatedNorm(Affine):
    """The module that mamba_ssm and its copies define: one `weight` (and `bias` for layer norm) of
    `[hidden_size]`, attributes `eps`, `group_size`, `norm_before_gate`, `activation`.

    It reads these attributes and no others, so that a peer's own instance can become one of ours.
    """

    weight: nn.Parameter
    is_rms_norm = False
    activation = "swish"  # the instances of peers that have no choice lack the attribute

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "swish",
    ):
        super().__init__()
        make_options(
            eps, group_size, norm_before_gate, self.is_rms_norm, activation, False, "fp32", None
        )
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.activation = activation
        self._add_parameters(hidden_size, True, not self.is_rms_norm, device, dtype)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """`x` `[..., hidden_size]`, `z` of as many rows or None, to the shape and dtype of `x`."""
        return gated_norm(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate,
            self.is_rms_norm, self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.weight.numel()}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}, activation={self.activation}"
        )


# ---- flash-linear-attention's fused functions: a residual before the norm, a projection after it


def fused_gated_norm(
    x: Tensor,
    g: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    eps: float,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`norm(x + residual) * w * act(g)`; the sum is made in fp32, and normalised unrounded.

    Returns:
        `y` in the shape and dtype of `x`; with `prenorm` also the sum, in the dtype of `residual`
        (without one: `x` itself, in fp32 with `residual_in_fp32`).
    """
    if residual is None and not prenorm:
        return gated_norm(x, weight, bias, g, eps, None, True, is_rms_norm, activation)
    total, rounded = _add_residual(x, residual, residual_in_fp32)
    y = gated_norm(total, weight, bias, g, eps, None, True, is_rms_norm, activation, x.dtype)
    return (y, rounded) if prenorm else y


def fused_gated_norm_linear(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    eps: float,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fused_gated_norm` with SiLU, then `y @ linear_weight^T + linear_bias`, in the dtype of
    autocast where that is on. `y` is not kept for the backward, which computes it again."""
    check_tensors(x=x, g=g)
    check_projection(x, linear_weight, linear_bias)
    total, rounded = _add_residual(x, residual, residual_in_fp32)
    total, gate = in_one_shape(total, g)
    options = Options(eps, is_rms_norm=is_rms_norm, out_dtype=x.dtype)
    if not torch.compiler.is_compiling():
        options = make_options(*options)
    out = GatedNormLinearFn.apply(
        total, addressable(weight), addressable(bias), gate, linear_weight, linear_bias, options
    )
    out = out.view(*x.shape[:-1], linear_weight.shape[0])
    return (out, rounded) if prenorm else out


def _add_residual(x: Tensor, residual: Tensor | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """What is normalised, and what `prenorm` returns."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    if residual is None:
        return x, x.to(exact) if in_fp32 else x
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, got {tuple(residual.shape)} and {tuple(x.shape)}; "
            "pass one of that shape, or residual=None"
        )
    total = x.to(exact) + residual.to(exact)
    return total, total.to(residual.dtype)


# ---- the pair without autograd, with statistics as one vector, group after group


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    out: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The forward alone: `out` `[rows, D]`, `mean` (None for RMS) and `rstd`, `[groups * rows]` in
    fp32 with the rows of a group side by side.

    Raises:
        ValueError, TypeError: as :func:`gatednorm.layernorm_forward`; strides included, since
            mamba_ssm's own checks them here too.
    """
    y, mean, rstd = layernorm_forward(
        x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation=activation,
        out=out,
    )  # fmt: skip
    return y, None if mean is None else mean.t().reshape(-1), rstd.t().reshape(-1)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    recompute_output: bool = False,
    dz: Tensor | None = None,
    out: Tensor | None = None,
    activation: str = "swish",
) -> tuple[Tensor | None, ...]:
    """The backward alone, from what :func:`layer_norm_fwd` returned: `dx`, `dw`, `db`, `dz` (None
    where there is no such input), and with `recompute_output` the forward's output, written to
    `out` where that is given."""
    groups = 1 if group_size is None else x.shape[-1] // group_size
    rstd = rstd.view(groups, x.shape[0]).t().contiguous()
    mean = None if mean is None else mean.view(groups, x.shape[0]).t().contiguous()
    options = (eps, group_size, norm_before_gate, is_rms_norm)
    grads = layernorm_backward(
        dy, x, weight, bias, z, mean, rstd, *options, dz=dz, activation=activation
    )
    if not recompute_output:
        return grads
    y, *_ = layernorm_forward(x, weight, bias, z, *options, activation=activation, out=out)
    return *grads, y

"""The gated norm and the projection after it as one function, which keeps no output of the norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from .autograd import dtensors, gradients, save_forward
from .distributed import enter, name_of, share
from .functional import layernorm_fn, refuse_transforms
from .linear_fp8 import PRECISIONS, GatedNormLinearFP8Fn, check_precision
from .modules import LayerNorm, NotesHooks, RMSNorm
from .options import DTYPES, Options, make_options, one_of, product_dtype, rows_of


class GatedNormLinearFn(torch.autograd.Function):
    """The gated norm and a projection under autograd.

    `GatedNormLinearFn.apply(x, weight, bias, z, linear_weight, linear_bias, options)`. Kept for the
    backward: `x`, `z`, the parameters and the statistics. The norm's output, which the gradient of
    `linear_weight` needs, is written again by the backward's own kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        z: Tensor | None,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        options: Options,
    ) -> Tensor:
        y = save_forward(ctx, x, weight, bias, z, options, linear_weight)
        ctx.dtype = product_dtype(y)
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        linear_bias = None if linear_bias is None else linear_bias.to(ctx.dtype)
        return F.linear(
            _operand(y, linear_weight, ctx.dtype), linear_weight.to(ctx.dtype), linear_bias
        )

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *saved, linear_weight = ctx.saved_tensors
        x, options = saved[0], ctx.options
        dy = (dout @ linear_weight.to(ctx.dtype)).view(x.shape).to(options.out_dtype or x.dtype)
        *_, needs_dlinear, needs_dbias, _ = ctx.needs_input_grad
        *grads, y = gradients(ctx, dy, tuple(saved), with_output=needs_dlinear)
        dout, dlinear = rows_of(dout), None
        if y is not None:
            y = _operand(y, linear_weight, ctx.dtype).reshape(len(dout), linear_weight.shape[1])
            dlinear = (dout.t() @ y).to(linear_weight.dtype)
        dbias = dout.sum(0).to(ctx.bias_dtype) if needs_dbias else None
        return *grads, dlinear, dbias, None


def _operand(y: Tensor, linear_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`y` as the product reads it, the heads of a token side by side."""
    y = y.to(dtype)
    return y if y.shape[-1] == linear_weight.shape[1] else y.flatten(-2)


def gated_norm_linear(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    linear_weight: Tensor,
    *,
    bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = True,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    process_group: "dist.ProcessGroup | None" = None,
    precision: str | None = None,
) -> Tensor:
    """`gated_norm(x, z) @ linear_weight^T + linear_bias`, keeping `x` and `z` for the backward.

    The graph holds `rows * D` elements less than norm and projection apart, where both train.

    Args:
        x, z: `[..., D]` with `linear_weight` `[N, D]`, or heads `[..., H, D]` with `linear_weight`
            `[N, H * D]`, whose rows are the heads of a token; `z` may be None for no gate.
        weight, bias: `[D]` or None, of the norm.
        linear_weight, linear_bias: of the projection, the latter `[N]` or None.

    Options as in :func:`gatednorm.layernorm_fn`. With a `process_group` the columns of
    `linear_weight` are for this rank's channels, and the result is its share of a sum over the
    ranks, which is left to the caller, like its gradient: `torch.distributed.all_reduce`, or a
    row-parallel layer; so is a bias of the projection, which every rank would add.

    `precision` `fp8` multiplies in FP8, forward and backward, on a Hopper GPU; `fp8_emulated` does
    the same with the same FP8 values in fp32, on any device. docs/fp8.md has the recipe.

    Returns:
        `[..., N]` in the dtype of `x`, or under autocast in its dtype; the product's operands are
        converted to it.

    Raises:
        ValueError, TypeError: as :func:`gatednorm.layernorm_fn`; also for a `linear_weight` or
            `linear_bias` that does not fit, and for a `precision` that sizes or device do not have.
        RuntimeError: as :func:`gatednorm.layernorm_fn`; `fp8` with a PyTorch before 2.10.

    Source: flash-linear-attention's `rms_norm_swish_gate_linear` computes the output again in the
    backward; here the backward's kernel writes it beside `dx` and `dz`.
    """
    refuse_transforms("gated_norm_linear", x, weight, bias, z, linear_weight, linear_bias)
    values = (
        eps, group_size, norm_before_gate, is_rms_norm, activation, zero_centered, numerics,
        None if precision is None else torch.float32,
        None if process_group is None else name_of(process_group),
    )  # fmt: skip
    # A trace cannot look into the memory of checked options; the operator checks them again.
    options = Options(*values) if torch.compiler.is_compiling() else make_options(*values)
    check_projection(x, linear_weight, linear_bias)
    if process_group is not None and linear_bias is not None and process_group.size() > 1:
        raise ValueError(
            "linear_bias must be None with a process_group of several ranks, got one of shape "
            f"{list(linear_bias.shape)}, which each rank would add; add it to the sum over the "
            "ranks"
        )
    out: Tensor
    rules = None if torch.compiler.is_compiling() else dtensors(type(x))
    if rules is not None and precision is None:  # FP8 refuses them
        y = rules.by_columns(layernorm_fn, x, weight, bias, z, options)
        if y is not None:
            dtype = product_dtype(y)
            out = F.linear(
                _operand(y, linear_weight, dtype), linear_weight.to(dtype),
                None if linear_bias is None else linear_bias.to(dtype),
            )  # fmt: skip
            return out
    ranks, local = None, options
    if process_group is not None and not torch.compiler.is_compiling():
        name = "gated_norm_linear" + ("" if precision is None else f" in {precision}")
        ranks, local = enter(
            name, options, x=x, weight=weight, bias=bias, z=z, linear_weight=linear_weight
        )
    elif process_group is not None and precision is not None:
        ranks, local = share(options, x.shape[-1])
    if precision is not None:
        if ranks is not None:
            raise ValueError(
                f"a norm group must lie on one rank with precision={precision!r}, got one over "
                f"{ranks.size}: the columns of FP8 are made from a rank's own statistics; use "
                "precision=None, or a group_size of at most a rank's channels"
            )
        emulated = check_precision(precision, x, linear_weight)
        heads = bool(linear_weight.shape[1] != x.shape[-1])  # a tensor in TorchScript's trace
        out = GatedNormLinearFP8Fn.apply(
            x, weight, bias, z, linear_weight, linear_bias, local, heads, emulated
        )
        return out
    out = GatedNormLinearFn.apply(x, weight, bias, z, linear_weight, linear_bias, options)
    return out


def check_projection(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Raises TypeError or ValueError for a projection that does not fit `x`."""
    for name, t in (("x", x), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(t, Tensor) and (t is not None or name != "linear_bias"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a number; pass x[None]")
    columns = linear_weight.shape[1] if linear_weight.dim() == 2 else -1
    of_heads = x.dim() > 1 and columns == x.shape[-2] * x.shape[-1]
    if not of_heads and columns != x.shape[-1]:
        raise ValueError(
            "linear_weight must be [N, D], or [N, H * D] where x is [..., H, D], got "
            f"{list(linear_weight.shape)} for x {list(x.shape)}; pass one with a column for each "
            "channel"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"linear_bias must be [N], got {list(linear_bias.shape)} and N="
            f"{linear_weight.shape[0]}; pass one of that size, or linear_bias=None"
        )
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and t.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}; convert it "
                f"with {name}.to(x.dtype), a quantised one by its scales"
            )
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{name} must be on the device of x, got {t.device} and {x.device}; "
                f"move it with {name}.to('{x.device}')"
            )


class _Linear(NotesHooks, nn.Linear):
    PLAIN_FORWARD = nn.Linear.forward


def norm_then_linear(
    norm: nn.Module,
    linear: nn.Module,
    x: Tensor,
    z: Tensor | None,
    *,
    heads: bool = False,
    precision: str | None = None,
) -> Tensor:
    """`linear(norm(x, z))`, by :func:`gated_norm_linear` where both modules are plain. Where one
    has a hook, an adapter or another class, both are called, so that nothing of it is left out.

    Args:
        norm: such as :class:`gatednorm.RMSNorm`, of `D` channels.
        linear: of `D` columns, or `H * D`; plain if it is a :class:`gatednorm.NotesHooks`.
        x, z: `[..., D]`; with `heads` `[..., H, D]`; `z` may be None for no gate.
        precision: as there, where both modules are plain.

    Returns:
        `[..., N]`; with a `process_group` of the norm a share of a sum, as from `linear` itself.
    """
    if precision is not None:
        one_of("precision", precision, PRECISIONS)
    y: Tensor
    if (
        isinstance(norm, LayerNorm)
        and norm.is_plain()
        and norm.path == "training"
        and isinstance(linear, NotesHooks)
        and isinstance(linear, nn.Linear)
        and linear.is_plain()
    ):
        columns = x.shape[-2:].numel() if heads else x.shape[-1]
        if linear.in_features != columns:
            raise ValueError(
                f"linear must have a column for each of {columns} channels of x {list(x.shape)} "
                f"with heads={heads}, got {linear.in_features}; pass another, or heads={not heads}"
            )
        y = gated_norm_linear(
            x, z, norm.weight, linear.weight, bias=norm.bias, linear_bias=linear.bias, eps=norm.eps,
            group_size=norm.group_size, norm_before_gate=norm.norm_before_gate,
            is_rms_norm=norm.is_rms_norm, activation=norm.activation,
            zero_centered=norm.zero_centered, numerics=norm.numerics, precision=precision,
            process_group=norm.process_group,
        )  # fmt: skip
        return y.squeeze(-2) if heads and y.dim() == x.dim() else y  # a single head
    y = norm(x, z)
    y = linear(y.flatten(-2) if heads else y)
    return y


class GatedNormLinear(nn.Module):
    """The gated norm and the projection after it: `linear(norm(x, z))`, without the output of the
    norm in the graph.

    Keys of the state: `norm.weight`, `norm.bias` (layer norm), `linear.weight`, `linear.bias`. Once
    `norm` or `linear` has a hook, an adapter or another class, both are called one after the other,
    so that nothing of it is left out.

    Args:
        hidden_size: `D`, the channels that are normalised (of a head, where there are heads).
        out_features: `N`.
        num_heads: `H`; above 1, `x` and `z` are `[..., H, D]`.
        linear_bias: whether the projection has a bias.
        precision: `fp8` or `fp8_emulated`, as in :func:`gated_norm_linear`.

    Other arguments as :class:`gatednorm.LayerNorm`, which has two more, `process_group` and `path`.

    Raises:
        ValueError, TypeError: sizes, names or flags that do not fit, before any parameter is made.
    """

    def __init__(
        self,
        hidden_size: int,
        out_features: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        is_rms_norm: bool = True,
        linear_bias: bool = False,
        activation: str = "silu",
        zero_centered: bool = False,
        numerics: str = "fp32",
        precision: str | None = None,
    ):
        super().__init__()
        if precision is not None:
            one_of("precision", precision, PRECISIONS)
        self.precision = precision
        for name, n, remedy in (
            ("num_heads", num_heads, "use 1 for no heads"),
            ("out_features", out_features, "pass the columns of the result"),
        ):
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {n!r}; {remedy}")
        for name, flag in (("is_rms_norm", is_rms_norm), ("linear_bias", linear_bias)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        self.num_heads = num_heads
        self.norm = (RMSNorm if is_rms_norm else LayerNorm)(
            hidden_size, eps, group_size, norm_before_gate, device, dtype, activation=activation,
            zero_centered=zero_centered, numerics=numerics,
        )  # fmt: skip
        self.linear = _Linear(
            num_heads * hidden_size, out_features, linear_bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """`x`, `z` `[..., D]`, or `[..., H, D]` for several heads, to `[..., N]`."""
        return norm_then_linear(
            self.norm, self.linear, x, z, heads=self.num_heads > 1, precision=self.precision
        )

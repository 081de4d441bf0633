"""The functions that users call: options made once, then one operator or one kernel."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad

from .autograd import (
    LayerNormFn,
    Maybe,
    dtensors,
    has_rules,
    needs_operator,
    ops,
    run_backward,
    run_forward,
)
from .call import check_tensors
from .distributed import name_of
from .options import make_options

NORM_PATHS = ("training", "inference")


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError where the result would lack a derivative or a batch that is asked for."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} does not run under torch.func transforms (vmap, grad, jvp, ...); use "
            "gatednorm.gated_norm_ref there, or torch.autograd"
        )
    if forward_ad._current_level >= 0:
        for t in tensors:
            if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    f"{name} has no forward-mode derivative, and an input has a tangent; use "
                    "gatednorm.gated_norm_ref there, or torch.autograd"
                )


def refuse_gradients(function: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError where a function for inference would cut the graph."""
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if isinstance(t, Tensor) and t.requires_grad:
                raise RuntimeError(
                    f"{function} is for inference, and {name} requires a gradient; "
                    "use rmsnorm_fn, or call it under torch.no_grad()"
                )


def _refuse_wrappers(name: str, *tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor without memory of its own: DTensor, FakeTensor and so on."""
    for t in tensors:
        if isinstance(t, Tensor) and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(
                f"{name} takes plain tensors, got {type(t).__name__}; use layernorm_fn, which "
                "PyTorch sees as an operator"
            )


def _of_dtensors(
    x: Tensor, weight: Maybe, bias: Maybe, z: Maybe, options: tuple[Any, ...]
) -> Maybe:
    """:func:`layernorm_fn` of a DTensor; None for any other tensor."""
    kind: Any = type(x)
    rules = dtensors(kind)
    if rules is None:
        return None
    y: Maybe = rules.by_columns(layernorm_fn, x, weight, bias, z, make_options(*options))
    if y is None and torch.is_grad_enabled():
        y = LayerNormFn.apply(x, weight, bias, z, *options)
    elif y is None:
        y = ops.forward(x, weight, bias, z, *options, True)[0]
    return y


def layernorm_fn(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    *,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Gated norm with a backward: the gate `act(z)` multiplies the normalised result, or the input.

    Args:
        x: `[..., D]`, fp32, bf16, fp16, or (on the CPU) fp64. Any view whose last dimension has
            unit stride and whose outer dimensions merge into at most three.
        weight, bias: `[D]` or None, any of these dtypes.
        z: the gate, `[..., D]` with strides and dtype of its own, or None for no gate.
        eps: added to the variance (mean square for RMS) inside the root.
        group_size: channels in a norm group, a divisor of `D`; None for one group.
        norm_before_gate: True `(norm(x) * w + b) * act(z)`; False `norm(x * act(z)) * w + b`.
        is_rms_norm: RMS norm instead of layer norm.
        activation: `silu` (alias `swish`) or `sigmoid`.
        zero_centered: multiply by `1 + weight`.
        numerics: where values are rounded to the input's dtype. `fp32`: at the store only.
            `mamba2`: also after the norm (Mamba2, Bamba, Zamba2, Nemotron-H, Granite 4).
            `qwen3_next`: after the norm and after the weight (Qwen3-Next, Qwen3.5, OLMo-hybrid).
            `torchtitan`: after the weight (torchtitan's Qwen3.5).
            docs/numerics.md has every family with its options.
        out_dtype: dtype of the result, by default that of `x`, under autocast too.
        process_group: of ranks that have `D` neighbouring channels of each row each, in the order
            of the ranks; weight, bias and the gradients are those of a rank's own channels, and
            `group_size` counts channels of the whole row (None: one group over all ranks). Either
            group_size divides `D`, or it is a multiple of it. docs/many-gpus.md says what travels.

    Returns:
        `[..., D]`, contiguous.

    Promises: arithmetic in fp32 (fp64 for fp64); the same bits as :func:`rms_norm_gated`. With the
    Triton kernels a row's bits depend on that row, the parameters and the options alone: not on
    the number of rows, their place or their alignment; and `dw`, `db` are the same bits in every
    run on the same GPU and versions. A row with inf or NaN touches no other row's result.

    Raises:
        ValueError, TypeError: input that breaks a rule; names value, rule and remedy.
        RuntimeError: under torch.func transforms; when differentiated twice; on a GPU without
            triton; when a hook of saved tensors brings back something else; in a compiled program
            that meets a process group which no call has had yet.

    Source: the gate orders of Mamba-2 (arXiv 2405.21060) and Gated DeltaNet (arXiv 2412.06464).
    """
    refuse_transforms("layernorm_fn")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not (traced or torch.is_grad_enabled()):  # half the time of a call, and no statistics
        return rms_norm_gated(
            x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=is_rms_norm,
            activation=activation, zero_centered=zero_centered, numerics=numerics,
            out_dtype=out_dtype, process_group=process_group,
        )  # fmt: skip
    group = None if process_group is None else name_of(process_group)
    options = (
        eps, group_size, norm_before_gate, is_rms_norm,
        activation, zero_centered, numerics, out_dtype, group,
    )  # fmt: skip
    y: Tensor
    if traced:
        has_rules(type(x))
        y = ops.forward(x, weight, bias, z, *options, True)[0]
        return y
    if type(x) is not Tensor:
        of_dtensors = _of_dtensors(x, weight, bias, z, options)
        if of_dtensors is not None:
            return of_dtensors
    y = LayerNormFn.apply(x, weight, bias, z, *options)
    return y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Gated RMS norm with a backward: :func:`layernorm_fn` with `is_rms_norm=True`."""
    return layernorm_fn(
        x, weight, bias, z, eps, group_size, norm_before_gate, True,
        activation=activation, zero_centered=zero_centered, numerics=numerics, out_dtype=out_dtype,
        process_group=process_group,
    )  # fmt: skip


def rms_norm_gated(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    is_rms_norm: bool = True,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Gated norm for inference: the forward of :func:`layernorm_fn`, bit for bit, saving nothing.

    Arguments, promises and errors as there, and:

    Args:
        is_rms_norm: False for layer norm.
        out: `[..., D]`, written and returned; a view with strides of its own, or `x` or `z` itself.
            On the CPU a few elements may differ by one unit where its strides are not those of a
            slice of columns.

    Raises:
        RuntimeError: when an input requires a gradient while gradients are on: this function would
            cut the graph.
    """
    refuse_transforms("rms_norm_gated", x, weight, bias, z)
    refuse_gradients("rms_norm_gated", x=x, z=z, weight=weight, bias=bias, out=out)
    group = None if process_group is None else name_of(process_group)
    options = (
        eps, group_size, norm_before_gate, is_rms_norm,
        activation, zero_centered, numerics, out_dtype, group,
    )  # fmt: skip
    if needs_operator(x, weight, bias, z, out):
        if not torch.compiler.is_compiling():  # the operator's own errors name no remedy
            options = make_options(*options)
            check_tensors(x=x, weight=weight, bias=bias, z=z, out=out)
            if out is not None and dtensors(type(x)) is not None:
                raise TypeError("out= takes local tensors, and x is a DTensor; leave it out")
            if out is None and (y := _of_dtensors(x, weight, bias, z, options)) is not None:
                return y
        if out is not None and out_dtype not in (None, out.dtype):
            raise TypeError(f"out must have out_dtype, got {out.dtype} and {out_dtype}")
        if out is None:
            out = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
        ops.forward_out(x, weight, bias, z, out, *options)
        return out
    return run_forward(x, weight, bias, z, out, make_options(*options), save_stats=False)[0]


def layernorm_forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    *,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The forward alone, for those who write their own autograd Function around it.

    Arguments as in :func:`layernorm_fn` and :func:`rms_norm_gated`; nothing is recorded. Not traced
    by torch.compile: call it inside an operator of your own, or use :func:`layernorm_fn`.

    Returns:
        `y` `[..., D]`, `mean` (None for RMS) and `rstd`, `[rows, groups]` in fp32 (fp64 for fp64).
    """
    refuse_transforms("layernorm_forward", x, weight, bias, z)
    _refuse_wrappers("layernorm_forward", x, weight, bias, z, out)
    group = None if process_group is None else name_of(process_group)
    options = make_options(
        eps, group_size, norm_before_gate, is_rms_norm,
        activation, zero_centered, numerics, out_dtype, group,
    )  # fmt: skip
    with torch.no_grad():
        y, mean, rstd = run_forward(x, weight, bias, z, out, options, save_stats=True)
    assert rstd is not None  # it was asked for
    return y, mean, rstd


def layernorm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    *,
    activation: str = "silu",
    zero_centered: bool = False,
    numerics: str = "fp32",
    dx: Tensor | None = None,
    dz: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The backward alone, from what :func:`layernorm_forward` returned; not traced either.

    Args:
        dy: `[..., D]`, the gradient of `y`.
        dx, dz: `[..., D]` to be written, for example slices of one packed gradient; by default new.

    Returns:
        `dx`, `dw`, `db`, `dz` in the dtypes of `x`, `weight`, `bias`, `z`; None where absent.

    Raises:
        ValueError, TypeError: as in :func:`layernorm_fn`; also when `dx` or `dz` overlaps an input.
    """
    refuse_transforms("layernorm_backward", dy, x, weight, bias, z)
    _refuse_wrappers("layernorm_backward", dy, x, weight, bias, z, mean, rstd, dx, dz)
    group = None if process_group is None else name_of(process_group)
    options = make_options(
        eps, group_size, norm_before_gate, is_rms_norm,
        activation, zero_centered, numerics, None, group,
    )  # fmt: skip
    with torch.no_grad():
        return run_backward(dy, x, weight, bias, z, mean, rstd, dx, dz, options)[:4]

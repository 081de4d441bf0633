"""Who can be timed.

A provider says which cases it covers and returns two functions of tensors:

`training(x, w, b, z)` records a graph; `inference(x, w, b, z)` need not. A provider that is not
installed is left out, and the benchmark says so.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from .. import gated_norm_ref, layernorm_fn, rms_norm_gated
from .cases import Case

EPS = 1e-6

Norm = Callable[[Tensor, Tensor, Tensor | None, Tensor], Any]  # of x, w, b, z; returns y
Functions = tuple[Norm | None, Norm]  # training (None: no backward), inference
Provider = Callable[[Case], Functions | None]


def ours(case: Case) -> Functions:
    options: dict[str, Any] = {"is_rms_norm": case.is_rms_norm, "activation": case.activation}
    place = (EPS, case.group_size, case.norm_before_gate)
    return (
        lambda x, w, b, z: layernorm_fn(x, w, b, z, *place, **options),
        lambda x, w, b, z: rms_norm_gated(x, w, b, z, *place, **options),
    )


def one_origin(path: str) -> Provider:
    """Of a copy that still has the functions and arguments of mamba's first one."""

    def provider(case: Case) -> Functions | None:
        module = importlib.import_module(path)
        if case.activation != "silu":
            return None

        def call(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> Any:
            place = (EPS, case.group_size, case.norm_before_gate)
            return module.layernorm_fn(x, w, b, z, *place, case.is_rms_norm)

        return call, call

    return provider


def fla_fused(case: Case) -> Functions | None:
    module = importlib.import_module("fla.modules.fused_norm_gate")
    if not case.norm_before_gate or case.group_size:
        return None
    function = module.rms_norm_gated if case.is_rms_norm else module.layer_norm_gated

    def call(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> Any:
        return function(x, z, w, b, activation=case.activation, eps=EPS)

    return call, call


def sglang(case: Case) -> Functions | None:
    module = importlib.import_module("sglang.kernels.ops.attention.fla.layernorm_gated")

    def call(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> Any:
        return module.rms_norm_gated(
            x=x, weight=w, bias=b, z=z, eps=EPS, group_size=case.group_size,
            norm_before_gate=case.norm_before_gate, is_rms_norm=case.is_rms_norm,
            activation=case.activation,
        )  # fmt: skip

    return None, call


def vllm(case: Case) -> Functions | None:
    module = importlib.import_module("vllm.model_executor.layers.mamba.ops.layernorm_gated")
    if case.activation != "silu" or not case.is_rms_norm:
        return None

    def call(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> Any:
        return module.rms_norm_gated(x, w, b, z, EPS, case.group_size, case.norm_before_gate)

    return None, call


def transformers(case: Case) -> Functions | None:
    """The plain class of a family with this formula, with its own rounding points."""
    importlib.import_module("transformers")
    groups = () if case.norm_before_gate else (case.group_size or case.width,)
    model, prefix = {
        (True, "silu"): ("qwen3_next", "Qwen3Next"),
        (True, "sigmoid"): ("kimi_linear", "KimiLinear"),
        (False, "silu"): ("zamba2", "Zamba2"),  # mamba2's own has groups from transformers 5.23 on
    }.get((case.norm_before_gate, case.activation), ("", ""))
    if not model or not case.is_rms_norm or case.bias or (case.group_size and not groups):
        return None
    family = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(family, f"{prefix}RMSNormGated")(case.width, *groups, EPS)

    def call(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> Any:
        # A model has its weight in the dtype of x; in a wider one the results would be wider too.
        return torch.func.functional_call(norm, {"weight": w.to(x.dtype)}, (x, z))

    return call, call


def reference(case: Case, upcast: bool = True) -> Norm:
    """The equation in plain PyTorch; with `upcast` in fp32 inside."""

    def call(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor) -> Any:
        return gated_norm_ref(
            x, w, b, z, EPS, case.group_size, case.norm_before_gate, upcast,
            is_rms_norm=case.is_rms_norm, activation=case.activation,
        )  # fmt: skip

    return call


def eager(case: Case) -> Functions:
    return (reference(case),) * 2


def compiled(case: Case) -> Functions:
    torch.compiler.reset()
    # The backward is timed alone, again and again over one graph.
    torch._functorch.config.donated_buffer = False
    return (torch.compile(reference(case), dynamic=False),) * 2


# By the name in the tables: the distribution whose version is shown, and the provider.
PROVIDERS: dict[str, tuple[str, Provider]] = {
    "gatednorm": ("gatednorm", ours),
    "FLA fused": ("flash-linear-attention", fla_fused),
    "FLA": ("flash-linear-attention", one_origin("fla.modules.layernorm_gated")),
    "mamba": ("mamba_ssm", one_origin("mamba_ssm.ops.triton.layernorm_gated")),
    "SGLang": ("sglang", sglang),
    "vLLM": ("vllm", vllm),
    "torch.compile": ("torch", compiled),
    "eager": ("torch", eager),
    "transformers": ("transformers", transformers),
}

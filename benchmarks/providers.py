"""Which cases are timed, and who can be.

A provider says which cases it covers and returns two functions of tensors:

`training(x, w, b, z)` records a graph; `inference(x, w, b, z)` need not. A provider that is not
installed is left out, and the benchmark says so.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config

import gatednorm

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One row of the table: `rows x width` in groups, gate order, strides of z, norm."""

    rows: int
    width: int
    group_size: int | None = None
    norm_before_gate: bool = True
    z_strided: bool = False
    is_rms_norm: bool = True
    bias: bool = False
    activation: str = "silu"

    @property
    def name(self) -> str:
        parts = [f"{self.rows} x {self.width}"]
        if self.group_size:
            parts.append(f"{self.width // self.group_size} groups")
        parts.append("gate after" if self.norm_before_gate else "gate before")
        if self.z_strided:
            parts.append("z strided")
        if not self.is_rms_norm:
            parts.append("layer norm")
        if self.bias:
            parts.append("bias")
        if self.activation != "silu":
            parts.append(self.activation)
        return ", ".join(parts)


CASES = (
    Case(262144, 128),
    Case(262144, 128, z_strided=True),
    Case(16384, 2048, norm_before_gate=False, z_strided=True),
    Case(16384, 5120, norm_before_gate=False, z_strided=True),
    Case(8192, 8192, 1024, norm_before_gate=False, z_strided=True),
    Case(16384, 4096),
    Case(4096, 16384),
    Case(4096, 16384, norm_before_gate=False),
    Case(131072, 256),
    Case(30011, 1000, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(20011, 1536, norm_before_gate=False),
    Case(10007, 3072, bias=True),
    Case(16384, 2048, norm_before_gate=False, is_rms_norm=False, bias=True),
)
DECODE = (Case(2048, 128), Case(64, 5120, norm_before_gate=False))
WIDTHS = tuple(Case(2**25 // width, width) for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192))
ROWS = tuple(Case(2**k, 4096, norm_before_gate=False) for k in range(4, 16, 2))

Functions = tuple[Callable | None, Callable]  # training (None: no backward), inference


def ours(case: Case) -> Functions:
    options = {"is_rms_norm": case.is_rms_norm, "activation": case.activation}
    place = (EPS, case.group_size, case.norm_before_gate)
    return (
        lambda x, w, b, z: gatednorm.layernorm_fn(x, w, b, z, *place, **options),
        lambda x, w, b, z: gatednorm.rms_norm_gated(x, w, b, z, *place, **options),
    )


def one_origin(path: str) -> Callable[[Case], Functions | None]:
    """Of a copy that still has the functions and arguments of mamba's first one."""

    def provider(case: Case) -> Functions | None:
        module = importlib.import_module(path)
        if case.activation != "silu":
            return None

        def call(x, w, b, z):
            place = (EPS, case.group_size, case.norm_before_gate)
            return module.layernorm_fn(x, w, b, z, *place, case.is_rms_norm)

        return call, call

    return provider


def fla_fused(case: Case) -> Functions | None:
    module = importlib.import_module("fla.modules.fused_norm_gate")
    if not case.norm_before_gate or case.group_size:
        return None
    function = module.rms_norm_gated if case.is_rms_norm else module.layer_norm_gated

    def call(x, w, b, z):
        return function(x, z, w, b, activation=case.activation, eps=EPS)

    return call, call


def sglang(case: Case) -> Functions | None:
    module = importlib.import_module("sglang.kernels.ops.attention.fla.layernorm_gated")

    def call(x, w, b, z):
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

    def call(x, w, b, z):
        return module.rms_norm_gated(x, w, b, z, EPS, case.group_size, case.norm_before_gate)

    return None, call


def reference(case: Case, upcast: bool = True) -> Callable:
    """The equation in plain PyTorch; with `upcast` in fp32 inside."""

    def call(x, w, b, z):
        return gatednorm.gated_norm_ref(
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


PROVIDERS = {
    "gatednorm": ("gatednorm", ours),
    "FLA fused": ("flash-linear-attention", fla_fused),
    "FLA": ("flash-linear-attention", one_origin("fla.modules.layernorm_gated")),
    "mamba": ("mamba_ssm", one_origin("mamba_ssm.ops.triton.layernorm_gated")),
    "SGLang": ("sglang", sglang),
    "vLLM": ("vllm", vllm),
    "torch.compile": ("torch", compiled),
    "eager": ("torch", eager),
}
# What the plots show: torch.compile would compile anew for every point.
QUICK = [name for name in PROVIDERS if name not in ("eager", "torch.compile")]

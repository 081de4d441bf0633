"""All that imports Triton: the scans (gated_delta_rule.py, ssd.py), the short convolution, SwiGLU,
log-probabilities and the exact mode's product. The modules of `models` that ask for them hold the
same in plain PyTorch. Importing this package needs no Triton.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor


def find(name: str, x: Tensor) -> ModuleType | None:
    """The module `name` of this package where its kernels can compute with x, else None."""
    return importlib.import_module(f"{__name__}.{name}") if usable(x) else None


def usable(x: Tensor) -> bool:
    """Whether x lies on a GPU, in a dtype that the kernels compute with, and Triton is there."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and _installed()


def on_its_device(function: Callable) -> Callable:
    """The function with the device of its first tensor as the current one: Triton starts kernels
    there, wherever their tensors lie."""

    @functools.wraps(function)
    def call(x, *arguments, **options):
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return function(x, *arguments, **options)
        with torch.cuda.device(x.device):
            return function(x, *arguments, **options)

    return call


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None

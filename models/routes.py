"""What lies between the large products of both mixers, on a GPU: PyTorch or our Triton kernels.

Three routes, one for the process: "plain" is PyTorch alone and needs no Triton; "kernels" has the
convolution and the sequential part of the scans in Triton; "fused" the rest of SSD too.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from torch import Tensor

ROUTES = ("plain", "kernels", "fused")

_chosen: str | None = None


def route() -> str:
    """What `use_route` was told last, else the environment's MODELS_TRITON, else "fused"."""
    if _chosen is None:
        use_route(os.environ.get("MODELS_TRITON", "fused"))
    return _chosen


def use_route(name: str) -> None:
    """Take this route from now on. Raises ValueError for a name that is none of ROUTES."""
    global _chosen
    if name not in ROUTES:
        raise ValueError(
            f"the route (MODELS_TRITON) must be one of {', '.join(ROUTES)}, got {name!r}"
        )
    _chosen = name


def gpu_kernels(x: Tensor) -> ModuleType | None:
    """``models.kernels`` for a tensor on a GPU, where Triton is installed and wanted; else None."""
    return _kernels() if x.device.type == "cuda" and route() != "plain" else None


def fused_kernels(x: Tensor) -> ModuleType | None:
    """``models.ssd_kernels`` for chunks x [B, N, C, H, P] that it takes, where it is wanted; else
    None."""
    if gpu_kernels(x) is None or route() != "fused":
        return None
    kernels = importlib.import_module("models.ssd_kernels")
    return kernels if kernels.supports(x) else None


@functools.cache
def _kernels() -> ModuleType | None:
    # A like loop of another project goes wrong on Hopper with Triton 3.4 to 3.7.0; these were
    # compared with float64 on an H200 with Triton 3.6 (docs/models.md).
    return importlib.import_module("models.kernels") if importlib.util.find_spec("triton") else None

"""FP8 in plain PyTorch, for a CPU and for GPUs whose kernels cannot convert: the norm's result in
fp32, then the reference, which has the kernels' bits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import backend
from .call import Call
from .reference import quantize_fp8_ref


def forward_fp8(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    scaling: str,
    scale: Tensor,
    heads: int,
    given: Tensor | None,
) -> None:
    """As in kernels/launch_fp8.py."""
    wide = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    backend(x.device.type).forward(call, x, weight, bias, z, wide, mean, rstd)
    quantize_rows(wide.view(len(y), -1), y, scaling, scale, given)


def quantize_rows(
    x: Tensor, y: Tensor, scaling: str, scale: Tensor, given: Tensor | None = None
) -> None:
    """As in kernels/launch_fp8.py."""
    values, scales = quantize_fp8_ref(x.float(), scaling, None if given is None else given.view(()))
    y.copy_(values.view(y.dtype))
    if scale is not given:
        scale.copy_(scales.view(scale.dtype))


def quantize_tiles(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
    square: bool,
    heads: int,
) -> None:
    """As in kernels/launch_fp8.py."""
    wide = x
    if rstd is not None:
        wide = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        backend(x.device.type).forward(call, x, weight, bias, z, wide, None, None)
    wide = wide.reshape(-1, call.width * heads)
    scaling = "128x128" if square else "1x128"
    if rows is not None:
        quantize_rows(wide, rows[0], scaling, rows[1])
    if columns is not None:
        wide = F.pad(wide.t(), (0, columns[0].shape[1] - len(wide)))
        quantize_rows(wide, columns[0], scaling, columns[1])

"""The SwiGLU of an MLP on a GPU: one kernel each way, which reads gate and values where they lie.

Shape letters: R rows, N channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from models.kernels import on_its_device

COLUMNS = 1024  # of a row, for a program


@triton.jit
def _halves(x, N, BN: tl.constexpr):
    """The program's row and channels, and its gate and value in x [R, 2 N]."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    gate = tl.load(x + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    return row, n, gate, value


@triton.jit
def _swiglu_forward(x, y, N, BN: tl.constexpr):
    """y = silu(gate) value."""
    row, n, gate, value = _halves(x, N, BN)
    out = gate * tl.sigmoid(gate) * value
    tl.store(y + row * N + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _swiglu_backward(dy, x, dx, N, BN: tl.constexpr):
    """dvalue = dy silu(gate), dgate = dy value s (1 + gate (1 - s)) with s = sigmoid(gate)."""
    row, n, gate, value = _halves(x, N, BN)
    grad = tl.load(dy + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = grad * value * s * (1.0 + gate * (1.0 - s))
    tl.store(dx + row * 2 * N + n, dgate.to(dx.dtype.element_ty), mask=n < N)
    dvalue = grad * gate * s
    tl.store(dx + row * 2 * N + N + n, dvalue.to(dx.dtype.element_ty), mask=n < N)


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return rows, triton.cdiv(channels, COLUMNS)


@on_its_device
def forward(x: Tensor) -> Tensor:
    """x [R, 2 N] contiguous to [R, N]."""
    rows, channels = len(x), x.shape[1] // 2
    y = x.new_empty(rows, channels)
    _swiglu_forward[_grid(rows, channels)](x, y, channels, BN=COLUMNS)
    return y


@on_its_device
def backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, given that of y; both contiguous."""
    dx = x.new_empty(x.shape)
    _swiglu_backward[_grid(*dy.shape)](dy, x, dx, dy.shape[1], BN=COLUMNS)
    return dx

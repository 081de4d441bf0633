"""Starting a kernel. Triton's own launch binds and boxes every argument, which for kernels of some
thirty arguments takes longer than many of them run; so what it has compiled is kept and started."""

from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}


def start(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """Start a `triton.jit` function of tensors or None, whole numbers and floats, the first of them
    a tensor, and behind them constants by name, on the device of that tensor.

    The key has what Triton compiles another variant for: dtypes, aligned addresses, numbers that
    are 1 or divisible by 16 or too large for 32 bits, and constants.
    """
    key = (kernel.fn, arguments[0].device, *map(_kind, arguments), *constants.items())
    found = _compiled.get(key)
    if found is not None:
        compiled, values = found
        compiled[(*grid, 1)](*arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None and torch.version.hip is None:  # the interpreter has none
        values = [constants[name] for name in kernel.arg_names if name in constants]
        _compiled[key] = compiled, values


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value if value == 1 else (value % 16 == 0, value >= 1 << 31)
    return value if value is None else float

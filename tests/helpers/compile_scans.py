"""Compile the kernels that the gated delta rule starts for a GPU that is not here, and print what
the code needs, as compile_kernels.py does it.

    python tests/helpers/compile_scans.py cuda 90
"""

import functools
import json

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from compile_kernels import TARGET, needs
from models import kernels
from models.gated_delta_rule import chunk_gated_delta_rule

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}
CASES = {  # dtype, K, V, chunk size
    "bf16-K128-V256-chunk64": (torch.bfloat16, 128, 256, 64),
    "fp32-K32-V48-chunk32": (torch.float32, 32, 48, 32),
}


def compile_instead(case, kernel, *arguments, grid, warmup, **options):
    """In place of a launch: what Triton would compile for these arguments."""
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        divisible = isinstance(value, torch.Tensor) or value % 16 == 0
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if divisible and not isinstance(value, float):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    found = needs(triton.compile(source, target=TARGET, options=options))
    print(json.dumps({"case": case, "kernel": kernel.fn.__name__, **found}), flush=True)


def main() -> None:
    kernels.usable = lambda x: True
    for case, (dtype, dim_k, dim_v, size) in CASES.items():
        JITFunction.run = functools.partialmethod(functools.partial(compile_instead, case))
        q, k = torch.empty(2, 2 * size, 4, dim_k, dtype=dtype).chunk(2, dim=2)
        v = torch.empty(2, 2 * size, 2, dim_v, dtype=dtype)
        g, beta = torch.empty(2, 2, 2 * size, 2).unbind()
        inputs = [x.detach().requires_grad_() for x in (q, k, v, g, beta)]
        chunk_gated_delta_rule(*inputs, chunk_size=size)[0].sum().backward()


if __name__ == "__main__":
    main()

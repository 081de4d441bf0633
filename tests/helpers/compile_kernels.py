"""Compile every kernel of some calls for a GPU that is not here, and print what the code needs.

    python tests/helpers/compile_kernels.py cuda 90 60     # with 60 MiB of L2 cache

One line of JSON a kernel: the call, registers a thread, bytes of them spilled, shared memory. AMD's
code says the last only. Runs in a process of its own: in the tests' own Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

KIND, ARCH, CACHE = sys.argv[1:]
if KIND == "hip":
    torch.version.hip = "6.4"  # before the kernels are imported, as a build for AMD has it
    torch.version.cuda = None

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.providers import CASES, Case  # noqa: E402
from gatednorm import launch  # noqa: E402

TARGET = GPUTarget("cuda", int(ARCH), 32) if KIND == "cuda" else GPUTarget("hip", ARCH, 64)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MORE = (
    Case(4096, 8192),
    Case(5461, 12_288),
    Case(5461, 12_288, norm_before_gate=False),
    Case(1024, 4096, norm_before_gate=False),  # one wave
    Case(4096, 16384, norm_before_gate=False, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(300, 20_000, bias=True),
    Case(300, 600, norm_before_gate=False, is_rms_norm=False),
)


def compiled(started: launch.Launch, tensors: list[torch.Tensor | None]):
    """What Triton would start, for tensors whose addresses are divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(started.kernel.arg_names):
        value = tensors[i] if i < len(tensors) else None
        scalar = i - len(tensors)
        if value is not None:
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif 0 <= scalar < len(started.scalars):
            signature[name] = "fp32" if isinstance(started.scalars[scalar], float) else "i64"
        else:
            signature[name] = "constexpr"
            constants[(i,)] = started.options[name] if scalar >= 0 else None
    source = ASTSource(started.kernel, signature, constants, attributes)
    names = ("num_warps", "enable_fp_fusion", "launch_pdl", "maxnreg")
    options = {name: started.options[name] for name in names if name in started.options}
    return triton.compile(source, target=TARGET, options=options)


def needs(code) -> dict[str, int]:
    found = {"shared": code.metadata.shared}
    if "cubin" in code.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
        found |= {"registers": int(registers), "spilled": int(stack)}
    return found


def kernels_of(case: Case):
    """Name, launch and tensors of each kernel that a forward and a backward start."""
    device = torch.device("cuda", 0)
    p = SimpleNamespace(
        shape=(case.rows, case.width), n_rows=case.rows, width=case.width,
        group_size=case.group_size or case.width,
        n_groups=case.width // (case.group_size or case.width), is_rms_norm=case.is_rms_norm,
        norm_before_gate=case.norm_before_gate, activation=case.activation, eps=1e-6,
        zero_centered=False, round_norm=False, round_weight=False, device=device,
    )  # fmt: skip
    x = torch.empty(case.rows, case.width, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(case.rows, 2 * case.width + 256, dtype=torch.bfloat16, device="meta")
    z = packed[:, : case.width] if case.z_strided else x
    w = torch.empty(case.width, device="meta")
    b = w if case.bias else None
    mean = None if case.is_rms_norm else w
    main, sums = launch._plan_forward(p, x, z, w, b, x)
    yield "forward", main, [x, z, w, b, x, mean, w]
    if sums is not None:
        yield "forward sums", sums, [x, z, mean, w]
    main, sums, reduce, _ = launch._plan_backward(p, x, x, z, w, b, x, x)
    sums_of_rows = [None, None] if sums is None else [w, mean]
    yield "backward", main, [x, x, z, w, b, mean, w, *sums_of_rows, x, x, w, b]
    if sums is not None:
        yield "backward sums", sums, [x, x, z, w, mean, w, *sums_of_rows]
    yield "reduce", reduce, [w, b, w, b]


def main() -> None:
    hopper = KIND == "cuda" and int(ARCH) >= 90
    properties = SimpleNamespace(
        multi_processor_count=132, L2_cache_size=int(CACHE) * 2**20,
        shared_memory_per_block_optin=227 * 1024 if hopper else 99 * 1024,
    )  # fmt: skip
    torch.cuda.get_device_properties = lambda device: properties
    launch._multiprocessors = lambda device: properties.multi_processor_count
    launch._shared_memory = lambda device: properties.shared_memory_per_block_optin
    launch._since_hopper = lambda device: hopper
    for case in (*CASES, *MORE):
        for name, started, tensors in kernels_of(case):
            found = needs(compiled(started, tensors))
            print(json.dumps({"case": case.name, "kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main()

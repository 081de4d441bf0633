"""Compile every kernel of some calls for a GPU that is not here, and print what the code needs.

    python tests/helpers/compile_kernels.py cuda 90

One line of JSON a kernel: the call, instructions, registers a thread, bytes of them spilled, shared
memory. AMD's code says the last only. Runs in a process of its own: in the tests' own Triton
interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

KIND, ARCH = sys.argv[1:]
if KIND == "hip":
    torch.version.hip = "6.4"  # before the kernels are imported, as a build for AMD has it
    torch.version.cuda = None

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.cases import CASES  # noqa: E402
from gatednorm import call  # noqa: E402
from gatednorm.bench.cases import Case  # noqa: E402
from gatednorm.fp8 import SCALINGS  # noqa: E402
from gatednorm.kernels import launch, launch_fp8  # noqa: E402
from gatednorm.kernels.tiles import TABLES  # noqa: E402
from gatednorm.options import make_options  # noqa: E402

TARGET = GPUTarget("cuda", int(ARCH), 32) if KIND == "cuda" else GPUTarget("hip", ARCH, 64)
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MORE = (
    Case(4096, 8192),
    Case(4096, 8192, norm_before_gate=False),
    Case(4096, 8192, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(4096, 8192, norm_before_gate=False, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(4096, 4096, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(5461, 12_288),
    Case(5461, 12_288, norm_before_gate=False),
    Case(4096, 16384, norm_before_gate=False, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(300, 20_000, bias=True),
    Case(300, 600, norm_before_gate=False, is_rms_norm=False),
    Case(300, 1001, is_rms_norm=False, bias=True),
)

WITH_OUTPUT = (128, 4096, 5120)
FP8 = KIND == "cuda" and int(ARCH) >= 89


def compiled(launcher: launch.Launcher, tensors: list[torch.Tensor | None]):
    """What Triton would start, for tensors whose addresses are divisible by 16."""
    names = launcher.kernel.arg_names
    constants_from = len(names) - len(launcher.constants)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if i >= constants_from:
            signature[name] = "constexpr"
            constants[(i,)] = launcher.constants[i - constants_from]
        elif i >= len(tensors):
            signature[name] = "fp32" if name == "eps" else "i64"
        elif tensors[i] is not None:
            signature[name] = TYPES[tensors[i].dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = None
    source = ASTSource(launcher.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=launcher.options)


def needs(code) -> dict[str, int]:
    found = {"shared": code.metadata.shared}
    if "cubin" in code.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
            code = _output(TOOLS / "nvdisasm", "-c", file.name)
        found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        found |= {"registers": int(registers), "spilled": int(stack)}
    return found


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels_of(case: Case):
    """Name, launcher and tensors of each kernel that a forward and a backward start."""
    options = make_options(
        1e-6, case.group_size, case.norm_before_gate, case.is_rms_norm, case.activation, False,
        "fp32", None,
    )  # fmt: skip
    x = torch.empty(case.rows, case.width, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(case.rows, 2 * case.width + 256, dtype=torch.bfloat16, device="meta")
    z = packed[:, : case.width] if case.z_strided else x
    w = torch.empty(case.width, device="meta")
    b = w if case.bias else None
    rstd = torch.empty(case.rows, case.width // (case.group_size or case.width), device="meta")
    mean = None if case.is_rms_norm else rstd

    def described(describe, *tensors):
        device = torch.device("cuda", 0)
        metas = (t if t is None else (t.shape, t.stride(), t.dtype, device) for t in tensors)
        return describe(*metas, options).kind

    kind = described(call._remembered, x, w, b, z, None)
    tile, main, sums = launch._forward_launchers(kind, True)
    yield "forward", main, [x, w, b, z, x, mean, rstd, None]
    for other, scaling, order, columns in TABLES[9][2] if FP8 else ():
        if (other, order, columns) == (b is not None, case.norm_before_gate, kind.group_size):
            _, fp8, _ = launch._forward_launchers(kind, False, False, scaling)
            eighth = torch.empty(1, dtype=torch.float8_e4m3fn, device="meta")
            yield "forward FP8", fp8, [x, w, b, z, eighth, None, None, w]
    if FP8 and case.width == 4096 and not case.bias:
        eighth = torch.empty(1, dtype=torch.float8_e4m3fn, device="meta")
        for scaling in SCALINGS[:-1]:  # that of four bits has no forward of its own
            _, main, _ = launch._forward_launchers(kind, True, False, scaling)
            scale = eighth.view(torch.uint8) if scaling == "mxfp8" else w
            yield f"forward {scaling}", main, [x, w, b, z, eighth, mean, rstd, scale]
        columns = launch_fp8._tiles_launcher(kind, 1, True, True, False, True)
        yield "columns", columns, [x, w, b, z, mean, rstd, None, None, eighth, w]
        both = launch_fp8._tiles_launcher(kind, 1, False, False, True, True)
        yield "both", both, [x, None, None, None, None, None, eighth, w, eighth, w]
        *_, rows = launch_fp8._rows_launcher(case.width, torch.bfloat16, "1x128", kind.device)
        yield "rows", rows, [x, eighth, w, None]
        *_, rows = launch_fp8._rows_launcher(case.width, torch.float32, "nvfp4", kind.device)
        byte = eighth.view(torch.uint8)
        yield "rows nvfp4", rows, [w, byte, byte, w]
    if sums is not None:
        yield "forward sums", sums, [x, z, mean, rstd]
    kind = described(call._describe_backward, x, x, w, b, z, mean, rstd, None, None)
    tile, main, sums = launch._backward_launchers(kind, None)
    c1, c2 = (None, None) if sums is None else (rstd, mean)
    gradients = [x, x, w, b, z, mean, rstd, c1, c2, x, w, b, z]
    yield "backward", main, [*gradients, None]
    if case.width in WITH_OUTPUT:
        yield "backward with output", main, [*gradients, x]
    if sums is not None:
        yield "backward sums", sums, [x, x, w, z, mean, rstd, c1, c2]
    workers = 132 * tile.workers_per_sm
    reduction = launch.reduce_tile(case.width, workers)
    reduce = launch._reduce_launcher(case.width, reduction, (), torch.device("cuda", 0))
    yield "reduce", reduce, [w, b, w, b]
    if case.width == 8192:
        _, combine = launch._combine_launcher(8, 1 + (mean is not None), True, kind.device)
        yield "combine", combine, [w, rstd, mean]


def main() -> None:
    hopper = KIND == "cuda" and int(ARCH) >= 90
    launch._shared_memory = lambda device: (227 if hopper else 99) * 1024
    launch._architecture = lambda device: int(ARCH) // 10 if KIND == "cuda" else 0
    for case in (*CASES, *MORE):
        for name, started, tensors in kernels_of(case):
            found = needs(compiled(started, tensors))
            print(json.dumps({"case": case.name, "kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main()

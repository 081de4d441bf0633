"""The peers' own tests of this norm, with the norm taken from `gatednorm.compat`.

    python tests/helpers/peer_tests.py --fetch peers  # needs a network: the files of FILES
    python tests/helpers/peer_tests.py --run peers    # offline; on the GPU where there is one

The files are the peers', under their licences: they are fetched for a run and never committed.
They import their packages as always; what stands under those names here are the short modules of
MODULES, so no peer needs to be installed. What is changed in a file is in FILES, and on a machine
without a GPU in `for_cpu`. Results are in docs/adopt-proof.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class File:
    """One file of tests at a commit (or tag) of a repository.

    `edits` are replacements, each of which must apply; `cpu_edits` are those for a machine without
    a GPU. `left_out` are tests of something else, by how their names begin."""

    repository: str
    commit: str
    path: str
    edits: tuple[tuple[str, str], ...] = ()
    cpu_edits: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.repository.split('/')[1]}/{self.path}"

    @property
    def module(self) -> str:
        """A name that no other file has: the peers have three with the same one."""
        return f"test_{self.repository.split('/')[1].replace('-', '_')}_{Path(self.path).stem}"


FILES = (
    File(
        "state-spaces/mamba",
        "e9594ce1c732d97440f0332fdc43170a2294dbfa",
        "tests/ops/triton/test_layernorm_gated.py",
        cpu_edits=(("seqlen = 1024", "seqlen = 16"),),
    ),
    File(
        "fla-org/flash-linear-attention",
        "bc3b101dcb713ddc5bd8924b66754eb68b5ccf89",
        "tests/modules/test_layernorm_gated.py",
    ),
    File(
        "sgl-project/sglang",
        "164028803283853955042fba6071fa9f699c501c",
        "test/registered/layers/test_fla_layernorm_guard.py",
        edits=(("NUM_GPUS = 2", "NUM_GPUS = 1"),),
    ),
    File(
        "sgl-project/sglang",
        "adb9fe280058cefbba30682c835cf07f982b5008",
        "test/registered/layers/test_fla_layernorm_batch_invariant.py",
        left_out=(  # SGLang's own tile, and its mixture of experts
            "test_rows_per_block_ignores_row_count",
            "test_moe_sum_reduce",
        ),
    ),
    File(
        "sgl-project/sglang",
        "09173bc2619ccc678533e54ff7c9b1a91c11a08a",
        "test/registered/attention/test_gdn_prefill_layout.py",
        left_out=(  # they have no norm in them
            "TestGdnPrefillLayout::test_projection_views",
            "TestGdnPrefillLayout::test_qkv_prepare",
            "TestGdnPrefillLayout::test_fused_split",
        ),
    ),
    File(
        "vllm-project/vllm",
        "v0.33.0",
        "tests/kernels/fla/test_fla_layernorm_guard.py",
        left_out=("test_layer_norm_fwd_warmup_keys",),  # which of its kernels vLLM compiles ahead
    ),
    File(
        "vllm-project/vllm",
        "v0.33.0",
        "tests/kernels/core/test_fused_rms_norm_gated.py",
        left_out=("test_norm_gate_import_order",),  # of vLLM's modules
    ),
    File(
        "vllm-project/vllm",
        "v0.33.0",
        "tests/kernels/mamba/test_gdn_output_projection.py",
    ),
    File(
        "vllm-project/vllm",
        "bf1cbd7bbc2a100125f6986ceefc294cff47edbd",
        "tests/kernels/mamba/test_layernorm_gated_compile.py",
    ),
)

# What the files import, and what they get. The norm comes from gatednorm.compat; the rest is the
# least that the files need of their packages, which are not there.
NOTHING = "\ndef __getattr__(name):\n    return lambda *args, **kwargs: None\n"
MODULES = {
    "mamba_ssm.ops.triton.layernorm_gated": "from gatednorm.compat.mamba import *",
    "fla.modules": "from gatednorm.compat.fla import *",
    "fla.utils": """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
# Its tests of offsets beyond 2^31 are for GPUs of that kind, for their memory.
IS_NVIDIA_BLACKWELL = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 1e11
def assert_close(name, reference, ours, ratio):
    error = (reference.double() - ours.double()).norm() / (reference.double().norm() + 1e-12)
    assert ours.isfinite().all() and error < ratio, f"{name}: {error}"
""",
    "sglang.srt.layers.attention.fla.layernorm_gated": """
from gatednorm.compat.mamba import _layer_norm_fwd
from gatednorm.compat.sglang import *
MAX_ROWS_PER_BLOCK = calc_rows_per_block = None
""",
    "sglang.kernels.ops.attention.fla.layernorm_gated": "from gatednorm.compat.sglang import *",
    "sglang.kernels.ops.attention.fla.l2norm": NOTHING,
    "sglang.kernels.ops.attention.triton_gdn_fused_proj": """
fused_qkv_split_gdn_prefill = None
def qwen3_5_gdn_prefill_projection_views(qkvz, ba, qk_heads, v_heads, qk_dim, v_dim):
    # the projections as they lie in memory: [q | k | v | z] and [b | a]
    qkv = 2 * qk_heads * qk_dim + v_heads * v_dim
    z = qkvz[:, qkv:].unflatten(1, (v_heads, v_dim))
    return qkvz[:, :qkv], z, ba[:, :v_heads], ba[:, v_heads:]
""",
    "sglang.srt.batch_invariant_ops": NOTHING,
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe": NOTHING,
    "sglang.srt.distributed.device_communicators.custom_all_reduce_utils": NOTHING,
    "sglang.srt.distributed.parallel_state": NOTHING,
    "sglang.test.ci.ci_register": NOTHING,
    "vllm.third_party.flash_linear_attention.ops.layernorm_guard": """
from gatednorm.compat.vllm import *
LayerNormFwdKernel = calc_rows_per_block = None
""",
    "vllm.third_party.flash_linear_attention.ops.fused_norm_gate": """
from gatednorm.compat import fla
class FusedRMSNormGated(fla.FusedRMSNormGated):  # one forward instead of one a platform
    forward_cuda = forward_native = fla.FusedRMSNormGated.forward
""",
    "vllm.model_executor.layers.layernorm": """
from gatednorm.compat import vllm
class RMSNormGated(vllm.RMSNormGated):  # one forward instead of one a platform
    forward_cuda = forward_native = vllm.RMSNormGated.forward
""",
    "vllm.model_executor.layers.mamba.ops.layernorm_gated": "from gatednorm.compat.vllm import *",
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn": """
class QwenGatedDeltaNetAttention:
    def _output_projection(self, core_attn_out, z):  # all that vLLM's does
        return self.out_proj(self.norm(core_attn_out, z).flatten(-2))[0]
""",
    "vllm.platforms": """
class current_platform:
    is_cuda, is_xpu = lambda: True, lambda: False
""",
    "vllm.triton_utils": "triton = None",
    "vllm.utils.torch_utils": "from torch import manual_seed as set_random_seed",
}
CONFTEST = """
import pytest
import torch
torch.set_num_threads(1)  # several processes share the cores

@pytest.fixture
def default_vllm_config():
    pass
"""


def fetch(folder: Path) -> None:
    for file in FILES:
        url = f"https://raw.githubusercontent.com/{file.repository}/{file.commit}/{file.path}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read()
        (folder / file.place).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.place).write_bytes(text)
        print(f"{file.place} of {file.commit}: {len(text)} bytes")


def for_cpu(text: str) -> str:
    """The same tests on a machine that has one 'GPU': the CPU."""
    text = re.sub(r"""f?(["'])cuda(:[^"']*)?\1""", '"cpu"', text)
    for call, value in (
        ("torch.cuda.is_available()", "True"),
        ("torch.cuda.is_bf16_supported()", "True"),
        ("torch.cuda.device_count()", "1"),
        ("torch.cuda.set_device(device)", "None"),
    ):
        text = text.replace(call, value)
    return text


def lay_out(files: list[File], folder: Path, work: Path, gpu: bool) -> None:
    """The files as they are run, and the modules that they import, in `work`."""
    for name, source in MODULES.items():
        place = work / "modules" / Path(*name.split("."))
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(source)
    (work / "tests").mkdir()
    (work / "tests" / "conftest.py").write_text(CONFTEST)
    for file in files:
        text = (folder / file.place).read_text()
        for old, new in file.edits + (() if gpu else file.cpu_edits):
            if old not in text:
                raise ValueError(f"{file.place} of {file.commit} has no {old!r} to replace")
            text = text.replace(old, new)
        (work / "tests" / f"{file.module}.py").write_text(text if gpu else for_cpu(text))


def run(folder: Path, processes: int, only: str) -> int:
    """Prints a table of passed, failed and skipped tests; 1 where one failed or a file has none."""
    import torch

    gpu = torch.cuda.is_available()
    files = [file for file in FILES if only in file.place]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        lay_out(files, folder, work, gpu)
        paths = [str(work / "modules"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["--rootdir", ".", "-n", str(processes), "--junitxml", "results.xml"]
        for file in files:
            place = f"tests/{file.module}.py"
            command += [place, *(f"--deselect={place}::{name}" for name in file.left_out)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        subprocess.run(command, cwd=work, env=environment, check=False)
        counts = count(work / "results.xml")
    print(f"\non {torch.cuda.get_device_name() if gpu else 'a CPU'}, torch {torch.__version__}")
    print("| repository | file | commit | passed | failed | skipped |\n|---|---|---|--:|--:|--:|")
    good = True
    for file in files:
        found = counts[file.module]
        numbers = " | ".join(str(found[kind]) for kind in ("passed", "failed", "skipped"))
        print(f"| {file.repository} | `{file.path}` | {file.commit[:10]} | {numbers} |")
        good &= found["passed"] > 0 and not found["failed"]
    return 0 if good else 1


def count(report: Path) -> dict[str, Counter]:
    """What became of the tests of each file, from pytest's JUnit report."""
    counts = {file.module: Counter() for file in FILES}
    for case in ET.parse(report).iter("testcase"):
        place = f"{case.get('classname')}.{case.get('name')}"
        module = next(name for name in counts if name in place)
        tags = {child.tag for child in case}
        failed = bool(tags & {"failure", "error"})
        kind = "failed" if failed else "skipped" if "skipped" in tags else "passed"
        counts[module][kind] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--fetch", type=Path, metavar="FOLDER", help="download the files there")
    action.add_argument("--run", type=Path, metavar="FOLDER", help="run the files that are there")
    parser.add_argument("--processes", type=int, default=0, help="of pytest, beside this one")
    parser.add_argument("--only", default="", help="part of a repository's name or of a path")
    args = parser.parse_args()
    if args.fetch:
        fetch(args.fetch)
        return 0
    return run(args.run, args.processes, args.only)


if __name__ == "__main__":
    sys.exit(main())

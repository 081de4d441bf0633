"""The two files of an SGLang release before and after they became re-exports of ours.

    python sglang_release.py FOLDER     # the package sglang

SGLang in full needs a GPU and some fifty packages. Its two files run as they are, under Triton's
interpreter on CPU tensors, with these stand-ins: empty packages above them, `sglang.srt.utils` with
`is_npu` and `device_context`, and `torch.cuda.device`. Its mixer, which imports one of them, runs
with a plain module for `CustomOp` and one tensor-parallel rank.
"""

import contextlib
import importlib
import inspect
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import torch

from gatednorm.compat import sglang_files

FOLDER = Path(sys.argv[1])
FLA, MAMBA = (f"sglang.{path.removesuffix('.py').replace('/', '.')}" for path in sglang_files.FILES)
MIXER = "sglang.srt.layers.attention.mamba.mixer2_rms_norm_gated"


class CustomOp(torch.nn.Module):
    def forward(self, *inputs):
        return self.forward_cuda(*inputs)


# Two results differ by their roundings of half a unit each: the one of the store, and in fp32 also
# those of the root, the normalised value, weight, bias and gate.
MOST_UNITS = {torch.float16: 1, torch.float32: 6}
STAND_INS = {
    "sglang.srt.utils": {
        "is_npu": lambda: False, "device_context": lambda device: contextlib.nullcontext(),
    },
    "sglang.srt.utils.common": {"set_weight_attrs": lambda weight, attributes: None},
    "sglang.srt.custom_op": {"CustomOp": CustomOp},
    "sglang.srt.distributed.communication_op": {
        "tensor_model_parallel_all_gather": None, "tensor_model_parallel_all_reduce": None,
    },
    "sglang.srt.distributed.parallel_state": {
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    },
    "sglang.srt.model_loader.weight_utils": {"sharded_weight_loader": lambda dim: None},
}  # fmt: skip


def load() -> list[ModuleType]:
    """The two files and the mixer as they are on disk now."""
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        del sys.modules[name]
    for name in (FLA, MAMBA, MIXER, *STAND_INS):
        parts = name.split(".")
        for end in range(1, len(parts)):
            package = ModuleType(".".join(parts[:end]))
            package.__path__ = [str(FOLDER.joinpath(*parts[1:end]))]
            sys.modules.setdefault(package.__name__, package)
    for name, attributes in STAND_INS.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(attributes)
    importlib.invalidate_caches()
    return [importlib.import_module(name) for name in (FLA, MAMBA, MIXER)]


def results(fla: ModuleType, mamba: ModuleType, mixer: ModuleType) -> dict[str, torch.Tensor]:
    """Every public name of both files over shapes, strides, groups, gate orders and dtypes."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for shape, group, before, gate, dtype in itertools.product(
        ((3, 64), (2, 2, 96)), (None, 32), (True, False), ("none", "dense", "strided"),
        (torch.float32, torch.float16),
    ):  # fmt: skip
        width, case = shape[-1], f"{shape} group {group} before {before} gate {gate} {dtype}"
        packed = torch.randn(*shape[:-1], 2 * width, generator=generator).to(dtype)
        x = packed[..., :width].contiguous()
        z = {
            "none": None,
            "dense": packed[..., width:].contiguous(),
            "strided": packed[..., width:],
        }
        z = z[gate]
        w, b = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))
        options = {"z": z, "eps": 1e-5, "group_size": group, "norm_before_gate": before}
        values = tuple(options.values())
        found |= {
            f"fla.layernorm_fn {case}": fla.layernorm_fn(x, w, b, *values),
            f"fla.layernorm_fn rms {case}": fla.layernorm_fn(
                x, w, None, **options, is_rms_norm=True
            ),
            f"fla.LayerNormFn {case}": fla.LayerNormFn.apply(x, w, b, *values, True),
            f"fla.rms_norm_gated {case}": fla.rms_norm_gated(x=x, weight=w, bias=b, **options),
            f"fla.rms_norm_ref {case}": fla.rms_norm_ref(x, w, b, *values),
            f"mamba.rms_norm_gated {case}": mamba.rms_norm_gated(x, w, b, *values),
        }
        for cls in (fla.RMSNorm, fla.LayerNorm):
            norm = cls(width, group_size=group, norm_before_gate=before, dtype=dtype)
            norm.load_state_dict({"weight": w, "bias": b}, strict=cls is fla.LayerNorm)
            found[f"fla.{cls.__name__} {case}"] = norm(x, z)
        if z is not None and group is None:
            norm = mixer.Mixer2RMSNormGated(width, 1).to(dtype)
            norm.weight.data.copy_(w)
            found[f"mixer {case}"] = norm(x, z)
    return {name: y.detach() for name, y in found.items()}


def signatures(*modules: ModuleType) -> dict[str, dict]:
    """The parameters of every public function and class that the files themselves define."""
    return {
        f"{module.__name__}.{name}": dict(inspect.signature(value).parameters)
        for module in modules
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        if name != "LayerNormFn"
    }


def accepts(ours: inspect.Parameter | None, theirs: inspect.Parameter) -> bool:
    missing = inspect.Parameter.empty
    return (
        ours is not None and ours.kind == theirs.kind and theirs.default in (missing, ours.default)
    )


if __name__ == "__main__":
    torch.cuda.device = lambda index: contextlib.nullcontext()
    originals = load()
    theirs, their_signatures = results(*originals), signatures(*originals[:2])
    sglang_files.main([str(FOLDER)])
    replaced = load()
    assert all("gatednorm" in Path(module.__file__).read_text() for module in replaced[:2])
    for name, wanted in their_signatures.items():
        module, _, function = name.rpartition(".")
        given = inspect.signature(getattr(sys.modules[module], function)).parameters
        assert list(given)[: len(wanted)] == list(wanted), name
        assert all(accepts(given[key], wanted[key]) for key in wanted), name
    ours = results(*replaced)
    assert ours.keys() == theirs.keys()
    for name, y in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (y.shape, y.dtype), name
        error = float((ours[name].double() - y.double()).norm() / y.double().norm())
        assert error <= MOST_UNITS[y.dtype] * torch.finfo(y.dtype).eps, (name, error)
    print(f"{len(theirs)} results, {len(their_signatures)} signatures")
    sglang_files.main([str(FOLDER), "--undo"])
    again = results(*load())
    assert all(torch.equal(again[name], y) for name, y in theirs.items())
    print("undone: the same bits as before")

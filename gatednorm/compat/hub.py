"""The kernel hub's layer, and the repository that holds it.

    python -m gatednorm.compat.hub FOLDER

writes a repository for Hugging Face's `kernels`, which transformers uses by way of `use_kernels`
and `KernelConfig`: this package under a name of its own, with :class:`RMSNormGated` as its layer.
Its layout follows "Kernel requirements" of https://huggingface.co/docs/kernels.
"""

import argparse
import base64
import hashlib
import json
import os
import tempfile
from pathlib import Path

from torch import Tensor, nn

from ..families import FAMILIES

NAME, VERSION = "gated-norm", 1
BACKENDS = ("cuda", "cpu")


class RMSNormGated(nn.Module):
    """What takes the place of a transformers class's own `forward`, with the options of its family.

    `kernels` binds `forward` to the model's module and uses no more of this class, which may have
    no constructor and no attributes but the two that describe it.
    """

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """`hidden_states`, `gate` `[..., D]` to `[..., D]`, as the module's own class has it.

        Raises:
            ValueError: a module whose class is of no known family.
        """
        for cls in type(self).__mro__:
            if family := FAMILIES.get((cls.__module__, cls.__qualname__)):
                return family.forward(self, hidden_states, gate)
        cls = type(self)
        raise ValueError(
            f"the families are classes of transformers, got {cls.__module__}.{cls.__qualname__}; "
            "keep its own forward, or another kernel's"
        )


CARD = """---
library_name: kernels
license: mit
tags: [kernels]
---
The gated RMS norm of linear-attention and state-space models, forward and backward, in one Triton
kernel each. The layer `RMSNormGated` rounds as the model's own class does. It needs Python 3.11,
torch 2.8 and Triton 3.4, and runs on NVIDIA GPUs; `torch-cpu` is the same in plain PyTorch.

```python
from transformers import AutoModelForCausalLM, KernelConfig

ours = ("OWNER/{name}:RMSNormGated", {{"version": {version}, "trust_remote_code": True}})
kernels = KernelConfig({{"RMSNormGated": ours}})
model = AutoModelForCausalLM.from_pretrained(..., use_kernels=True, kernel_config=kernels)
```
"""


def repository() -> dict[str, bytes]:
    """The files of the repository by their path in it.

    Only what the layer needs goes in. A variant's `id`, which `kernels` imports it under, ends in a
    hash of its files: two releases can be loaded into one process, each with its own operators.
    """
    package = Path(__file__).parents[1]
    patterns = ("*.py", "kernels/*.py", "compat/__init__.py", "compat/common.py", "compat/hub.py")
    found = {path for pattern in patterns for path in package.glob(pattern)}
    parts = sorted(found - {package / "kernels" / "ceilings.py"})  # the benchmark's alone
    source = {path.relative_to(package).as_posix(): path.read_bytes() for path in parts}
    source["layers.py"] = b"from .compat.hub import RMSNormGated\n\n__all__ = ['RMSNormGated']\n"
    source["__init__.py"] += b"\nfrom . import layers\n"
    digests = {path: hashlib.sha256(text).digest() for path, text in source.items()}
    unique = hashlib.sha256(repr(digests).encode()).hexdigest()[:8]
    files = {"README.md": CARD.format(name=NAME, version=VERSION).encode()}
    for backend in BACKENDS:
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
            "version": VERSION,
            "license": "MIT",
            "python-depends": ["einops"],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {path: base64.b64encode(d).decode() for path, d in digests.items()},
            },
        }
        variant = source | {"metadata.json": json.dumps(metadata, indent=2).encode()}
        files |= {f"build/torch-{backend}/{path}": text for path, text in variant.items()}
    return files


def write(folder: str | Path) -> Path:
    """Write the repository to a new folder, all of it or nothing; returns the folder.

    Raises:
        ValueError: the folder exists, or its parent does not.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise ValueError(f"the folder must be a new one, and {folder} exists; name another")
    if not folder.parent.is_dir():
        raise ValueError(f"the folder's parent must exist, got {folder}; make {folder.parent}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        for path, text in repository().items():
            file = Path(made, folder.name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)
        os.rename(Path(made, folder.name), folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gatednorm.compat.hub",
        description="The files of a repository for the kernel hub.",
    )
    parser.add_argument("folder", help="a new folder, for example gated-norm")
    try:
        print(f"{write(parser.parse_args(arguments).folder)}: a repository for the kernel hub")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

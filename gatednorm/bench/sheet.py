"""What was measured: one record a quantity, and what is needed to read it alone."""

import datetime
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import __version__
from .cases import Case

Record = dict[str, str]


@dataclass
class Sheet:
    """Records, each with what all have in `common`, and the providers that are not installed. Of
    what was measured twice, the last counts."""

    rows: list[Record]
    common: Record
    missing: set[str] = field(default_factory=set)
    dtype: str = "bfloat16"

    def add(
        self, case: Case, provider: str, quantity: str, value: float, unit: str, **more: str
    ) -> None:
        shape = {"rows": str(case.rows), "width": str(case.width), "dtype": self.dtype}
        what = {"provider": provider, "quantity": quantity, "value": f"{value:.6g}", "unit": unit}
        self.rows.append(self.common | {"case": case.name} | shape | what | more)

    def find(self, case: Case, quantity: str) -> dict[str, Record]:
        """By provider."""
        return {
            r["provider"]: r
            for r in self.rows
            if r["case"] == case.name and r["quantity"] == quantity
        }

    def get(self, case: Case, quantity: str) -> dict[str, float]:
        """Provider to value."""
        return {name: float(r["value"]) for name, r in self.find(case, quantity).items()}


def gigabytes(case: Case, tensors: int) -> float:
    """Of bf16."""
    return tensors * case.rows * case.width * 2 / 1e9


def machine(device: str) -> str:
    """The GPU's name, or the CPU's and how many threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if distribution == "gatednorm" else "from source"


def about(device: str, *packages: str) -> Record:
    """What the figures depend on: the machine, versions of torch, triton and `packages`."""
    return {
        "device": machine(device),
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }

"""Which code runs the norm where triton is not installed."""

import subprocess
import sys

import pytest

from gatednorm import autograd


def test_without_triton_the_way_out_is_named(monkeypatch):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(autograd.importlib, "import_module", missing)
    with pytest.raises(RuntimeError, match=r"a cuda device need .* triton.*pip install triton"):
        autograd.backend.__wrapped__("cuda")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, gatednorm
x, z = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
norm = gatednorm.RMSNorm(8)
norm(x, z).sum().backward()
norm.path = "inference"
with torch.no_grad():
    norm(x, z)
assert not any(name.startswith("triton.") for name in sys.modules), "triton was imported"
print("fine", x.grad.shape == x.shape)
"""


def test_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["fine", "True"], done.stderr

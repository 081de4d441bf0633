"""Who imports what, in which order tensors are handed on, and what runs without triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gatednorm import autograd

ROOT = Path(__file__).parents[2]
TREES = {
    file.relative_to(ROOT): ast.parse(file.read_bytes())
    for folder in ("gatednorm", "models")
    for file in (ROOT / folder).rglob("*.py")
}
OURS = {"gatednorm", "models", "demo", "configs", "benchmarks", "tests"}


def imported(tree: ast.Module) -> set[str]:
    """The packages that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_imports_run_one_way():
    """The norm knows nothing of the models, and the models nothing of the commands; in the norm,
    triton is imported in one folder."""
    for file, tree in TREES.items():
        found, package = imported(tree), file.parts[0]
        assert found & OURS <= {"gatednorm", package}, file
        if package == "gatednorm":
            assert "triton" not in found or file.parts[1] == "kernels", file


TENSORS = ("dy", "x", "weight", "bias", "z", "mean", "rstd")


def test_tensors_come_in_one_order():
    """In the parameters of every function around the kernels, and wherever three or more of them
    are handed on. The doors have the orders of the peers, and `gated_norm_linear` has its gate
    second."""
    for file, tree in TREES.items():
        kernel = file.parts[1] == "kernels" and file.name != "launch.py"
        if file.parts[0] != "gatednorm" or kernel or file.parts[1] == "compat":
            continue
        for node in ast.walk(tree):
            names, least = [], 3
            if isinstance(node, ast.FunctionDef):
                names, least = [a.arg for a in node.args.posonlyargs + node.args.args], 2
            elif isinstance(node, ast.Call | ast.List | ast.Tuple):
                given = node.args if isinstance(node, ast.Call) else node.elts
                names = [a.id for a in given if isinstance(a, ast.Name)]
            order = [TENSORS.index(name) for name in names if name in TENSORS]
            public = file.name == "linear.py" and names[:3] == ["x", "z", "weight"]
            fits = len(order) < least or order == sorted(order) or public
            assert fits, f"{file}:{node.lineno}: {names}"


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
found = {name for name in sys.modules if name.startswith(("triton.", "gatednorm.bench"))}
assert not found, f"imported: {found}"
print("fine", x.grad.shape == x.shape)
"""


def test_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["fine", "True"], done.stderr

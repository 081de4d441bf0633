"""What somebody gets who installs the package: the wheel alone, with what it asks for and no more.

The environments are new ones. torch and the other requirements are links to the files of the
environment that runs the tests, each with its metadata, so that pip finds them and nothing else.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gatednorm

ROOT = Path(__file__).resolve().parent.parent
OPERATOR = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
# Nothing of what pip is configured to do here may help.
OWN = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=OWN | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def needed_by(*names: str) -> set[str]:
    """These distributions, and all that they ask for."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            found.add(name)
            asked = [Requirement(text) for text in distribution(name).requires or ()]
            todo += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


class Environment:
    """A virtual environment with these distributions, in which a wheel is installed."""

    def __init__(self, folder: Path, wheel: Path, extra: str, *names: str):
        self.python, self.folder = folder / "bin" / "python", folder
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        where = run(
            self.python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd="/"
        )
        self.site, names = Path(where.strip()), needed_by(*names)
        for name in names:
            there = distribution(name)
            for part in {file.parts[0] for file in there.files or ()} - {"..", "__pycache__"}:
                if not (self.site / part).exists():  # packages of one namespace share a folder
                    (self.site / part).symlink_to(there.locate_file(part))
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        nothing = {"PIP_CONFIG_FILE": os.devnull}
        run(*pip, "install", "--no-index", f"{wheel}{extra}", cwd=folder, **nothing)
        listed = run(*pip, "list", "--format", "freeze", cwd=folder, **nothing)
        assert {canonicalize_name(line.split("==")[0]) for line in listed.splitlines()} == {
            *names, "gatednorm",
        }  # fmt: skip

    def prints(self, code: str, **environment: str) -> str:
        """What a script prints that has neither this folder nor the checkout on its path."""
        script = self.folder / "script.py"
        script.write_text(code, encoding="utf-8")
        return run(self.python, "-I", script, cwd=self.folder, **environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the sdist, and the wheel that `python -m build` makes of it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "-o", folder, ROOT], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    [wheel] = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def alone(wheel, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("alone") / "env", wheel, "", "torch", "einops")


def test_what_is_in_them(built, wheel):
    version = gatednorm.__version__
    assert wheel.name == f"gatednorm-{version}-py3-none-any.whl"
    [sdist] = built.glob("*.tar.gz")
    info, modules = f"gatednorm-{version}.dist-info", ROOT / "gatednorm"
    library = {f"gatednorm/{p.relative_to(modules).as_posix()}" for p in modules.rglob("*.py")}
    library.add("gatednorm/py.typed")
    files = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE"}
    assert set(zipfile.ZipFile(wheel).namelist()) == library | {f"{info}/{name}" for name in files}
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    assert {name for name in names if not name.startswith("gatednorm.egg-info/")} == library | {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md",
        "SECURITY.md", "pyproject.toml", "setup.cfg",
    }  # fmt: skip


def test_a_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == gatednorm.__version__
    released = f"## {gatednorm.__version__} ({citation['date-released']})"
    assert released in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def examples() -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", OPERATOR, re.MULTILINE | re.DOTALL))


WHERE = """
import sys
from importlib.util import find_spec
from pathlib import Path
import gatednorm
assert Path(gatednorm.__file__).is_relative_to(sys.prefix), gatednorm.__file__
assert not any(find_spec(name) for name in ("models", "demo", "pytest", "hydra", "lightning"))
"""


def test_the_examples_of_the_reference_run_with_the_wheel_alone(alone):
    printed = alone.prints(f"{WHERE}\n{examples()}\nassert 'triton' not in sys.modules")
    assert f"```text\n{printed}```" in OPERATOR


INTERPRETED = """
from gatednorm import autograd
from gatednorm.kernels import launch
autograd.backend = lambda device_type: launch  # CPU tensors, too
"""
CHECKED = """
import torch
from gatednorm import gated_norm_ref, rmsnorm_fn
torch.manual_seed(0)
values = [torch.randn(*shape) for shape in ((6, 96), (96,), (6, 96))]
def run(function, dtype):
    x, w, z = (t.to(dtype).requires_grad_() for t in values)
    y = function(x, w, None, z, group_size=32, norm_before_gate=False)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, w, z))
truth = run(gated_norm_ref, torch.float64)
errors = [
    [float((t - exact).abs().max()) for t, exact in zip(run(function, torch.float32), truth)]
    for function in (rmsnorm_fn, gated_norm_ref)
]
assert all(0 < ours <= 2 * plain for ours, plain in zip(*errors, strict=True)), errors
print("checked")
"""


def test_with_triton_the_kernels_run_under_the_interpreter(wheel, tmp_path):
    pytest.importorskip("triton")
    names = ("torch", "einops", "triton", "numpy")
    environment = Environment(tmp_path / "env", wheel, "[triton]", *names)
    code = f"{WHERE}{INTERPRETED}\n{examples()}\n{CHECKED}"
    assert environment.prints(code, TRITON_INTERPRET="1").endswith("checked\n")


CONSUMER = """
from typing import assert_type

import torch
from torch import Tensor

import gatednorm
from gatednorm.compat.fla import FusedRMSNormGated

x, w = torch.randn(4, 64), torch.ones(64)
assert_type(gatednorm.rms_norm_gated(x, w, None, x, group_size=32), Tensor)
assert_type(gatednorm.rmsnorm_fn(x, w, None, None, out_dtype=torch.float16), Tensor)
assert_type(gatednorm.layernorm_fn(x, is_rms_norm=True), Tensor)
assert_type(gatednorm.gated_norm_linear(x, x, w, torch.ones(8, 64)), Tensor)
assert_type(gatednorm.gated_norm_ref(x), Tensor)
assert_type(gatednorm.rms_norm_ref(x, w, None), Tensor)
y, mean, rstd = gatednorm.layernorm_forward(x)
assert_type((y, mean, rstd), tuple[Tensor, Tensor | None, Tensor])
dx, dw, db, dz = gatednorm.layernorm_backward(y, x, w, None, None, mean, rstd)
assert_type(dx, Tensor)
assert_type(gatednorm.patch(torch.nn.Linear(1, 1)).count, int)
norm = gatednorm.RMSNorm(64, device="cpu", activation="sigmoid")
assert_type(norm.weight, torch.nn.Parameter)
assert_type(norm.bias, torch.nn.Parameter | None)
block: torch.nn.Module = gatednorm.GatedNormLinear(64, 8, num_heads=2)
FusedRMSNormGated(64, activation="sigmoid")
# What follows is wrong, and mypy must say so: an ignored line without an error is one.
gatednorm.rms_norm_gated(x, 1.0)  # type: ignore[arg-type]
gatednorm.rmsnorm_fn(x, groups=2)  # type: ignore[call-arg]
gatednorm.RMSNorm("64")  # type: ignore[arg-type]
gatednorm.patch(64)  # type: ignore[arg-type]
"""


def test_its_types_are_there_for_those_who_use_it(alone, tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", alone.python)
    assert "no issues found" in run(*mypy, "consumer.py", cwd=tmp_path)

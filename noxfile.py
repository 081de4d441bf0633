"""The versions that pyproject.toml allows, each with a part of the tests: see docs/versions.md.

    nox                  # oldest, newest, and each Python that is installed
    nox -s oldest -R     # again, without installing

A session makes an environment of its own, several GB with a build of torch for GPUs, and ends with
its row of the table.
"""

import datetime
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

# What a version of torch decides (operators, compilation), of Triton (launch, interpreter, a
# compilation for an H100), transformers (its classes, published checkpoints), Hydra (its grammar),
# datasets (sources of text), Lightning (loops and checkpoints).
TESTS = [
    "tests/gatednorm/test_library.py",
    "tests/gatednorm/test_functional.py",
    "tests/gatednorm/test_modules.py",
    "tests/gatednorm/test_linear.py",
    "tests/gatednorm/test_linear_fp8.py",
    "tests/gatednorm/test_launch.py",
    "tests/gatednorm/test_compilation.py",
    "tests/compat/test_transformers.py",
    "tests/compat/test_patch.py",
    "tests/demo/checkpoints/test_published.py",
    "tests/demo/config/test_overrides.py",
    "tests/demo/data/test_sources.py",
    "tests/demo/training/test_loggers.py",
    "tests/demo/training/test_resume.py",
]
SHOWN = ("torch", "triton", "transformers", "lightning", "hydra-core", "datasets", "numpy")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "expecttest", "psutil", "build", "mypy")


def lowest() -> list[str]:
    """What the library, its extras and its tests ask for, but for tools, at the lower bounds."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    names = ("triton", "demo", "tokenizers", "tensorboard", "test")
    asked = [
        text for texts in (project["dependencies"], *(extras[n] for n in names)) for text in texts
    ]
    bounds = dict(re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(asked), re.MULTILINE))
    return [f"{name}=={bound}" for name, bound in bounds.items() if name not in TOOLS]


def check(session: nox.Session, *requirements: str) -> None:
    # No configuration of pip on this machine may hold a version back.
    session.install("-e", ".[test]", *requirements, env={"PIP_CONSTRAINT": os.devnull})
    report = Path(session.create_tmp(), "report.xml").resolve()
    session.run("python", "-m", "pytest", "-q", f"--junitxml={report}", *(session.posargs or TESTS))
    suite = ElementTree.parse(report).getroot()[0]
    skipped = int(suite.get("skipped"))
    passed = int(suite.get("tests")) - skipped
    code = "from importlib.metadata import version as v; import platform, sys; "
    code += "print(platform.python_version(), *map(v, sys.argv[1:]), sep=' | ')"
    versions = session.run("python", "-c", code, *SHOWN, silent=True).strip()
    today = datetime.date.today()
    session.log(f"| {session.name} | {versions} | {passed} passed, {skipped} skipped | {today} |")


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The lower bounds of pyproject.toml."""
    check(session, *lowest())


@nox.session(python="3.11")
def newest(session: nox.Session) -> None:
    """What the package index has today, within the upper bounds."""
    check(session, "--upgrade", "--upgrade-strategy=eager")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def pythons(session: nox.Session) -> None:
    """Each Python, with the versions of constraints.txt."""
    check(session, "-c", "constraints.txt")

"""Packages that the environment lacks, in a folder of their own, for one test file."""

import os
import subprocess
import sys
from pathlib import Path


def install(folder: Path, *requirements: str) -> Path:
    """These packages, without what they ask for, in `folder`."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, *requirements], check=True)
    return folder


def run(folder: Path, script: str, *arguments: object, **environment: str) -> str:
    """What a script of tests/helpers prints, run in a process that prefers the packages of
    `folder` to its own."""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (folder, here.parents[1], here)))
    done = subprocess.run(
        [sys.executable, str(here / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout

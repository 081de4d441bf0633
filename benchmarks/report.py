"""What every benchmark leaves: a table on the screen, and a CSV that says what made it."""

import argparse
import csv
import os
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gatednorm.bench import sheet

RESULTS = Path(__file__).parent / "results"


class Parser(argparse.ArgumentParser):
    """Refuses a run on a GPU where there is none."""

    def parse_args(self, *given):
        args = super().parse_args(*given)
        runs = not getattr(args, "draw", None)
        if runs and getattr(args, "device", "") == "cuda" and not torch.cuda.is_available():
            self.error("no CUDA GPU here; --device cpu runs the same code")
        return args


def parser(doc: str, out: str = "") -> argparse.ArgumentParser:
    """Described by the first line of `doc`; its `--out` is by default `out` under results/."""
    made = Parser(description=doc.splitlines()[0])
    made.add_argument("--out", type=Path, default=RESULTS / out, help="by default %(default)s")
    return made


def commit() -> str:
    """Of the code, `-dirty` where it was changed since; GATEDNORM_COMMIT says it without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    git = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return os.environ.get("GATEDNORM_COMMIT") or git.stdout.strip() or "unknown"


def about(device: str, *packages: str) -> dict[str, str]:
    """What the figures depend on: the machine, versions of torch, triton and `packages`, commit."""
    return sheet.about(device, *packages) | {"commit": commit()}


def show(rows: list[dict], title: str | None = None, console: Console | None = None) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    (console or Console()).print(table)


def write(path: Path, rows: list[dict], run: dict[str, str] | None = None) -> None:
    """A CSV of `rows`, each with what is in `run`; nothing where there are none."""
    if not rows:
        return
    rows = [row | (run or {}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}", flush=True)

"""Times the gated norm at the widths of published models, and prints a table for an issue.

    python -m gatednorm.bench                               # every model
    python -m gatednorm.bench --models qwen3.5 mamba2-2.7b --json bench.json

On a GPU: this norm, and every other that is installed, against what the memory allows. Without one:
the CPU path against plain PyTorch. Each is compared with float64 before it is timed. The table goes
to standard output, what is being done to standard error. The exit code is 1 where this norm fails.
"""

import argparse
import difflib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from . import tables
from .cases import MODELS
from .measure import on_cpu, reason, throughput
from .providers import PROVIDERS
from .sheet import Sheet, about

NUMBERS = ("rows", "width", "value", "ratio", "gb_per_s", "low", "speedup", "high")
PATIENCE = 40  # seconds on a CPU after which no further model is begun
TOKENS = {"cuda": 8192, "cpu": 512}


def model(name: str) -> str:
    if name.lower() in MODELS:
        return name.lower()
    near = difflib.get_close_matches(name.lower(), MODELS, cutoff=0.4)
    raise argparse.ArgumentTypeError(
        f"no model {name!r}; {'did you mean' if near else 'there are'} {', '.join(near or MODELS)}"
    )


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, got {text!r}")
    return int(text)


def why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA or ROCm"
    return f"torch {torch.__version__} finds none; nvidia-smi or rocm-smi lists what the driver has"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(path: Path, sheet: Sheet) -> None:
    """JSON: `about`, and `rows`, whose figures are numbers, or null where a provider failed."""
    rows: list[dict[str, object]] = []
    for r in sheet.rows:
        own = {key: value for key, value in r.items() if key not in sheet.common}
        numbers = {key: float(own[key]) for key in NUMBERS if key in own}
        rows.append(own | {k: None if math.isnan(v) else v for k, v in numbers.items()})
    path.write_text(json.dumps({"about": sheet.common, "rows": rows}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gatednorm.bench", description=(__doc__ or "").partition("\n")[0],
        epilog=f"Models: {', '.join(MODELS)}.",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", type=model, default=list(MODELS), metavar="NAME",
        help="by default all",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=positive, metavar="N",
        help=f"in a call; by default {TOKENS['cuda']}, without a GPU {TOKENS['cpu']}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        parser.error("on a GPU the norm needs the package triton; pip install triton")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: its folder must exist, got {args.json}; make it, or name another")

    tokens = args.tokens or TOKENS[device]
    cases = {MODELS[key].name: MODELS[key].case(tokens) for key in args.models}
    sheet = Sheet(
        [], about(device, "gatednorm"), dtype="bfloat16" if device == "cuda" else "float32"
    )
    if device == "cpu":
        print(f"no GPU found: {why_no_gpu()}; the CPU path beside plain PyTorch\n", flush=True)
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0, os.cpu_count() or 1
        if load > cores:
            print(
                f"this machine is busy, load {load:.1f} on {cores} cores: the times are noise; "
                "OMP_NUM_THREADS=1 makes them steadier\n"
            )
    complete, late, began = True, [], time.monotonic()
    for number, (name, case) in enumerate(cases.items(), 1):
        if device == "cpu" and time.monotonic() - began > PATIENCE:
            late.append(name)
            continue
        say(f"{number}/{len(cases)} {name}: {case.name}")
        try:
            if device == "cuda":
                throughput(case, PROVIDERS, sheet, say)
            else:
                on_cpu(case, sheet, say)
        except RuntimeError as problem:  # of the inputs or the ceiling; a provider's is caught
            more = "; try fewer --tokens" if isinstance(problem, torch.OutOfMemoryError) else ""
            say(f"  {reason(problem)}{more}")
        complete &= "gatednorm" in sheet.get(case, "both")
    print(tables.report(sheet, cases, device))
    if late:
        print(f"Left out after {PATIENCE} s: {', '.join(late)}; `--models` times some alone.")
    if args.json:
        try:
            write(args.json, sheet)
        except OSError as problem:
            parser.error(f"--json cannot be written: {problem}")
        say(f"written to {args.json}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

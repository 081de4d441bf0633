"""Errors in bf16 against float64: ours, plain bf16 PyTorch, and every peer that is installed.

    python -m benchmarks.numerics            # prints the table for this machine
    python -m benchmarks.numerics --write    # and puts it into docs/numerics.md

Runs on a GPU where there is one, else on the CPU (where the Triton peers are left out).
"""

import argparse
from pathlib import Path

import torch

from gatednorm.bench.cases import Case
from gatednorm.bench.providers import PROVIDERS, reference
from gatednorm.bench.sheet import version
from gatednorm.bench.timing import relative_error

DOCUMENT = Path(__file__).parent.parent / "docs" / "numerics.md"
BEGIN, END = "<!-- table: {} -->", "<!-- end -->"
CASES = (
    Case(16384, 128),
    Case(1024, 4096, 512, norm_before_gate=False),
    Case(1024, 5120, norm_before_gate=False),
    Case(1024, 2048, is_rms_norm=False, bias=True),
)
RESULTS = ("y", "dx", "dz", "dw")


def inputs(case: Case, device: str) -> dict[str, torch.Tensor]:
    """bf16 `x`, `z`, `dy`, weight and bias."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(device, torch.bfloat16)

    return {
        "x": randn(case.rows, case.width),
        "w": 1 + 0.1 * randn(case.width),
        "b": randn(case.width) if case.bias else None,
        "z": randn(case.rows, case.width),
        "dy": randn(case.rows, case.width),
    }


def results(function, t: dict, dtype=torch.bfloat16, backward: bool = True) -> list[torch.Tensor]:
    leaves = {k: v if v is None else v.to(dtype).requires_grad_(backward) for k, v in t.items()}
    y = function(leaves["x"], leaves["w"], leaves["b"], leaves["z"])
    if not backward:
        return [y]
    grads = torch.autograd.grad(y, [leaves[k] for k in "xzw"], leaves["dy"].detach())
    return [y.detach(), *grads]


def providers(case: Case, device: str) -> dict:
    """Name and functions; `None` for the training function of one that has no backward."""
    plain = reference(case, upcast=False)
    found = {"PyTorch, all in bf16": (plain, plain)}
    family = "Qwen3-Next" if case.norm_before_gate else "Mamba-2"
    label = {
        "gatednorm": "**gatednorm**",
        "eager": "PyTorch, in fp32 inside",
        "transformers": f"transformers {version('transformers')}, {family}",
    }
    for name, (distribution, make) in PROVIDERS.items():
        if device == "cpu" and name not in ("gatednorm", "eager", "transformers"):
            continue
        try:
            functions = make(case)
        except (ImportError, TypeError):  # a transformers from before its classes had groups
            continue
        if functions is not None:
            found[label.get(name, f"{name} {version(distribution)}")] = functions
    return found


def rows(case: Case, device: str) -> list[list[str]]:
    t = inputs(case, device)
    truth = results(reference(case, upcast=True), t, torch.float64)

    def relative(got) -> list[str]:
        errors = [f"{1e3 * relative_error(a, b):.2f}" for a, b in zip(got, truth, strict=False)]
        return errors + ["-"] * (len(RESULTS) - len(errors))

    table = [["float64, rounded to bf16", *relative([v.bfloat16() for v in truth])]]
    for name, (training, inference) in providers(case, device).items():
        try:
            got = results(training or inference, t, backward=training is not None)
        except Exception as error:  # a peer that cannot run this case says so in the table
            table.append([name, type(error).__name__, *["-"] * (len(RESULTS) - 1)])
        else:
            table.append([name, *relative(got)])
    return table


def markdown(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    triton = f", triton {version('triton')}" if device == "cuda" else ""
    lines = [f"{where}, torch {torch.__version__}{triton}.", ""]
    for case in CASES:
        lines += [f"| {case.name} | {' | '.join(RESULTS)} |", "|---|" + "--:|" * len(RESULTS)]
        lines += [f"| {' | '.join(row)} |" for row in rows(case, device)]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parser.parse_args()
    table = markdown(device)
    print(table)
    if arguments.write:
        text = DOCUMENT.read_text()
        head, rest = text.split(BEGIN.format(device), 1)
        tail = rest.split(END, 1)[1]
        DOCUMENT.write_text(f"{head}{BEGIN.format(device)}\n{table}\n{END}{tail}")


if __name__ == "__main__":
    main()

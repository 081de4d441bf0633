"""The two files of this norm in an SGLang that has both, as re-exports of ours.

    python -m gatednorm.compat.sglang_files FOLDER          # .../site-packages/sglang
    python -m gatednorm.compat.sglang_files FOLDER --undo

`fla/layernorm_gated.py` came from flash-linear-attention, and `mamba/ops/layernorm_gated.py` by way
of vLLM from mamba; SGLang 0.5.5 still has both. What was there stays beside them as a backup.
"""

import argparse
import ast
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LAYERS = "srt/layers/attention"
FILES = {  # the file: whose names, and which
    f"{LAYERS}/fla/layernorm_gated.py": (
        "sglang",
        ("LayerNorm", "LayerNormFn", "RMSNorm", "layernorm_fn", "rms_norm_gated", "rms_norm_ref"),
    ),
    f"{LAYERS}/mamba/ops/layernorm_gated.py": ("vllm", ("rms_norm_gated",)),
}
BACKUP = ".before-gatednorm"
OTHERWISE = "use gatednorm.patch('sglang') for this release"


def replace(folder: str | Path) -> list[Path]:
    """Make both files re-exports; returns them.

    Args:
        folder: the package `sglang` itself, installed or in a checkout.

    Raises:
        ValueError: a file is missing, the release imports a name from it that we lack, or there is
            a backup already; nothing is changed.
    """
    folder = Path(folder).absolute()
    for path, (_, names) in FILES.items():
        file = folder / path
        if not file.is_file():
            raise ValueError(f"{file} must be there, as in SGLang 0.5.5; {OTHERWISE}")
        if _backup(file).exists():
            raise ValueError(f"{_backup(file)} exists: replaced already; --undo puts it back")
        for importer, asked in _imported_names(folder, path):
            if asked not in names:
                raise ValueError(f"{importer} imports {asked} from {path}; {OTHERWISE}")
    for path, (door, names) in FILES.items():
        file = folder / path
        new = file.with_name(file.name + ".new")
        new.write_text(
            f'"""The gated norm of gatednorm; what was here is {_backup(file).name}."""\n\n'
            f"from gatednorm.compat.{door} import {', '.join(names)}  # noqa: F401\n"
        )
        shutil.copy2(file, _backup(file))
        os.replace(new, file)
    return [folder / path for path in FILES]


def undo(folder: str | Path) -> list[Path]:
    """Put the files back that :func:`replace` replaced; returns them.

    Raises:
        ValueError: there is no backup.
    """
    files = [Path(folder).absolute() / path for path in FILES]
    files = [file for file in files if _backup(file).exists()]
    if not files:
        raise ValueError(f"{folder} has no *{BACKUP}, so there is nothing to undo")
    for file in files:
        os.replace(_backup(file), file)
    return files


def _backup(file: Path) -> Path:
    return file.with_name(file.name + BACKUP)


def _imported_names(folder: Path, path: str) -> Iterator[tuple[Path, str]]:
    """Who in the package imports which names from this file."""
    module = path.removesuffix(".py").replace("/", ".")
    for importer in folder.rglob("*.py"):
        text = importer.read_bytes()
        if b"layernorm_gated" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and f"sglang.{module}" == node.module:
                yield from ((importer, alias.name) for alias in node.names)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gatednorm.compat.sglang_files", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", help="the package itself, for example .../site-packages/sglang")
    parser.add_argument("--undo", action="store_true", help="put back what was there")
    given = parser.parse_args(arguments)
    try:
        for file in undo(given.folder) if given.undo else replace(given.folder):
            print(f"{'restored' if given.undo else 'replaced'}: {file}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

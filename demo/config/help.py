"""What `--help` prints: the examples of a command, its groups, and every value with its meaning,
which is the comment beside it in configs/*.yaml.
"""

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import yaml

from demo.config.overrides import CONFIG_DIR, Composed, groups

LINE = re.compile(r"(?P<key>\w+):(?:[^#]*?\s#\s*(?P<comment>.*)|.*)")


def help_text(name: str, composed: Composed) -> str:
    """The help of `name`.py, with the values of a composed config."""
    sections = {key: value for key, value in composed.values.items() if isinstance(value, dict)}
    single = {key: value for key, value in composed.values.items() if key not in sections}
    lines = _values("", single, [CONFIG_DIR / f"{name}.yaml"])
    for key, values in sections.items():
        files = _files(CONFIG_DIR / key, composed.choices.get(key))
        lines += ["", f"  {_title(files[-1])}".rstrip(), *_values(f"{key}.", values, files)]
    options = [f"  {group}: {', '.join(names)}" for group, names in groups(name).items()]
    text = composed.help.replace("$APP_CONFIG_GROUPS", "\n".join(options) + "\n")
    text = text.replace("$CONFIG", "\n".join(lines).strip("\n") + "\n")
    return re.sub(r"\n{3,}", "\n\n", text).rstrip()


def _values(prefix: str, values: dict[str, Any], files: list[Path]) -> list[str]:
    """The lines of one section, whose keys begin with `prefix`; `files` explain them, the last of
    several that do."""
    headings, comments = {}, {}
    for file in files:
        above = ""
        for line in file.read_text(encoding="utf-8").splitlines()[1:]:
            if found := LINE.fullmatch(line):
                headings |= {found["key"]: above} if above else {}
                comments |= {found["key"]: found["comment"]} if found["comment"] else {}
            above = line.removeprefix("# ") if line.startswith("# ") else ""
    lines = []
    for key, value in values.items():
        lines += ["", f"  {headings[key]}"] if key in headings else []
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
        text = text.removesuffix("\n...\n").strip()
        lines += textwrap.wrap(
            comments.get(key, ""),
            max(min(shutil.get_terminal_size((100, 24)).columns, 120), 72),
            initial_indent=f"    {f'{prefix}{key}: {text}':<32}  ",
            subsequent_indent=" " * 38,
            break_long_words=False,
        ) or [f"    {prefix}{key}: {text}"]
    return lines


def _files(folder: Path, name: str) -> list[Path]:
    """The file of this name, after those that it starts from."""
    file = folder / f"{name}.yaml"
    parents = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    return [path for parent in parents for path in _files(folder, parent)] + [file]


def _title(file: Path) -> str:
    """The comment that a file begins with."""
    line = file.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("# ") if line.startswith("# ") else ""

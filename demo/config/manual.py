"""What `--help` prints: the examples of a command, its groups, and every value with its meaning,
which are the comments beside the values in configs/*.yaml.
"""

import re
import shutil
import textwrap
from pathlib import Path
from string import Template

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
LINE = re.compile(r"(?P<key>\w+):(?:[^#]*?\s#\s*(?P<comment>.*)|.*)")


def manual(name: str, overrides: list[str], groups: dict[str, list[str]]) -> str:
    """The help of `name`.py, with the values that these overrides give; Hydra must be ready to
    compose. `groups` are the options of each config group."""
    config = hydra.compose(name, overrides, return_hydra_config=True)
    choices = config.hydra.runtime.choices
    lines = []
    for section, files in _sections(name, config, choices):
        headings, comments = _read(files)
        values = config[section] if section else config
        prefix = f"{section}." if section else ""
        lines += ["", f"  {headings.get('', '')}".rstrip()] if section else []
        for key, value in OmegaConf.to_container(values, resolve=False).items():
            if section or (key != "hydra" and not isinstance(value, dict)):
                if heading := headings.get(key):
                    lines += ["", f"  {heading}"]
                lines += _entry(f"{prefix}{key}: {_text(value)}", comments.get(key, ""))
    options = [f"  {group}: {', '.join(groups[group])}" for group in groups]
    text = Template(config.hydra.help.template).substitute(
        APP_CONFIG_GROUPS="\n".join(options) + "\n", CONFIG="\n".join(lines).strip("\n") + "\n"
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip()


def _sections(name: str, config: DictConfig, choices: DictConfig) -> list[tuple[str, list[Path]]]:
    """Each section of the config, the one without a name first, and the files that tell of it;
    what a later file says holds."""
    sections = [("", [CONFIG_DIR / f"{name}.yaml"])]
    for key, value in config.items_ex(resolve=False):
        if key != "hydra" and OmegaConf.is_dict(value):
            sections.append((key, _files(CONFIG_DIR / key, choices.get(key))))
    return sections


def _files(folder: Path, name: str | None) -> list[Path]:
    """The file of this name, after those that it starts from."""
    file = folder / f"{name}.yaml"
    if not file.is_file():
        return []
    parents = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    names = [parent for parent in parents if isinstance(parent, str) and parent != "_self_"]
    return [*(path for parent in names for path in _files(folder, parent)), file]


def _read(files: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """The comments of YAML files: headings by the key below them ('' for the last file's first
    line) and explanations by the key before them."""
    headings, comments = {}, {}
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        headings[""] = lines[0].removeprefix("#").strip() if lines[0].startswith("# ") else ""
        above = ""
        for line in lines[1:]:
            if found := LINE.fullmatch(line):
                if above and found["key"] not in ("defaults", "hydra"):
                    headings[found["key"]] = above
                if found["comment"]:
                    comments[found["key"]] = found["comment"]
            above = line.removeprefix("#").strip() if line.startswith("# ") else ""
    return headings, comments


def _entry(value: str, comment: str) -> list[str]:
    """`value` and beside it, wrapped, what it means."""
    column, width = 34, max(min(shutil.get_terminal_size((100, 24)).columns, 120), 72)
    words = textwrap.wrap(comment, width - column - 4) or [""]
    if len(value) >= column:
        return [f"    {value}", *(" " * (column + 4) + line for line in words if line)]
    first, *rest = words
    return [f"    {value:<{column}}{first}".rstrip(), *(" " * (column + 4) + line for line in rest)]


def _text(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").strip()

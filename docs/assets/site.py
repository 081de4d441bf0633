"""What the site adds to mkdocs: files from outside docs/, and links as they are on GitHub.

Files keep their places in the repository, except that docs/ is the top. A CSV becomes a page. A
paragraph that is nothing but a link to a section of the README is replaced by that section.
"""

import csv
import html
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/NOTES.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")
PUBLIC = re.findall(r'"(\w+)",', (ROOT / "gatednorm/__init__.py").read_text(encoding="utf-8"))
SHARED = re.compile(r"^\[[^\]]*\]\(\.\./README\.md#([\w-]+)\)$", re.MULTILINE)


def on_files(files, config):
    results = sorted((ROOT / "benchmarks/results").rglob("*.*"))
    for path in (*(ROOT / name for name in OUTSIDE), *results):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".csv":
            files.append(File.generated(config, f"{uri}.md", content=table(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    place = page.file.src_uri
    if place.startswith("benchmarks/results/"):
        page.meta["search"] = {"exclude": True}
        return markdown
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]

    def lead(text: str, folder: str) -> str:
        """The text with links from `folder` of the repository as links from this page."""

        def target(link):
            path = posixpath.normpath(posixpath.join(folder, link[1]))
            path = path.removeprefix("docs/") + (".md" if path.endswith(".csv") else "")
            return "](" + posixpath.relpath(path, posixpath.dirname(place) or ".")

        return LINK.sub(target, text)

    parts = SHARED.split(markdown)  # text, anchor, text, ...
    folder = posixpath.dirname(place) if place in OUTSIDE else "docs"
    parts[::2] = [lead(text, folder) for text in parts[::2]]
    parts[1::2] = [lead(section(anchor), "") for anchor in parts[1::2]]
    return "".join(parts)


def section(anchor: str) -> str:
    """The README's text below the heading with this anchor, up to the next heading."""
    found, inside, fenced = [], False, False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            inside = line.strip("# ").lower().replace(" ", "-") == anchor
        elif inside:
            found.append(line)
    if not found:
        raise ValueError(f"README.md has no section for #{anchor}")
    return "\n".join(found).strip()


def table(path: Path) -> str:
    """A CSV as a page: a link to it, what all rows have in common, and a table of the rest."""
    with path.open(encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    columns = list(zip(head, *rows, strict=True))
    same = [column for column in columns if len(rows) > 1 and len(set(column[1:])) == 1]
    lines = zip(*(column for column in columns if column not in same), strict=True)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
    first, *rest = (f"<tr>{line}</tr>" for line in cells)
    return "\n".join(
        [
            f"# {path.relative_to(ROOT / 'benchmarks/results').as_posix()}\n",
            f"[The file]({path.name}), {len(rows):,} rows. Each has:\n",
            *(f"- {name}: {value}" for name, value, *_ in same),
            f"\n<div class=csv><table><thead>{first.replace('td>', 'th>')}</thead>",
            f"<tbody>{''.join(rest)}</tbody></table></div>",
        ]
    )


class Roles(griffe.Extension):
    """`:func:` and `:class:` of a docstring become links, and pages that it names."""

    def on_instance(self, *, obj, **_):
        def link(role):
            path = f"gatednorm.{role[1]}" if role[1] in PUBLIC else f"{obj.module.path}.{role[1]}"
            return f"[`{role[1]}`][{path}]"

        if obj.docstring:
            text = re.sub(r":\w+:`(?:gatednorm\.)?(\w+)`", link, obj.docstring.value)
            obj.docstring.value = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)

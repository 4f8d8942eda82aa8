"""What of the repository is in the site, and where: pages of docs/ at their place, everything else under repository/.

Files that pages link to become pages that show them; folders show their README or their files, one after the other.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
OUTSIDE: Final = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
FOLDERS: Final = ("examples", "benchmarks", "k8s", "tests")
"""Their READMEs are pages."""
FENCE: Final = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"(\[[^\]]*\]\()([^)\s]+)(\))")
LANGUAGES: Final = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".proto": "protobuf",
    ".json": "json",
    ".md": "text",
}
PICTURES: Final = (".png", ".svg")


def pages() -> Iterator[Path]:
    """Pages of the site that are files of the repository."""
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from (ROOT / name for name in OUTSIDE if name.endswith(".md"))
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("README.md"))


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to what is no fenced block."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def is_relative(target: str) -> bool:
    return not re.match(r"[a-z]+:|#", target)


def links(page: Path) -> Iterator[Path]:
    """Files and folders of the repository that a page links to."""
    for _, target, _ in LINK.findall(FENCE.sub("", page.read_text())):
        if is_relative(target):
            yield Path(os.path.normpath(page.parent / target.partition("#")[0]))


def shown_files() -> Iterator[Path]:
    """Pages, and all that can be reached from them."""
    found: set[Path] = set()
    waiting = list(pages())
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():  # else mkdocs names the page and the link
            found.add(path)
            waiting += links(path) if path.suffix == ".md" else []
    yield from sorted(found)


def place(path: Path) -> str:
    """Name of a file of the repository in the site's sources, `reference/x.md` or `repository/examples/y.md`."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/") and not path.is_dir():
        return name.removeprefix("docs/")
    if path.is_dir():
        has_page = (path / "README.md").is_file()
        return place(path / "README.md") if has_page else f"repository/{name}.md"
    return f"repository/{name}" if path.suffix in (".md", *PICTURES) else f"repository/{name}.md"


def relative(markdown: str, page: Path) -> str:
    """A page's text with its links as they are in the site."""
    here = posixpath.dirname(place(page))

    def moved(match: re.Match[str]) -> str:
        start, target, end = match.groups()
        if not is_relative(target):
            return match[0]
        path, mark, anchor = target.partition("#")
        to = place(Path(os.path.normpath(page.parent / path)))
        return f"{start}{posixpath.relpath(to, here)}{mark}{anchor}{end}"

    return outside_fences(markdown, lambda text: LINK.sub(moved, text))


def shown(path: Path) -> str:
    """A page that shows a file, or the files of a folder; not searched."""
    name = path.relative_to(ROOT).as_posix()
    files = sorted(file for file in path.iterdir() if file.suffix in LANGUAGES) if path.is_dir() else [path]
    parts = [f"---\ntitle: {path.name}\nsearch: {{exclude: true}}\n---\n\n# `{name}`"]
    for file in files:
        parts += [f"## `{file.name}`"] if path.is_dir() else []
        parts += [f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n````"]
    return "\n\n".join(parts) + "\n"

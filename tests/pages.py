"""Command blocks of the pages, and their marks: what runs each, or why nothing does.

<!-- run: tests/e2e/test_cli.py -->           a test file, `::name` of a test, words in brackets about how
<!-- not run here: it takes ten minutes -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDERS: Final = ("docs", "examples", "k8s", "benchmarks", "tests")
PAGES: Final = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
LANGUAGES: Final = ("sh", "bash", "shell", "console")
BLOCK: Final = re.compile(
    r"(?:^ *<!-- (?P<kind>run|not run here): (?P<what>[^>]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of commands. `kind` is "run", "not run here" or, without a mark, ""."""

    page: str
    line: int
    text: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def test(self) -> str:
        """What runs it, without the words about how: `tests/e2e/test_cli.py` or `tests/x.py::test_y`."""
        return self.what.split(" (")[0]


def blocks(page: Path) -> Iterator[Block]:
    """The command blocks of a page."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        if found["language"] in LANGUAGES:
            line = text.count("\n", 0, found.start()) + 1
            what = " ".join((found["what"] or "").split())
            yield Block(str(page.relative_to(ROOT)), line, found["text"], found["kind"] or "", what)


def run_by(test: str) -> list[Block]:
    """Blocks that name a test file, by page and line: for the test to run."""
    return [block for page in PAGES for block in blocks(page) if block.test.partition("::")[0] == test]


def commands(text: str) -> Iterator[str]:
    """Commands of a block, without comments; a line that ends in a backslash goes on in the next."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s+)#.*$", "", line).strip().removeprefix("$ ")
        if command:
            yield command

"""docs/runbook.md as tests read it: for each failure the words that users see, where, and the commands of its cure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "runbook.md"


@dataclass(frozen=True, slots=True)
class Failure:
    """A section."""

    symptoms: list[tuple[str, str]]
    """(command or file to look with, words; `...` = anything)."""
    cure: list[str]
    """Commands, in order."""

    def words(self, where: str) -> list[str]:
        """What is seen with a command."""
        found = [words for look, words in self.symptoms if look == where]
        assert found, f"the page has no '{where}' among {self.symptoms}"
        return found


@cache
def failures() -> dict[str, Failure]:
    """Anchor -> section."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        rows = re.findall(r"^\| (.+?) \| `(.+)` \|$", text, flags=re.MULTILINE)
        symptoms = [(look.replace("`", ""), words.replace("\\|", "|")) for look, words in rows]
        blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
        found[title.lower().replace(" ", "-")] = Failure(symptoms, lines)
    return found


def says(text: str, words: str) -> bool:
    """Whether a text has the words; blanks of any kind and number are equal, and so are tables and lines."""
    flat = re.sub(r"\s+", " ", text)
    pattern = ".*?".join(re.escape(re.sub(r"\s+", " ", part)) for part in re.split(r" ?\.\.\. ?", words))
    return re.search(pattern, flat) is not None

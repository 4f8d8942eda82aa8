"""docs/cli.md names every command, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from stillhouse.cli.docs import commands

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_has_every_command_and_no_other() -> None:
    described = set(re.findall(r"^\| `stillhouse ([a-z -]+?)(?: [A-Z\[].*?)?` \|", PAGE.read_text(), re.MULTILINE))
    there = {name.removesuffix(" ls") for name in commands()}
    assert described == there

"""Every command of a page is run by a test that it names, or says why not; and `stillhouse` knows what is called."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from stillhouse.cli.main import app
from tests import pages
from tests.pages import ROOT, Block

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]


def complaint(block: Block, root: Path = ROOT) -> str:
    """What is wrong with the mark of a block, or nothing."""
    if not block.kind:
        return "has neither <!-- run: TEST --> nor <!-- not run here: REASON --> above it"
    if block.kind == "not run here":
        return "" if len(block.what) >= 12 else f"gives no reason but {block.what!r}"
    file, _, name = block.test.partition("::")
    path = root / file
    if not path.is_file():
        return f"names {file}, which does not exist"
    source = path.read_text()
    if name and not re.search(rf"^\s*(async )?def {re.escape(name)}\b", source, re.MULTILINE):
        return f"names {name}, which is not in {file}"
    named = block.page if block.page.endswith("README.md") else block.page.rpartition("/")[2]
    reads = named in source or re.search(r"\brun_by\(", source)
    return "" if reads else f"names {file}, which does not read {named}"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_command_block_says_what_runs_it(block: Block) -> None:
    assert complaint(block) == "", f"{block} {complaint(block)}"


@pytest.mark.parametrize(
    ("kind", "what", "expected"),
    [
        ("", "", "has neither"),
        ("not run here", "slow", "no reason"),
        ("run", "tests/unit/test_gone.py", "does not exist"),
        ("run", "tests/unit/test_here.py::test_gone", "not in"),
        ("run", "tests/unit/test_here.py::test_it", "does not read"),
    ],
)
def test_wrong_marks_are_found(tmp_path: Path, kind: str, what: str, expected: str) -> None:
    (tmp_path / "tests/unit").mkdir(parents=True)
    (tmp_path / "tests/unit/test_here.py").write_text('def test_it():\n    read("docs/jobs.md")\n')
    assert expected in complaint(Block("docs/cli.md", 1, "", kind, what), tmp_path)
    assert complaint(Block("docs/jobs.md", 1, "", "run", "tests/unit/test_here.py::test_it (short)"), tmp_path) == ""


def test_blocks_are_found() -> None:
    page = ROOT / "docs" / "compose.md"
    assert all(block.test == "tests/compose/test_stack.py" for block in pages.blocks(page))
    assert len(list(pages.blocks(page))) >= 5
    assert {"README.md", "docs/cli.md", "examples/gkd/README.md"} <= {block.page for block in BLOCKS}


def calls(text: str) -> Iterator[list[str]]:
    """Arguments of each call of `stillhouse` in a block."""
    for command in pages.commands(text):
        for part in re.split(r"&&|\|\||[|;]", command):
            words = shlex.split(re.sub(r"\$\(.*?\)|[<>]+ ?\S+", "x", part)) if "stillhouse" in part else []
            if "stillhouse" in words:
                yield words[words.index("stillhouse") + 1 :]


def unknown(arguments: list[str]) -> str:
    """The command or option of a call that `stillhouse` does not have, or nothing."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if not arguments or arguments[0].startswith("-"):
            break
        if arguments[0] not in command.commands:
            return arguments[0]
        command, arguments = command.commands[arguments[0]], arguments[1:]
    options = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    given = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
    return next((word for word in given if word not in options), "")


@pytest.mark.parametrize("block", [block for block in BLOCKS if "stillhouse " in block.text], ids=str)
def test_the_command_line_knows_what_pages_call(block: Block) -> None:
    assert [unknown(arguments) for arguments in calls(block.text) if unknown(arguments)] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("stillhouse gone", "gone"),
        ("true && stillhouse submit job.yaml --wach", "--wach"),
        ("stillhouse models gone x", "gone"),
        ("stillhouse submit job.yaml --watch # --wach", ""),
    ],
)
def test_wrong_calls_are_found(text: str, word: str) -> None:
    assert [unknown(arguments) for arguments in calls(text)] == [word]

"""The documentation site builds without a warning (links, anchors, navigation), and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(240)  # six seconds of computation; a busy machine may need many times that


def build(out: Path, *, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(config), "-d", str(out)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    made = build(out)
    assert made.returncode == 0, made.stderr
    return out


class Loads(HTMLParser):
    """What a browser fetches for a page without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in {"canonical", "next", "prev"}:
            self.urls.append(given.get("href") or "")
        elif tag in {"script", "img", "iframe", "source"}:
            self.urls.append(given.get("src") or "")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text())
        assert [url for url in loads.urls if re.match(r"(\w+:)?//", url)] == [], page.name
    assert not re.search(r"@import|url\(['\"]?https?:", "".join(file.read_text() for file in site.rglob("*.css")))


def test_every_page_of_the_repository_is_there(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").glob("*.md")]
    assert [str(page) for page in pages if not (site / page).is_file()] == []
    assert (site / "repository/examples/gkd/index.html").is_file()


def test_the_references_are_made_from_the_code(site: Path) -> None:
    rest = (site / "reference/rest/jobs.html").read_text()
    assert "POST /v1/jobs/{job_id}/retry" in rest
    assert "schemas.html#jobspec" in rest
    python = (site / "reference/python.html").read_text()
    assert "stream_events" in python
    assert "RateLimitError" in python


def test_marks_can_be_read(site: Path) -> None:
    assert "Run by <code>tests/compose/test_stack.py</code>" in (site / "compose.html").read_text()


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """The negative control: the same settings on two pages."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A\n\n[to b](b.md#gone) [to c](c.md)\n")
    (tmp_path / "docs/b.md").write_text("# B\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = settings[settings.index("\nvalidation:") : settings.index("\nnot_in_nav:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nstrict: true\n{validation}")
    made = build(tmp_path / "out", config=tmp_path / "mkdocs.yml")
    assert made.returncode == 1
    assert "'b.md#gone'" in made.stderr
    assert "'c.md'" in made.stderr

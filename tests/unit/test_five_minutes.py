"""The figures of docs/opd-in-five-minutes.md are drawn anew, and its numbers are those of the examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.examples import EXAMPLES, neighbours

FOLDER = EXAMPLES / "five_minutes"
PAGE = EXAMPLES.parent / "docs" / "opd-in-five-minutes.md"
pytestmark = pytest.mark.timeout(120)  # seconds of computation; a busy machine may need many times that


@pytest.fixture(scope="module")
def figures() -> Iterator[Any]:
    with neighbours(FOLDER, ["figures"]) as modules:
        yield modules["figures"]


def test_every_figure_is_drawn_and_shown(figures: Any, tmp_path: Path) -> None:
    drawn = {path.name: path.read_text() for path in figures.draw(tmp_path)}
    assert set(drawn) == {path.name for path in figures.OUT.glob("*.svg")}
    for name, text in drawn.items():
        assert f"(figures/{name})" in PAGE.read_text()
        # paths may differ in the last digit between versions of matplotlib; what is drawn does not
        committed = (figures.OUT / name).read_text()
        assert re.sub(r"[\d.]+", "0", text) == re.sub(r"[\d.]+", "0", committed), f"{name}: run figures.py"
    assert all(len(text) < 200_000 for text in drawn.values())


def test_the_numbers_of_the_page_are_those_of_the_examples(figures: Any) -> None:
    page = PAGE.read_text()
    for example, key in (("thinking_machines", "accuracy"), ("qwen3", "reverse_kl")):
        _, values = figures.curve(example)[key]
        assert f"{values[0]:.2f}" in page
        assert f"{values[-1]:.2f}" in page


def test_the_stage_of_the_figure_is_that_of_the_job(figures: Any) -> None:
    job = yaml.safe_load((EXAMPLES / "qwen3" / "job.yaml").read_text())
    assert job["stages"][0]["schedule"]["steps"] == figures.STAGE_END

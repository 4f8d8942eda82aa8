"""The examples of docs/client.md and of the documentation of the client's methods, with toy models."""

from __future__ import annotations

import asyncio
import doctest
import io
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import structlog

import stillhouse
from stillhouse.core.keys import create_key
from tests.cluster import cluster
from tests.serving import serving

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("aio", "catalog", "checkpoints", "client", "errors", "files", "history", "jobs")
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def quiet_services() -> Iterator[None]:
    """The services in this process must not log into what the examples print."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    yield
    structlog.configure(**before)


@pytest.fixture
async def deployment(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, quiet_services: None
) -> AsyncIterator[Path]:
    """The environment of a user; gives the folder that they work in."""
    async with cluster(tmp_path / "home", redis_url, "sampler", "teacher", "trainer") as made:
        made.add_model("student", seed=1)
        made.add_model("teacher", seed=2)
        made.settings.artifacts_dir().mkdir(exist_ok=True)
        key = create_key(made.settings.keys_path(), "reader")
        async with serving(made.ctx) as url:
            monkeypatch.setenv("STILLHOUSE_URL", url)
            monkeypatch.setenv("STILLHOUSE_API_KEY", key)
            monkeypatch.chdir(tmp_path)
            yield tmp_path


async def test_the_examples_run(deployment: Path) -> None:
    names = await asyncio.to_thread(_page)
    assert {path.name for path in deployment.iterdir()} >= {"prompts.jsonl", "student-v2"}
    if complaints := await asyncio.to_thread(_docstrings, names):
        pytest.fail(complaints)


def _page() -> dict[str, Any]:
    """Run the page from top to bottom; gives what it has named."""
    names: dict[str, Any] = {}
    page = ROOT / "docs" / "client.md"
    text = page.read_text()
    with redirect_stdout(io.StringIO()) as shown:
        for block in FENCE.finditer(text):
            line = text[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
    assert "succeeded" in shown.getvalue(), shown.getvalue()
    return names


def _docstrings(names: dict[str, Any]) -> str:
    """Run the examples of the methods with a finished job; gives what went wrong."""
    given = {name: names[name] for name in ("client", "job", "spec")}
    given |= {name: getattr(stillhouse, name) for name in stillhouse.__all__}
    runner, out, number = doctest.DocTestRunner(), io.StringIO(), 0
    for name in MODULES:
        module = import_module(f"stillhouse.client.{name}")
        for test in doctest.DocTestFinder().find(module, extraglobs=given):
            if test.examples and "blocking" not in test.name:
                number += 1
                runner.run(test, out=out.write)
    assert number > 10, "the examples were not found"
    return out.getvalue()

"""The examples of the recipes, shortened, over REST: examples with the same settings share a deployment."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.oracle.verify import verify_job
from tests.examples import EXAMPLES, neighbours
from tests.pages import run_by

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
NAMES = sorted(
    name
    for block in run_by("tests/e2e/test_recipes.py")
    for name in re.findall(r"^make example NAME=(\w+)", block.text, re.MULTILINE)
)
"""Examples whose page says that this file runs its command; `make` would only install before."""


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """The module examples/run.py."""
    with neighbours(EXAMPLES, ["run"]) as modules:
        yield modules["run"]


class Deployments:
    """One for each set of settings, and the models of all examples, made once."""

    def __init__(self, run: Any, folder: Path, stack: ExitStack) -> None:
        self.run = run
        self.folder = folder
        self.models = folder / "models"
        self.models.mkdir()
        self._stack = stack
        self._homes: dict[str, Path] = {}

    def home(self, settings: dict[str, Any]) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._homes:
            home = self.folder / f"home-{len(self._homes)}"
            self._stack.enter_context(self.run.deployment(home, settings))
            self._homes[key] = home
        return self._homes[key]


@pytest.fixture(scope="module")
def deployments(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployments]:
    with ExitStack() as stack:
        yield Deployments(run, tmp_path_factory.mktemp("recipes"), stack)


def test_every_example_is_run() -> None:
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/prepare.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_example_keeps_what_it_promises(deployments: Deployments, name: str, tmp_path: Path) -> None:
    run, models = deployments.run, deployments.models
    example = run.Example.load(name)
    example.prepare.prepare(models, short=True)
    home = deployments.home(example.settings(models))
    results = run.run(example, home, models, tmp_path, short=True)
    assert results["complaints"] == []
    for one in results["jobs"]:
        kls = [round(point["reverse_kl"], 3) for point in one["evaluations"]]
        print(f"{name}/{one['file']}: held-out reverse KL {kls}, {one['accuracy']}")
        report = verify_job(JobArtifacts(home / "artifacts" / "jobs" / one["job"]["id"]), None)
        assert (report.violations, report.damage) == ([], [])

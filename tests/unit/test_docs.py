"""The documents say what is there: links, the tree in the README, every job in examples and pages, the made tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stillhouse.cli import jobfile
from stillhouse.core.config import Settings
from stillhouse.core.spec import JobSpec, StageSpec
from tests.pages import PAGES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted([*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yml")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAGE: dict[str, Any] = {
    "data": {"rows": [{"prompt": "p"}]},
    "loss": {"objective": "policy_gradient"},
    "schedule": {"steps": 1},
}
JOB: dict[str, Any] = {"student": {"model": "s"}, "teachers": {"t": {"model": "m"}}, "stages": [STAGE]}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Fenced blocks of a page."""
    return (text for language, text in FENCE.findall(page.read_text()) if language in languages)


def with_files(document: Any) -> Any:
    """A job with `data.path` as the command line would send it; the files of a page do not exist."""
    if isinstance(document, dict):
        renamed = {("file" if key == "path" else key): with_files(value) for key, value in document.items()}
        return renamed | ({"file": jobfile.PLACEHOLDER} if "path" in document else {})
    return [with_files(item) for item in document] if isinstance(document, list) else document


def check_snippet(document: Any) -> str:
    """Parse a whole job, or a part of a job, a stage or a config.yaml; returns which it was."""
    assert isinstance(document, dict), f"neither a job nor a part of one: {document!r}"
    document = with_files(document)
    if document.keys() >= JOB.keys():
        JobSpec.model_validate(document)
        return "job"
    if document.keys() <= Settings.model_fields.keys():
        Settings.model_validate(document)
        return "settings"
    if document.keys() <= StageSpec.model_fields.keys():
        base = {"data": STAGE["data"]} if "recipe" in document else STAGE
        JobSpec.model_validate(JOB | {"stages": [base | document]})
        return "stage"
    JobSpec.model_validate(JOB | document)
    return "part of a job"


def slug(heading: str) -> str:
    """Anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_jobs_parse_and_their_files_exist(path: Path) -> None:
    jobfile.load(path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_and_json_of_pages_parse(page: Path) -> None:
    for text in blocks(page, "yaml", "json"):
        check_snippet(yaml.safe_load(text))


def test_pages_and_examples_are_found() -> None:
    assert {"README.md", "docs/architecture.md", "docs/adr/README.md"} <= {name(page) for page in PAGES}
    assert "examples/quickstart/job.yaml" in {name(path) for path in EXAMPLES}
    kinds = [check_snippet(yaml.safe_load(text)) for page in PAGES for text in blocks(page, "yaml", "json")]
    assert {"job", "stage", "settings"} <= set(kinds)


@pytest.mark.parametrize(
    "text",
    [
        "student: {model: a}\nteachers: {}\nstages: []",
        "loss: {objective: kl}",
        "schedule: {step: 1}",
        "lease_s: -1",
        "stage: {}",
        json.dumps(JOB | {"sead": 1}),
    ],
)
def test_wrong_snippets_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        check_snippet(yaml.safe_load(text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{name(page)} links to {target}"


def tree_paths() -> list[str]:
    """Paths that the README's tree names: two spaces of indentation per level, then a comment."""
    section = (ROOT / "README.md").read_text().split("\n## The tree\n")[1]
    found = FENCE.search(section)
    assert found is not None
    paths: list[str] = []
    parents: list[str] = []
    for line in found[2].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        paths.append("/".join(parents))
    return paths


def test_the_tree_of_the_readme_exists() -> None:
    paths = tree_paths()
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_service_and_every_kind_of_test_is_in_the_tree() -> None:
    folders = [*(ROOT / "services/stillhouse").iterdir(), *(ROOT / "tests").iterdir()]
    expected = {name(path) for path in folders if path.is_dir() and not path.name.startswith("__")}
    assert expected <= set(tree_paths())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_no_machine(page: Path) -> None:
    text = page.read_text().replace("/var/lib/stillhouse", "")  # inside our images
    found = re.findall(r"(?<![\w.~])/(?:home|root|work|Users|tmp|mnt|opt|var)/\S*", text)
    assert found == []


@pytest.mark.parametrize("script", ["spec-docs", "client-docs", "openapi", "sizing"])
def test_made_documents_are_current(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr

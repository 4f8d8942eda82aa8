"""The package of docs/verifiers.md, installed by pip and used by command, judges and list."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.trainer.verify.judges import Item, Judges, Verdict
from tests import acme

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verifiers.md"
POEM = "a b c d e\na b c d e f g\na b c d e"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which pip has installed the package of the page, without a network."""
    root = tmp_path_factory.mktemp("haiku")
    files = re.findall(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["pyproject.toml", "acme_haiku.py"]
    for name, text in files:
        (root / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation", "--target", str(root / "site"), str(root)]
    subprocess.run(pip, check=True, capture_output=True, timeout=60)
    return root / "site"


def stillhouse(installed: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": acme.path_with(installed), "COLUMNS": "200"}
    argv = [sys.executable, "-m", "stillhouse.cli.main", "verifiers", *arguments]
    return subprocess.run(argv, env=env, input=text, capture_output=True, text=True, timeout=60)


async def test_judges_find_it_by_its_entry_point(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", acme.path_with(installed))
    judges = Judges(timeout_s=30, workers=1)
    try:
        verdicts = await judges.judge([Item("haiku", POEM), Item("haiku", "one line"), Item("haiku", POEM + " f")])
    finally:
        await judges.close()
    assert verdicts[:2] == [Verdict(1.0, "3 lines are right"), Verdict(0.0, "1 lines instead of 3")]
    assert verdicts[2].reward == pytest.approx(2 / 3)


def test_the_command_lists_and_tries_it(installed: Path) -> None:
    listed = json.loads(stillhouse(installed, "--json").stdout)
    assert [info["name"] for info in listed][-1] == "haiku"
    assert (listed[-1]["source"], listed[-1]["status"]) == ("acme-haiku 1.0", "ok")
    assert "acme-haiku 1.0" in stillhouse(installed).stdout
    tried = stillhouse(installed, "try", "haiku", "--text", "one line")
    assert (tried.stdout, tried.returncode) == ("reward 0: 1 lines instead of 3\n", 0)
    tried = stillhouse(installed, "try", "haiku", "--text", "-", "--json", text=POEM)
    assert json.loads(tried.stdout) == {"reward": 1.0, "note": "3 lines are right", "failure": ""}


def test_the_command_gives_a_verifier_the_row(tmp_path: Path) -> None:
    acme.install(tmp_path)
    tried = stillhouse(tmp_path, "try", "acme", "--text", "answer", "--row", '{"prompt": "1 + 1"}')
    assert tried.stdout == "reward 1: None {'prompt': '1 + 1'}\n"


def test_the_command_says_when_there_is_no_verdict(tmp_path: Path) -> None:
    acme.install(tmp_path)
    late = stillhouse(tmp_path, "try", "acme", "--text", "hang", "--timeout-s", "0.5")
    assert (late.stdout, late.returncode) == ("reward 0: no verdict within 0.5 s\n", 1)
    odd = stillhouse(tmp_path, "try", "acme", "--text", "answer", "--row", "[1]")
    assert odd.returncode == 2
    assert "--row is a JSON list, not an object" in odd.stderr
    broken = stillhouse(tmp_path, "try", "acme-broken", "--text", "x")
    assert broken.returncode == 1
    assert "error: verifier 'acme-broken' cannot be loaded: AttributeError" in broken.stderr

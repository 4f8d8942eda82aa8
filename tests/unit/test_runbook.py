"""The parts of docs/runbook.md that need no deployment; the others: tests/e2e/test_runbook.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError, CorruptError
from stillhouse.trainer import journal
from tests.conftest import ROOT
from tests.runbook import PAGE, failures, says


def test_every_failure_says_what_is_seen_done_lost_and_prevented() -> None:
    kinds = set(failures()) - {"first-look", "how-this-page-is-tested"}
    assert len(kinds) >= 10
    for name in kinds:
        assert failures()[name].symptoms, name
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[2:-1]:
        for word in ("**Not this**", "**Cure**", "**Lost**", "**Prevention**"):
            assert word in part, f"{part.splitlines()[0]}: {word}"


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"tests/[a-z0-9_/]+\.py", PAGE.read_text()))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_reason_of_the_watch_is_on_the_page() -> None:
    source = (ROOT / "services/stillhouse/trainer/watch.py").read_text().partition('"""')[2].partition('"""')[0]
    reasons = set(re.findall(r"^    ([a-z]+_[a-z]+)  ", source, flags=re.MULTILINE))
    assert len(reasons) >= 7
    assert {reason for reason in reasons if f"`{reason}`" not in PAGE.read_text()} == set()


@pytest.mark.parametrize(
    ("text", "words", "is_there"),
    [("a  b\n c", "a b c", True), ("a x c", "a ... c", True), ("c a", "a ... c", False), ("abc", "a.c", False)],
)
def test_words_are_found_across_blanks_and_gaps(text: str, words: str, is_there: bool) -> None:
    assert says(text, words) is is_there


def test_a_journal_of_a_newer_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.journal"
    header = journal.journal_pb2.StepHeader(schema_version=2).SerializeToString()
    monkeypatch.setattr(journal, "_records", lambda _: [header])
    with pytest.raises(CorruptError) as caught:
        journal.read_step(path)
    assert says(caught.value.message, failures()["mixed-versions"].words("a trainer's log")[0])


def test_a_service_without_the_internal_token() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings().check_internal_token()
    assert says(caught.value.message, failures()["internal-token"].words("a service's log")[0])

"""The oracle: honest artifacts pass, each seeded bug and each damaged byte is found, and it changes nothing."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, sealed, unsealed, write_json
from stillhouse.core.errors import NotFoundError
from stillhouse.core.oracle.report import RULES
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.tensors import floats_tensor, ids_tensor
from stillhouse.trainer import manifests
from stillhouse.v1 import rollout_pb2
from tests.chaos.bugs import BUGS
from tests.unit.oracle_cases import CASES, COMMIT_EVERY, STEPS, Job, finished, job_of

SEED = 20261123


# -- honest jobs -----------------------------------------------------------------------------------------------------


def test_an_honest_job_breaks_no_rule(tmp_path: Path) -> None:
    job = finished(tmp_path)
    for record in (None, job.record):
        report = verify_job(job.artifacts, record)
        assert report.ok, report.text()
        assert not report.damage
    assert report.status == "succeeded"
    assert report.epoch == 2
    counts = report.counts
    assert (counts["steps"], counts["samples_trained"], counts["samples_failed"]) == (STEPS, STEPS * 4 - 1, 1)
    assert counts["manifests"] == counts["ledgers"] == STEPS // COMMIT_EVERY
    assert counts["tensors_compared"] == 1


@pytest.mark.parametrize("stage_steps", [(STEPS,), (4, 2), (1, 4, 1)], ids=str)
def test_an_honest_job_is_right_at_every_moment(tmp_path: Path, stage_steps: tuple[int, ...]) -> None:
    job = Job(tmp_path, stage_steps=stage_steps)
    assert verify_job(job.artifacts, job.record).ok
    job.open()
    for step in range(STEPS):
        assert verify_job(job.artifacts, job.record).ok
        job.journal(step)
        report = verify_job(job.artifacts, job.record)
        assert report.ok, report.text()
        job.run(step + 1)
        report = verify_job(job.artifacts, job.record)
        assert report.ok, report.text()
    job.finish("cancelled")
    assert verify_job(job.artifacts, job.record).ok


@pytest.mark.parametrize("seed", range(60))
def test_no_honest_history_is_accused(tmp_path: Path, seed: int) -> None:
    """Crashes, takeovers, zombies that go on writing, claims that died at once, damaged files, retention."""
    draw = random.Random(SEED + seed)
    job = Job(tmp_path)
    job.open()
    while job.step < STEPS:
        job.run(min(job.step + draw.randint(0, 3), STEPS))
        if job.step == STEPS or draw.random() < 0.3:
            continue
        _trouble(job, draw)
        live = verify_job(job.artifacts, job.record)
        assert not live.broken_rules() - {"journal", "checkpoint"}, live.text()
    job.finish()
    report = verify_job(job.artifacts, job.record)
    assert report.ok, report.text()


def _trouble(job: Job, draw: random.Random) -> None:
    """A takeover, perhaps with a zombie left behind or a file damaged before."""
    kind = draw.choice(("clean", "zombie", "died at once", "journal damaged", "weights damaged"))
    old = (job.epoch, job.step, job.ledger, job.last)
    epoch = job.epoch + 1
    if kind == "died at once":
        job.artifacts.epoch(epoch).mkdir()
        epoch += 1
    if kind == "journal damaged":
        own = sorted((job.artifacts.epoch(job.epoch) / "steps").glob("*.journal"))
        # only of a step that no checkpoint covers: the others are needed to prove the chain
        if own and int(own[-1].stem) >= (job.last.step if job.last else 0):
            own[-1].write_bytes(own[-1].read_bytes()[:-3])
    if kind == "weights damaged" and job.last is not None and job.last.epoch == job.epoch:
        (job.last.folder(job.artifacts) / "model.safetensors").write_bytes(b"")
    job.open(epoch)
    if kind == "zombie" and old[1] < STEPS:
        now, record = (job.epoch, job.step, job.ledger, job.last), job.record
        job.epoch, job.step, job.ledger, job.last = old
        job.journal(job.step)
        if draw.random() < 0.5:
            job.train(job.step, job.scores(job.step))
            job.commit(is_zombie=True)
        (job.epoch, job.step, job.ledger, job.last), job.record = now, record


def test_a_stalled_job_goes_back_to_what_it_did(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.open()
    job.event("job.status", status="stalled", epoch=1, reason="no_teacher")
    job.event("job.status", status="running", epoch=1)
    report = verify_job(job.artifacts, job.record)
    assert report.ok, report.text()


def test_a_deterministic_job_takes_exactly_one_version(tmp_path: Path) -> None:
    job = Job(tmp_path, deterministic=True)
    job.open()
    job.run(3)
    assert verify_job(job.artifacts).ok
    job.journal(3, job.scores(3, version=3))
    assert verify_job(job.artifacts).broken_rules() == {"staleness"}


def test_weights_may_be_replaced_while_a_completion_is_written(tmp_path: Path) -> None:
    """Stale is a sample by the weights that began it; newer ones may go on, up to those it is trained on."""
    job = Job(tmp_path)
    job.open()
    job.run(3)
    scores = job.scores(3, version=2)
    long = [score.rollout for score in scores if score.rollout.completion_ids.shape[0] > 1]
    assert long
    for rollout in long:
        rollout.spans.add(first_token=1, policy_version=3, epoch=1)
        rollout.weights_sha256 = "1-3"
    job.journal(3, scores)
    report = verify_job(job.artifacts, job.record)
    assert report.ok, report.text()


def test_it_changes_nothing_and_says_the_same_twice(tmp_path: Path) -> None:
    job = finished(tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    first = verify_job(job.artifacts, job.record).as_json()
    assert verify_job(job.artifacts, job.record).as_json() == first
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_a_job_that_never_was_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"job\.json"):
        verify_job(JobArtifacts(tmp_path / "jobs" / "job_x"))


# -- the seeded bugs -------------------------------------------------------------------------------------------------


def test_every_bug_has_a_case() -> None:
    assert CASES.keys() == BUGS.keys()
    assert len(BUGS) >= 12
    assert all(rules <= RULES.keys() for _, rules in CASES.values())


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_found(tmp_path: Path, name: str) -> None:
    plant, rules = CASES[name]
    job = job_of(tmp_path, name)
    job.open()
    plant(job)
    for record in (None, job.record):
        found = verify_job(job.artifacts, record)
        assert rules <= found.broken_rules(), found.text()
        assert all(finding.message for finding in found.violations)


# -- every rule ------------------------------------------------------------------------------------------------------


def _change_score(change: Callable[[rollout_pb2.Score], Any]) -> Callable[[Job], None]:
    """One altered sample in the journal of step 2."""

    def apply(job: Job) -> None:
        scores = job.scores(2)
        change(scores[1])
        job.journal(2, scores)

    return apply


def _spans(*spans: tuple[int, int, int]) -> Callable[[rollout_pb2.Score], None]:
    def change(score: rollout_pb2.Score) -> None:
        del score.rollout.spans[:]
        for first, version, epoch in spans:
            score.rollout.spans.add(first_token=first, policy_version=version, epoch=epoch)

    return change


def _logprobs(value: float) -> Callable[[rollout_pb2.Score], None]:
    def change(score: rollout_pb2.Score) -> None:
        number = score.rollout.completion_ids.shape[0]
        score.sampled.teacher_logprobs.CopyFrom(floats_tensor([value] * number))

    return change


def _two_of_one_step(job: Job) -> None:
    assert job.last is not None
    folder = job.last.folder(job.artifacts)
    other = folder.with_name("tmp")
    shutil.copytree(folder, other)
    document = (other / "manifest.json").read_text().replace('"threads": 1', '"threads": 2')
    (other / "manifest.json").write_text(document)
    other.rename(folder.with_name(f"{folder.name[:9]}{manifests.sha256_file(other / 'manifest.json')[:8]}"))


def _other_parent(job: Job) -> None:
    job.last = None
    job.run(4)


def _another_base(job: Job) -> None:
    job.open()
    path = job.artifacts.epoch(2) / "opened.json"
    write_json(path, sealed({**unsealed(path), "replay": [[1, 2], [1, 4]]}))


EDITS: dict[str, tuple[str, Callable[[Job], Any]]] = {
    "no result": ("complete", _change_score(lambda s: s.ClearField("sampled"))),
    "other group": ("complete", _change_score(lambda s: setattr(s.rollout, "group", 1))),
    "for evaluation": ("complete", _change_score(lambda s: setattr(s.rollout, "purpose", 2))),
    "other seed": ("seed", _change_score(lambda s: setattr(s.rollout, "seed", 1))),
    "other row": ("rows", _change_score(lambda s: setattr(s.rollout, "row", (s.rollout.row + 1) % 5))),
    "other prompt": ("rows", _change_score(lambda s: s.rollout.prompt_ids.CopyFrom(ids_tensor([9, 9])))),
    "no spans": ("spans", _change_score(_spans())),
    "spans begin late": ("spans", _change_score(_spans((1, 1, 1)))),
    "spans beyond the end": ("spans", _change_score(_spans((0, 1, 1), (99, 2, 1)))),
    "versions go back": ("spans", _change_score(_spans((0, 2, 1), (1, 1, 1)))),
    "weights of an unknown epoch": ("spans", _change_score(_spans((0, 1, 9)))),
    "weights of the future": ("staleness", _change_score(_spans((0, 3, 1)))),
    "one stale span": ("staleness", _change_score(_spans((0, 0, 1), (1, 2, 1)))),
    "two weights of one name": ("weights", _change_score(lambda s: setattr(s.rollout, "weights_sha256", "other"))),
    "NaN from the teacher": ("values", _change_score(_logprobs(math.nan))),
    "+inf from the teacher": ("values", _change_score(_logprobs(math.inf))),
    "a probability above 1": ("values", _change_score(_logprobs(0.5))),
    "a length that differs": (
        "values",
        _change_score(lambda s: s.rollout.rollout_logprobs.CopyFrom(floats_tensor([-1.0] * 9))),
    ),
    "no tokens": ("values", _change_score(lambda s: s.rollout.completion_ids.CopyFrom(ids_tensor([])))),
    "too many tokens": ("values", _change_score(lambda s: s.rollout.completion_ids.CopyFrom(ids_tensor([1] * 9)))),
    "bytes that fit no shape": ("values", _change_score(lambda s: s.rollout.completion_ids.shape.append(7))),
    "aborted": ("values", _change_score(lambda s: setattr(s.rollout, "finish_reason", 3))),
    "other tokens than trained": (
        "ledger",
        lambda job: job.journal(1, [_retokened(score) for score in job.scores(1)]),
    ),
    "next_group": ("prefix", lambda job: job.journal(2, next_group=7)),
    "journal of another step": ("journal", lambda job: shutil.copyfile(_journal(job, 1), _journal(job, 2))),
    "two checkpoints of a step": ("versions", _two_of_one_step),
    "a parent that was not": ("versions", _other_parent),
    "a replay with a hole": ("lineage", _another_base),
    "ended by a closed epoch": ("final", lambda job: (job.open(), job.set(epoch=1), job.finish("cancelled"))),
    "final.json and record": (
        "final",
        lambda job: (job.finish("cancelled"), setattr(job, "record", replace(job.record, status="succeeded"))),
    ),
    "ended twice": ("status", lambda job: (job.finish("cancelled"), job.event("job.status", status="cancelled"))),
    "running after the end": (
        "status",
        lambda job: (job.finish("cancelled"), job.event("job.status", status="running", epoch=5)),
    ),
    "back to validating": ("status", lambda job: job.event("job.status", status="validating", epoch=1)),
    "starting after running": ("status", lambda job: job.event("job.status", status="starting", epoch=1)),
    "a journal of another stage": ("stage", lambda job: job.journal(2, stage=1)),
    "an unknown state": ("status", lambda job: job.event("job.status", status="happy")),
    "no export": ("success", lambda job: (job.run(STEPS), job.finish(export=False))),
    "one checkpoint left": ("retention", lambda job: (job.run(4), _take_oldest(job))),
    "no newest checkpoint": ("retention", lambda job: (job.run(4), _take_oldest(job), _take_oldest(job))),
    "a leftover folder": ("leftovers", lambda job: (_leftover(job), job.finish("cancelled"))),
    "a metric without a journal": ("trained", lambda job: job.train(4, job.scores(4))),
    "work without opened.json": ("lineage", lambda job: (job.artifacts.epoch(1) / "opened.json").unlink()),
}


def _retokened(score: rollout_pb2.Score) -> rollout_pb2.Score:
    number = score.rollout.completion_ids.shape[0]
    score.rollout.completion_ids.CopyFrom(ids_tensor([5] * number))
    return score


def _journal(job: Job, step: int) -> Path:
    return job.artifacts.journal(1, step)


def _take_oldest(job: Job) -> None:
    shutil.rmtree(manifests.list_manifests(job.artifacts)[0].folder(job.artifacts))


def _leftover(job: Job) -> None:
    (job.artifacts.manifests(1) / "tmp.00000004.abcd").mkdir()


@pytest.mark.parametrize("name", EDITS)
def test_a_broken_rule_is_named(tmp_path: Path, name: str) -> None:
    rule, edit = EDITS[name]
    job = Job(tmp_path)
    job.open()
    job.run(3)
    assert verify_job(job.artifacts, job.record).ok
    edit(job)
    report = verify_job(job.artifacts, job.record)
    assert rule in report.broken_rules(), report.text()


def test_every_rule_is_broken_by_something() -> None:
    tested = {rule for rule, _ in EDITS.values()}.union(*(rules for _, rules in CASES.values()))
    elsewhere = {"spec", "plan", "coverage", "checkpoint", "export"}  # below, and in the test of real jobs
    elsewhere |= {"origin", "kind", "reward"}  # test_oracle_offpolicy.py
    assert tested | elsewhere == set(RULES)


def test_rows_are_covered_and_planned_once(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.open()
    job.run(2)
    scores = job.scores(2)
    job.journal(2, scores, planned=["4/0", "4/1", "5/0", "4/0"])
    assert verify_job(job.artifacts).broken_rules() == {"plan"}
    for score in scores:
        score.rollout.row = job.row(0)
    job.journal(2, scores)
    assert {"rows", "coverage"} <= verify_job(job.artifacts).broken_rules()


def test_every_stage_ends_with_a_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path, stage_steps=(3, 3))
    job.open()
    job.run(2)
    for step in (2, 3):
        job.train(step, job.journal(step))
    job.commit()
    report = verify_job(job.artifacts, job.record)
    assert report.broken_rules() == {"stage"}, report.text()
    assert "the stage that ends with 3 has none" in report.text()


def test_a_stage_takes_every_row_once_a_pass_whatever_the_one_before_took(tmp_path: Path) -> None:
    """Four steps of two groups over five rows end in the middle of a pass; the next stage begins with a new one."""
    job = Job(tmp_path, stage_steps=(4, 5))
    job.open()
    job.run(9)
    report = verify_job(job.artifacts, job.record)
    assert report.ok, report.text()
    rows = [job.row(group) for group in range(8, 18)]
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]
    for step in range(4, 9):
        job.journal(step, [_row(score, rows[0]) for score in job.scores(step)])
    assert "coverage" in verify_job(job.artifacts, job.record).broken_rules()


def _row(score: rollout_pb2.Score, row: int) -> rollout_pb2.Score:
    score.rollout.row = row
    return score


def test_a_spec_that_does_not_parse(tmp_path: Path) -> None:
    job = Job(tmp_path)
    write_json(job.artifacts.job_json, sealed({"id": "job_0123456789", "spec": {"student": 1}}))
    assert verify_job(job.artifacts).broken_rules() == {"spec"}

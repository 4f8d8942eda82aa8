"""Jobs of several stages: own data, objective and schedule each; weights, steps, versions and groups go on."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.oracle.verify import verify_job
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2
from tests.cluster import Cluster, job_spec

WORDS = ("one", "two", "three", "four", "five", "six")
FIRST, SECOND = 4, 5
"""Steps of the stages."""


def off_policy(**changes: Any) -> dict[str, Any]:
    """Cross-entropy on texts of the data."""
    return {
        "name": "off-policy",
        "data": {"rows": [{"prompt": f"say {word}", "completion": word} for word in WORDS[:4]]},
        "sampling": {"max_tokens": 8},
        "on_policy_fraction": 0,
        "loss": {"objective": "cross_entropy"},
        "optimizer": {"lr": 1e-2, "decay": "linear"},
        "schedule": {"steps": FIRST, "prompts_per_step": 2},
        **changes,
    }


def on_policy(**changes: Any) -> dict[str, Any]:
    """The exact reverse KL on the student's own texts; other rows, groups and schedule."""
    return {
        "name": "on-policy",
        "data": {"rows": [{"prompt": f"tell {word}"} for word in WORDS]},
        "sampling": {"max_tokens": 6},
        "loss": {"objective": "full_vocabulary"},
        "optimizer": {"lr": 4e-3, "warmup_steps": 2},
        "schedule": {"steps": SECOND, "prompts_per_step": 3, "group_size": 2, "max_staleness": 2},
        **changes,
    }


def spec(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return job_spec(stages=list(stages) or [off_policy(), on_policy()], checkpoint={"every_steps": 3}, **changes)


def artifacts_of(deployment: Cluster, job_id: str) -> JobArtifacts:
    return deployment.ctx.artifacts.job(job_id)


async def events_of(deployment: Cluster, job_id: str, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in await deployment.ctx.jobs.events(job_id) if event["type"] == kind]


async def test_off_policy_then_on_policy(deployment: Cluster) -> None:
    """As in Qwen3. Everything of a stage is its own; what counts, counts on."""
    evaluation = {"data": {"rows": [{"prompt": "rain"}]}, "max_tokens": 6}
    job_id = await deployment.submit(spec(evaluation=evaluation))
    record = await deployment.ended(job_id)
    assert (record.status, record.step) == ("succeeded", FIRST + SECOND), record.error
    artifacts = artifacts_of(deployment, job_id)
    report = verify_job(artifacts, record)
    assert report.ok, report.text()

    steps = [read_step(artifacts.journal(1, step)) for step in range(FIRST + SECOND)]
    assert [step.header.stage for step in steps] == [0] * FIRST + [1] * SECOND
    assert [list(step.header.groups) for step in steps[FIRST - 1 : FIRST + 1]] == [[6, 7], [8, 9, 10]]
    assert [len(step.scores) for step in steps] == [2] * FIRST + [6] * SECOND
    assert {score.rollout.origin for step in steps[:FIRST] for score in step.scores} == {rollout_pb2.ORIGIN_DATA}
    for step in steps[FIRST:]:
        versions = {span.policy_version for score in step.scores for span in score.rollout.spans}
        assert min(versions) >= max(FIRST, step.header.step - 2), "nothing from before the stage"
    seen = [score.rollout.row for step in steps[FIRST : FIRST + 2] for score in step.scores[::2]]
    assert sorted(seen) == list(range(6)), "a pass over the stage's rows begins with the stage"

    rates = [*(1e-2 * left / 3 for left in (3, 2, 1, 0)), 2e-3, *[4e-3] * 4]
    assert await deployment.metric(job_id, "lr") == pytest.approx(rates)
    names = [point["stage"] for point in await deployment.ctx.jobs.metrics(job_id)]
    assert names == ["off-policy"] * FIRST + ["on-policy"] * SECOND
    assert record.progress["stage"] == "on-policy"
    assert await events_of(deployment, job_id, "stage.started") == [
        {"stage": "off-policy", "index": 0, "step": 0},
        {"stage": "on-policy", "index": 1, "step": FIRST},
    ]
    measured = sorted(int(path.stem) for path in artifacts.evaluations.glob("*.json"))
    assert measured == [0, FIRST, FIRST + SECOND]
    kept = {ref.step: manifests.verify(artifacts, ref) for ref in manifests.list_manifests(artifacts)}
    assert (kept[FIRST]["stage"], kept[FIRST]["next_group"]) == (0, 8), "a stage's end stays"
    assert kept[FIRST + SECOND]["stage"] == 1
    card = (artifacts.export(1) / "README.md").read_text()
    assert "in 2 stages; 'off-policy': fine-tuned on completions by the data; then 'on-policy'" in card

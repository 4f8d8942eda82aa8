"""Jobs of several stages: own data, objective and schedule each; weights, steps, versions and groups go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stillhouse.core import failpoints
from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue.streams import Scope
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import read_step
from stillhouse.trainer.loop import Interrupted
from stillhouse.v1 import rollout_pb2
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until

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


def halves(**optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two stages with the same settings, of a whole pass each, and the job that is both in one."""
    stage = on_policy(
        data={"rows": [{"prompt": f"tell {word}"} for word in WORDS], "shuffle": False},
        optimizer={"lr": 1e-2, **optimizer},
        schedule={"steps": 2, "prompts_per_step": 3, "max_staleness": 0},
    )
    whole = {**stage, "schedule": {**stage["schedule"], "steps": 4}}
    return spec(stage, {**stage, "name": "again"}, deterministic=True), spec(whole, deterministic=True)


async def weights_after(deployment: Cluster, job: dict[str, Any]) -> dict[str, np.ndarray]:
    record = await deployment.ended(await deployment.submit(job))
    assert record.status == "succeeded", record.error
    return load_file(artifacts_of(deployment, record.id).export(record.epoch) / "model.safetensors")


@pytest.mark.parametrize(
    "betas",
    [
        pytest.param((0.0, 0.0), id="without moments"),
        pytest.param((0.9, 0.95), id="with moments", marks=pytest.mark.full),
    ],
)
async def test_a_boundary_changes_nothing_but_the_optimizers_moments(
    deployment: Cluster, betas: tuple[float, float]
) -> None:
    """Where the optimizer remembers nothing, two stages of the same settings are one stage, to the last bit."""
    in_two, in_one = [await weights_after(deployment, job) for job in halves(betas=betas)]
    is_same = [np.array_equal(in_two[name], in_one[name]) for name in in_one]
    assert all(is_same) if betas == (0.0, 0.0) else not any(is_same)


async def test_a_stage_without_services_has_one_behind_that_needs_them(deployment: Cluster) -> None:
    """The first stage runs while neither sampler nor teacher is there; the second waits for them, and says so."""
    await deployment.stop("sampler-0")
    await deployment.stop("teacher-0")
    job_id = await deployment.submit(spec())
    await deployment.at_step(job_id, FIRST)

    async def waits() -> bool:
        return (await deployment.ctx.jobs.get(job_id)).status_reason in ("no_sampler", "no_teacher")

    await wait_until(waits, timeout_s=20, what="the job to say what it waits for")
    record = await deployment.ctx.jobs.get(job_id)
    assert (record.step, record.committed_step, record.progress["stage"]) == (FIRST, FIRST, "on-policy")
    await deployment.start("teacher", "teacher-0")
    await deployment.start("sampler", "sampler-0")
    record = await deployment.ended(job_id)
    assert (record.status, record.step, record.epoch) == ("succeeded", FIRST + SECOND, 1), record.error


async def test_samplers_are_given_back_for_a_stage_that_needs_none(deployment: Cluster) -> None:
    stages = on_policy(schedule={"steps": 1, "prompts_per_step": 3}), off_policy(schedule={"steps": 1000})
    job_id = await deployment.submit(spec(*stages))
    await deployment.at_step(job_id, 2)
    registry = deployment.ctx.registry
    await wait_until(
        lambda: registry.lease_sampler("sampler-0", Scope("job_other", 1), 60.0), timeout_s=20, what="the sampler"
    )
    await deployment.ctx.jobs.request(job_id, allowed=("running",), status="cancelling")
    assert (await deployment.ended(job_id)).status == "cancelled"


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.install(None)


def interrupt_at(point: str, visit: int, reason: str) -> Callable[[str, str], None]:
    """Asks the loop to stop at a point, once."""
    visits: list[str] = []

    def handler(name: str, detail: str) -> None:
        if name == point:
            visits.append(name)
            if len(visits) == visit:
                raise Interrupted(reason)

    return handler


@pytest.mark.parametrize(
    ("point", "visit", "step"),
    [
        pytest.param("trainer.published", 3, 2, id="first", marks=pytest.mark.full),
        pytest.param("trainer.stage_ended", 1, FIRST, id="end", marks=pytest.mark.full),
        pytest.param("trainer.stage_begun", 1, FIRST, id="begin"),
        pytest.param("trainer.published", FIRST + 3, FIRST + 2, id="second"),
    ],
)
async def test_a_claim_drains_in_every_stage_and_between(
    deployment: Cluster, point: str, visit: int, step: int
) -> None:
    """What it commits between two stages is the end of the first; the next claim goes on in the second."""
    failpoints.install(interrupt_at(point, visit, "draining"))
    record = await deployment.ended(job_id := await deployment.submit(spec()))
    assert (record.status, record.step, record.epoch) == ("succeeded", FIRST + SECOND, 2), record.error
    report = verify_job(artifacts_of(deployment, job_id), record)
    assert report.ok, report.text()
    (rewound,) = await events_of(deployment, job_id, "job.rewound")
    assert rewound["to"] == step
    started = [event["step"] for event in await events_of(deployment, job_id, "stage.started")]
    assert started == [0, FIRST], "each is told once"


async def test_a_job_is_cancelled_between_two_stages(deployment: Cluster) -> None:
    failpoints.install(interrupt_at("trainer.stage_ended", 1, "cancelled"))
    record = await deployment.ended(job_id := await deployment.submit(spec()))
    assert (record.status, record.step, record.committed_step, record.epoch) == ("cancelled", FIRST, FIRST, 1)
    report = verify_job(artifacts_of(deployment, job_id), record)
    assert report.ok, report.text()


async def test_a_job_is_cancelled_in_its_second_stage(deployment: Cluster) -> None:
    job_id = await deployment.submit(spec(off_policy(), on_policy(schedule={"steps": 500, "prompts_per_step": 3})))
    await deployment.at_step(job_id, FIRST + 1)
    await deployment.ctx.jobs.request(job_id, allowed=("running",), status="cancelling")
    record = await deployment.ended(job_id)
    assert record.status == "cancelled"
    assert FIRST < record.step == record.committed_step < 500
    report = verify_job(artifacts_of(deployment, job_id), record)
    assert report.ok, report.text()

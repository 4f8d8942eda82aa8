"""Jobs whose samples several teachers judge, through real services: journal, replay, evaluation, texts, rewards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import read_json
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.rollouts import scores_of
from stillhouse.trainer.journal import read_step
from tests.cluster import Cluster, cluster, job_spec

MIXTURE = {"second": 0.3, "main": 0.7}
ROWS = [{"prompt": f"say {word}", "teacher": MIXTURE} for word in ("one", "two", "three", "four")]
ROWS += [{"prompt": "say five", "teacher": "main"}]
TEACHERS = {"main": {"model": "teacher"}, "second": {"model": "other", "system_prompt": "You are a pirate."}}


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, redis_url) as made:
        for seed, name in enumerate(("student", "teacher", "other")):
            made.add_model(name, seed=seed, max_position_embeddings=256)
        for role in ("sampler", "teacher", "trainer"):
            await made.start(role)
        yield made


def spec(**changes: Any) -> dict[str, Any]:
    return job_spec(**{"teachers": TEACHERS, "stages__0__data": {"rows": ROWS}, **changes})


def journal(deployment: Cluster, record: JobRecord, step: int) -> Any:
    return read_step(deployment.ctx.artifacts.job(record.id).journal(record.epoch, step))


async def check(deployment: Cluster, job_id: str, steps: int) -> JobRecord:
    """Ended well, and the oracle finds nothing."""
    record = await deployment.ended(job_id)
    assert (record.status, record.step) == ("succeeded", steps), record.error
    report = verify_job(deployment.ctx.artifacts.job(job_id), record)
    assert report.ok, report.text()
    return record


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": "full_vocabulary"},
        {"objective": "policy_gradient"},
        {"objective": "top_k", "k": 64, "support": "union"},
    ],
    ids=["full_vocabulary", "policy_gradient", "top_k"],
)
async def test_every_teacher_of_a_sample_is_in_journal_loss_and_evaluation(
    deployment: Cluster, loss: dict[str, Any]
) -> None:
    held_out = [{"prompt": "tell me", "teacher": MIXTURE}, {"prompt": "tell him", "teacher": "second"}]
    evaluation = {"data": {"rows": held_out}, "num_prompts": 2, "max_tokens": 6, "show": 1}
    schedule = {"steps": 3, "prompts_per_step": 5, "max_staleness": 0}
    record = await check(
        deployment,
        await deployment.submit(
            spec(
                stages__0__loss=loss, stages__0__schedule=schedule, evaluation=evaluation, stages__0__optimizer__lr=5e-3
            )
        ),
        3,
    )
    scores = journal(deployment, record, 1).scores
    words = {score.rollout.row: [each.rollout.teacher for each in scores_of(score)] for score in scores}
    assert words == {row: ["main", "second"] for row in range(4)} | {4: ["main"]}
    for score in scores:
        for further in score.further:
            assert further.rollout.HasField("teacher_prompt_ids"), "it reads a system prompt of its own"
            assert not further.rollout.HasField("completion_ids")
            assert further.teacher_sha256 == deployment.models.get("other").sha256
    tokens = sum(score.rollout.completion_ids.shape[0] for score in scores)
    assert (await deployment.metric(record.id, "tokens/trained"))[1] == tokens
    usage = record.usage
    assert usage["sampled_tokens"] == usage["trained_tokens"] < usage["scored_tokens"]
    assert record.result is not None
    assert set(record.result["evaluation"]["by_teacher"]) == {"main", "second"}
    measured = read_json(deployment.ctx.artifacts.job(record.id).evaluations / f"{3:08d}.json")
    assert measured["num_prompts"] == 2
    assert {name: found["num_prompts"] for name, found in measured["by_teacher"].items()} == {"main": 1, "second": 2}


async def test_a_takeover_replays_what_all_teachers_said(deployment: Cluster) -> None:
    """Hidden states are scored again, by each of them."""
    job_id = await deployment.submit(
        spec(stages__0__schedule={"steps": 8, "prompts_per_step": 5}, checkpoint={"every_steps": 100})
    )
    await deployment.at_step(job_id, 2)
    await deployment.crash("trainer-0")
    await deployment.crash("teacher-0")
    await deployment.start("teacher", "teacher-1")
    await deployment.start("trainer", "trainer-1")
    record = await check(deployment, job_id, 8)
    assert record.epoch == 2


async def test_given_texts_and_verdicts_come_once(deployment: Cluster) -> None:
    """Completions of the data scored by both teachers; those of the student judged once."""
    given = [{**row, "completion": "yes"} for row in ROWS]
    loss = {"objective": "full_vocabulary", "divergence": "forward_kl"}
    texts = await deployment.submit(
        spec(
            stages__0__loss=loss,
            stages__0__data={"rows": given},
            stages__0__on_policy_fraction=0,
            stages__0__schedule={"steps": 1, "prompts_per_step": 5},
        )
    )
    reward = {"objective": "policy_gradient", "reward": {"verifier": "exact"}}
    judged = await deployment.submit(
        spec(
            stages__0__loss=reward,
            stages__0__data={"rows": [{**row, "answer": "yes"} for row in ROWS]},
            stages__0__schedule={"steps": 1, "prompts_per_step": 5, "group_size": 2},
        )
    )
    record = await check(deployment, texts, 1)
    assert sum(len(score.further) for score in journal(deployment, record, 0).scores) == 4
    record = await check(deployment, judged, 1)
    for score in journal(deployment, record, 0).scores:
        assert score.HasField("reward")
        assert not any(further.HasField("reward") for further in score.further)

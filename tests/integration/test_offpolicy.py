"""Jobs whose texts the student did not write, jobs without a teacher, jobs with outcome rewards: real services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.tensors import ids_list
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import Cluster, cluster, job_spec
from tests.tiny import EOS_ID

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four", "five")]


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    """A sampler and a trainer; tests that need a teacher service start it."""
    async with cluster(tmp_path, redis_url, "sampler", "trainer") as made:
        made.add_model("student", seed=1)
        made.add_model("teacher", seed=2)
        yield made


async def succeeded(made: Cluster, job_id: str) -> None:
    """The job ended well, and the oracle has nothing to say against it."""
    record = await made.ended(job_id)
    assert record.status == "succeeded", record.error
    report = verify_job(made.ctx.artifacts.job(job_id), record)
    assert report.ok, report.text()


def scores(made: Cluster, job_id: str, steps: int, epoch: int = 1) -> list[pb.Score]:
    artifacts = made.ctx.artifacts.job(job_id)
    return [score for step in range(steps) for score in read_step(artifacts.journal(epoch, step)).scores]


def sft(steps: int = 12, **changes: Any) -> dict[str, Any]:
    return job_spec(
        teachers={},
        stages__0__data={"rows": ROWS},
        stages__0__loss={"objective": "cross_entropy"},
        stages__0__on_policy_fraction=0,
        stages__0__optimizer__lr=1e-2,
        stages__0__schedule={"steps": steps, "prompts_per_step": 5},
        **changes,
    )


async def test_fine_tuning_learns_the_completions_and_needs_only_a_trainer(deployment: Cluster) -> None:
    await deployment.stop("sampler-0")
    job_id = await deployment.submit(sft())
    await succeeded(deployment, job_id)
    losses = await deployment.metric(job_id, "loss/total")
    assert losses[-1] < 0.5 * losses[0]
    assert await deployment.metric(job_id, "tokens/on_policy_fraction") == [0.0] * 12
    for score in scores(deployment, job_id, 12):
        rollout = score.rollout
        ids = ids_list(rollout.completion_ids)
        text = ROWS[rollout.row]["completion"]
        assert (rollout.origin, score.WhichOneof("result")) == (pb.ORIGIN_DATA, "none")
        assert (len(ids), ids[-1], rollout.finish_reason) == (len(text) + 1, EOS_ID, pb.FINISH_REASON_STOP)
        assert not rollout.spans
        assert not rollout.HasField("rollout_logprobs")


async def test_a_completion_is_cut_at_max_tokens(deployment: Cluster) -> None:
    job_id = await deployment.submit(sft(2, stages__0__sampling__max_tokens=4))
    await succeeded(deployment, job_id)
    for score in scores(deployment, job_id, 2):
        text = str(ROWS[score.rollout.row]["completion"])
        ids = ids_list(score.rollout.completion_ids)
        assert len(ids) == min(len(text) + 1, 4)
        is_whole = len(text) < 4
        assert (ids[-1] == EOS_ID) == is_whole
        assert score.rollout.finish_reason == (pb.FINISH_REASON_STOP if is_whole else pb.FINISH_REASON_LENGTH)


def seq_kd(steps: int = 12) -> dict[str, Any]:
    return job_spec(
        stages__0__loss={"objective": "cross_entropy"},
        stages__0__on_policy_fraction=0,
        stages__0__off_policy_source="teacher",
        stages__0__optimizer__lr=1e-2,
        stages__0__schedule={"steps": steps, "prompts_per_step": 5, "group_size": 4},
    )


async def test_a_teacher_writes_and_the_student_learns_its_texts(deployment: Cluster) -> None:
    """Sequence-level distillation: the texts come from a sampler, so no teacher service is needed."""
    job_id = await deployment.submit(seq_kd())
    await succeeded(deployment, job_id)
    losses = await deployment.metric(job_id, "loss/total")
    assert losses[-1] < 0.9 * losses[0]  # no two texts are alike: it cannot learn them by heart
    trained = scores(deployment, job_id, 12)
    assert {score.rollout.origin for score in trained} == {pb.ORIGIN_TEACHER}
    assert len({score.rollout.completion_ids.data for score in trained}) > 100, "sampled, each with its own seed"


def gkd(**changes: Any) -> dict[str, Any]:
    return job_spec(
        stages__0__data={"rows": ROWS},
        stages__0__loss={"objective": "full_vocabulary", "divergence": "jsd", "beta": 0.5, "beta_rescale": True},
        stages__0__on_policy_fraction=0.5,
        stages__0__optimizer__lr=5e-3,
        stages__0__schedule={"steps": 16, "prompts_per_step": 5, "max_staleness": 1},
        **changes,
    )


async def test_a_mixture_trains_on_the_students_and_on_given_texts(deployment: Cluster) -> None:
    """Generalised knowledge distillation (GKD) with the data's completions."""
    await deployment.start("teacher")
    held_out = [{"prompt": f"tell me about {word}"} for word in ("tea", "rain")]
    spec = gkd(evaluation={"data": {"rows": held_out}, "num_prompts": 2, "max_tokens": 12, "show": 1})
    job_id = await deployment.submit(spec)
    await succeeded(deployment, job_id)
    record = await deployment.ctx.jobs.get(job_id)
    assert record.result is not None
    kl = record.result["evaluation"]["reverse_kl"]
    assert kl["after"] < 0.9 * kl["before"]
    trained = scores(deployment, job_id, 16)
    assert {score.WhichOneof("result") for score in trained} == {"hidden"}
    origins = [score.rollout.origin for score in trained]
    assert 0.25 < origins.count(pb.ORIGIN_DATA) / len(origins) < 0.75
    assert max(point["values"].get("staleness/max", 0) for point in await deployment.ctx.jobs.metrics(job_id)) <= 1


def grpo(**changes: Any) -> dict[str, Any]:
    rows = [{"prompt": f"say {word}", "answer": "[a-z]"} for word in ("one", "two", "three")]
    return job_spec(
        teachers={},
        stages__0__data={"rows": rows},
        stages__0__sampling__max_tokens=4,
        stages__0__loss={"objective": "policy_gradient", "teacher_weight": 0, "reward": {"verifier": "regex"}},
        stages__0__optimizer__lr=1e-2,
        stages__0__schedule={"steps": 12, "prompts_per_step": 3, "group_size": 16, "max_staleness": 0},
        **changes,
    )


async def test_rewards_alone_teach_without_a_teacher(deployment: Cluster) -> None:
    job_id = await deployment.submit(grpo())
    await succeeded(deployment, job_id)
    rewards = await deployment.metric(job_id, "reward/mean")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


@pytest.mark.full
async def test_a_reward_is_added_to_what_the_teacher_says(deployment: Cluster) -> None:
    await deployment.start("teacher")
    spec = grpo()
    spec["teachers"] = {"main": {"model": "teacher"}}
    spec["stages"][0]["loss"] = {"objective": "policy_gradient", "reward": {"verifier": "regex", "weight": 0.5}}
    spec["stages"][0]["schedule"] = {"steps": 2, "prompts_per_step": 3, "group_size": 4}
    job_id = await deployment.submit(spec)
    await succeeded(deployment, job_id)
    for score in scores(deployment, job_id, 2):
        assert score.WhichOneof("result") == "sampled"
        assert score.reward in (0.0, 1.0)
        assert score.reward_note.startswith("matched" if score.reward else "no match"), score.reward_note
    assert len(await deployment.metric(job_id, "loss/reverse_kl/mean")) == 2


async def test_a_verdict_that_does_not_come_is_a_reward_of_0_and_an_event(deployment: Cluster) -> None:
    """A regular expression that takes exponential time, on a text that it almost matches, and one that always does."""
    spec = grpo()
    answers = ("(([^q]?)+)+$(?<=q)q", "")
    spec["stages"][0]["data"]["rows"] = [{"prompt": f"say {a or 1}", "answer": a or ".|^$"} for a in answers]
    spec["stages"][0]["sampling"]["max_tokens"] = 60
    spec["stages"][0]["loss"]["reward"]["timeout_s"] = 0.5
    spec["stages"][0]["schedule"] = {"steps": 1, "prompts_per_step": 2, "group_size": 2}
    job_id = await deployment.submit(spec)
    await succeeded(deployment, job_id)
    assert await deployment.metric(job_id, "reward/failed") == [2.0]
    assert await deployment.metric(job_id, "reward/zero_spread_groups") == [2.0]
    assert {(score.rollout.row, score.reward) for score in scores(deployment, job_id, 1)} == {(0, 0.0), (1, 1.0)}
    (event,) = [event for event in await deployment.ctx.jobs.events(job_id) if event["type"] == "reward.failed"]
    assert "2 of 4 completions got no verdict" in event["message"]


@pytest.mark.full
async def test_a_sampler_that_dies_with_a_teachers_text_is_replaced(deployment: Cluster) -> None:
    job_id = await deployment.submit(seq_kd(8))
    await deployment.at_step(job_id, 2)
    await deployment.crash("sampler-0")
    await deployment.start("sampler", "sampler-1")
    await succeeded(deployment, job_id)
    record = await deployment.ctx.jobs.get(job_id)
    assert record.usage["failed_samples"] == 0


async def test_a_teacher_that_cannot_write_fails_the_job_with_its_reason(deployment: Cluster) -> None:
    spec = seq_kd(2)
    spec["stages"][0]["sampling"]["max_tokens"] = 100
    deployment.add_model("short", seed=3, max_position_embeddings=64)
    spec["teachers"]["main"]["model"] = "short"
    record = await deployment.ended(await deployment.submit(spec))
    assert record.error is not None
    assert "the 64 that main can read" in record.error["message"], record.error


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sft", "seq_kd", "gkd", "grpo"])
async def test_a_takeover_in_the_middle_changes_nothing_that_was_journalled(deployment: Cluster, kind: str) -> None:
    spec = {"sft": sft, "seq_kd": seq_kd, "gkd": gkd, "grpo": grpo}[kind]()
    spec["checkpoint"] = {"every_steps": 5}
    spec["stages"][0]["schedule"]["steps"] = 12
    if kind == "gkd":
        await deployment.start("teacher")
    job_id = await deployment.submit(spec)
    await deployment.at_step(job_id, 7)
    await deployment.crash("trainer-0")
    artifacts = deployment.ctx.artifacts.job(job_id)
    before = [step for step in range(12) if artifacts.journal(1, step).exists()]
    await deployment.start("trainer", "trainer-1")
    await succeeded(deployment, job_id)
    record = await deployment.ctx.jobs.get(job_id)
    assert record.epoch == 2
    assert len(before) >= 7
    assert not any(artifacts.journal(2, step).exists() for step in before), "nothing is written or judged twice"
    assert [point["step"] for point in await deployment.ctx.jobs.metrics(job_id)] == list(range(1, 13))


@pytest.mark.full
async def test_a_deterministic_mixture_with_a_crash_equals_one_without(deployment: Cluster) -> None:
    """Which groups are the teacher's, and what it writes, follows from the job's seed alone."""
    await deployment.start("teacher")
    ends = []
    for crashes in (False, True):
        spec = gkd(seed=11, deterministic=True, checkpoint={"every_steps": 4})
        spec["stages"][0] |= {"off_policy_source": "teacher", "schedule": {"steps": 8, "prompts_per_step": 4}}
        job_id = await deployment.submit(spec)
        if crashes:
            await deployment.at_step(job_id, 5)
            await deployment.crash("trainer-0")
            await deployment.start("trainer", "trainer-1")
        await succeeded(deployment, job_id)
        record = await deployment.ctx.jobs.get(job_id)
        assert record.epoch == 1 + crashes
        export = deployment.ctx.artifacts.job(job_id).export(record.epoch) / "model.safetensors"
        ends.append(export.read_bytes())
    assert ends[0] == ends[1]

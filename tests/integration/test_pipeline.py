"""Whole jobs through real services on loopback: trainer, sampler, teacher, Valkey, gRPC; tiny random models.

A random teacher and a random student are far apart (some nats), so a right gradient shows within a few steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import UnavailableError
from stillhouse.core.queue import keys
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.tensors import ids_list
from stillhouse.sampler.service import SamplerServicer
from stillhouse.teacher import messages as teacher_messages
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import read_step
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until

ALL = ("sampler", "teacher", "trainer")


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": "full_vocabulary", "divergence": "reverse_kl"},
        {"objective": "full_vocabulary", "divergence": "forward_kl"},
        {"objective": "full_vocabulary", "divergence": "jsd", "beta": 0.5, "beta_rescale": True},
        {"objective": "policy_gradient", "advantage_clip": 5.0, "reduction": "seq_mean_token_mean"},
        {"objective": "top_k", "k": 128, "divergence": "reverse_kl"},
        {"objective": "top_k", "k": 128, "divergence": "forward_kl", "correction": "generalised"},
        {"objective": "top_k", "k": 64, "support": "student"},
        {"objective": "top_k", "k": 32, "support": "union"},
    ],
    ids=["reverse_kl", "forward_kl", "jsd", "policy_gradient", "top_k reverse", "top_k forward", "student", "union"],
)
async def test_a_job_makes_a_better_student(deployment: Cluster, loss: dict[str, Any]) -> None:
    held_out = [{"prompt": f"tell me about {word}"} for word in ("tea", "rain", "bread", "maps")]
    # one sampled token says much less than the whole vocabulary: more samples for the policy gradient
    group_size, lr = (16, 2e-2) if loss["objective"] == "policy_gradient" else (4, 5e-3)
    job_id = await deployment.submit(
        job_spec(
            stages__0__loss=loss,
            stages__0__schedule={"steps": 10, "prompts_per_step": 5, "group_size": group_size, "max_staleness": 0},
            stages__0__optimizer__lr=lr,
            evaluation={"data": {"rows": held_out}, "num_prompts": 4, "max_tokens": 12, "show": 2},
        )
    )
    record = await deployment.ended(job_id)
    assert (record.status, record.step, record.committed_step) == ("succeeded", 10, 10), record.error
    assert record.result is not None
    kl = record.result["evaluation"]["reverse_kl"]
    assert kl["after"] < 0.9 * kl["before"]
    artifacts = deployment.ctx.artifacts.job(job_id)
    assert AutoModelForCausalLM.from_pretrained(artifacts.export(record.epoch)).num_parameters() > 0
    assert "Held-out KL" in (artifacts.export(record.epoch) / "README.md").read_text()
    assert await deployment.ctx.queue.length(keys.scored(job_id, record.epoch)) == 0


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": "full_vocabulary"},
        {"objective": "policy_gradient"},
        {"objective": "policy_gradient", "baseline": "top_k", "k": 16},
        {"objective": "policy_gradient", "baseline": "full_vocabulary"},
        {"objective": "top_k", "k": 16},
        {"objective": "top_k", "k": 16, "support": "student"},
        {"objective": "top_k", "k": 16, "support": "union"},
    ],
    ids=["full_vocabulary", "policy_gradient", "baseline top_k", "baseline full", "top_k", "student", "union"],
)
async def test_a_student_that_is_its_teacher_has_nothing_to_learn(deployment: Cluster, loss: dict[str, Any]) -> None:
    """Through the whole pipeline: templates, alignment, wire, heads. An off-by-one anywhere gives nats, not 1e-4."""
    job_id = await deployment.submit(
        job_spec(
            teachers__main__model="student",
            stages__0__loss=loss,
            stages__0__schedule={"steps": 1, "prompts_per_step": 5, "group_size": 2, "max_staleness": 0},
        )
    )
    assert (await deployment.ended(job_id)).status == "succeeded"
    (reverse_kl,) = await deployment.metric(job_id, "loss/reverse_kl/mean")
    assert abs(reverse_kl) <= 1e-4


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
async def test_lists_that_are_too_big_for_the_queue_are_fetched(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch, support: str
) -> None:
    """And the journal holds them, so that a replay needs no teacher."""
    monkeypatch.setattr(teacher_messages, "INLINE_BYTES", 0)
    loss = {"objective": "top_k", "k": 8, "support": support}
    job_id = await deployment.submit(job_spec(stages__0__loss=loss, stages__0__schedule__steps=1))
    assert (await deployment.ended(job_id)).status == "succeeded"
    kind, fields = {
        "teacher": ("topk", ["teacher_topk_ids"]),
        "student": ("targets", ["target_logprobs"]),
        "union": ("topk", ["teacher_topk_ids", "target_logprobs"]),
    }[support]
    for score in read_step(deployment.ctx.artifacts.job(job_id).journal(1, 0)).scores:
        payload = getattr(score, kind)
        assert not payload.HasField("blob")
        for name in fields:
            assert list(getattr(payload, name).shape) == [len(ids_list(score.rollout.completion_ids)), 8]
        assert score.rollout.HasField("target_ids") == (support != "teacher")


async def test_sampler_and_trainer_agree_at_equal_weights_at_every_step(deployment: Cluster) -> None:
    job_id = await deployment.submit(job_spec(stages__0__schedule__steps=6, stages__0__optimizer__lr=1e-2))
    assert (await deployment.ended(job_id)).status == "succeeded"
    gaps = await deployment.metric(job_id, "mismatch/logprob_abs_mean")
    assert len(gaps) == 6
    assert max(gaps) <= 1e-3
    assert await deployment.metric(job_id, "staleness/max") == [0.0] * 6


@pytest.mark.parametrize("deaf", [{"sampler-1"}, {"sampler-0", "sampler-1"}], ids=["one of two", "both"])
async def test_staleness_is_bounded_although_samplers_miss_every_hint(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch, deaf: set[str]
) -> None:
    original = SamplerServicer.SyncWeights
    missed: set[str] = set()

    async def sync_weights(self: Any, request: Any, context: Any) -> Any:
        if self._ctx.instance in deaf:
            missed.add(self._ctx.instance)
            raise UnavailableError("this sampler hears nothing")
        return await original(self, request, context)

    monkeypatch.setattr(SamplerServicer, "SyncWeights", sync_weights)
    # a service registers its methods when it starts: both start after the patch
    await deployment.stop("sampler-0")
    await deployment.start("sampler", "sampler-0")
    await deployment.start("sampler", "sampler-1")
    job_id = await deployment.submit(
        job_spec(stages__0__schedule={"steps": 12, "prompts_per_step": 4, "max_staleness": 1}, samplers={"min": 2})
    )
    assert (await deployment.ended(job_id)).status == "succeeded"
    assert missed == deaf
    assert max(await deployment.metric(job_id, "staleness/max")) <= 1
    rollouts = [
        (step, score.rollout)
        for step in range(12)
        for score in read_step(deployment.ctx.artifacts.job(job_id).journal(1, step)).scores
    ]
    assert all(step - span.policy_version <= 1 for step, rollout in rollouts for span in rollout.spans)
    assert {rollout.sampler for _, rollout in rollouts} == {"sampler-0", "sampler-1"}


async def test_every_sample_is_trained_exactly_once(deployment: Cluster) -> None:
    job_id = await deployment.submit(
        job_spec(stages__0__schedule={"steps": 5, "prompts_per_step": 3, "group_size": 2, "max_staleness": 2})
    )
    await deployment.ended(job_id)
    artifacts = deployment.ctx.artifacts.job(job_id)
    steps = [read_step(artifacts.journal(1, step)) for step in range(5)]
    trained = [score.rollout.sample_id for step in steps for score in step.scores]
    assert sorted(trained) == sorted(f"{group}/{index}" for group in range(15) for index in range(2))
    assert [step.header.next_group for step in steps] == [3, 6, 9, 12, 15]


@pytest.mark.parametrize("role", ["sampler", "teacher"])
async def test_a_dead_worker_delays_the_job_and_does_not_end_it(deployment: Cluster, role: str) -> None:
    job_id = await deployment.submit(job_spec(stages__0__schedule={"steps": 10, "prompts_per_step": 3}))
    await deployment.at_step(job_id, 2)
    await deployment.crash(f"{role}-0")
    await deployment.start(role, f"{role}-0")
    record = await deployment.ended(job_id)
    assert (record.status, record.step) == ("succeeded", 10), record.error
    assert record.usage["failed_samples"] == 0


async def test_a_job_without_a_teacher_says_what_it_waits_for(deployment: Cluster) -> None:
    job_id = await deployment.submit(job_spec(stages__0__schedule={"steps": 30, "prompts_per_step": 3}))
    await deployment.at_step(job_id, 2)
    await deployment.stop("teacher-0")

    async def says(reason: str) -> bool:
        return (await deployment.ctx.jobs.get(job_id)).status_reason == reason

    await wait_until(lambda: says("no_teacher"), timeout_s=20, what="the job to name the missing teacher")
    await deployment.start("teacher", "teacher-0")
    await wait_until(lambda: says(""), timeout_s=20, what="the job to take it back")
    assert (await deployment.ended(job_id)).status == "succeeded"


async def test_a_takeover_replays_the_journal_and_samples_nothing_twice(deployment: Cluster) -> None:
    job_id = await deployment.submit(
        job_spec(stages__0__schedule={"steps": 12, "prompts_per_step": 3}, checkpoint={"every_steps": 5})
    )
    await deployment.at_step(job_id, 8)
    await deployment.crash("trainer-0")
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert (record.status, record.step, record.epoch) == ("succeeded", 12, 2), record.error
    artifacts = deployment.ctx.artifacts.job(job_id)
    lineage = [step for step in range(12) if artifacts.journal(1, step).exists()]
    own = [step for step in range(12) if artifacts.journal(2, step).exists()]
    assert sorted(lineage + own) == list(range(12)), "each step is journalled in exactly one epoch"
    rewound = [event for event in await deployment.ctx.jobs.events(job_id) if event["type"] == "job.rewound"]
    assert len(rewound) == 1
    assert rewound[0]["data"]["to"] >= 8
    steps = [point["step"] for point in await deployment.ctx.jobs.metrics(job_id)]
    assert steps == list(range(1, 13))


async def test_a_wiped_queue_server_costs_no_committed_or_journalled_step(deployment: Cluster) -> None:
    job_id = await deployment.submit(
        job_spec(stages__0__schedule={"steps": 12, "prompts_per_step": 3}, checkpoint={"every_steps": 2})
    )
    await deployment.at_step(job_id, 5)
    record = await deployment.ctx.jobs.get(job_id)
    await deployment.ctx.redis.flushall()
    # what the gateway's sweeper does: the record again, from job.json, without epoch or step
    await deployment.ctx.jobs.create(replace(record, epoch=0, step=0, status="queued", weights=None))
    record = await deployment.ended(job_id)
    assert (record.status, record.step) == ("succeeded", 12), record.error
    assert record.epoch >= 2, "the epoch comes from the artifacts, so the void claim's work is fenced"
    artifacts = deployment.ctx.artifacts.job(job_id)
    in_epochs = [[e for e in range(1, record.epoch + 1) if artifacts.journal(e, step).exists()] for step in range(12)]
    assert all(len(epochs) == 1 for epochs in in_epochs), "no step was sampled twice"


async def test_a_draining_trainer_commits_and_hands_the_job_on(deployment: Cluster) -> None:
    job_id = await deployment.submit(
        job_spec(stages__0__schedule={"steps": 12, "prompts_per_step": 3}, checkpoint={"every_steps": 100})
    )
    await deployment.at_step(job_id, 3)
    await deployment.stop("trainer-0")
    record = await deployment.ctx.jobs.get(job_id)
    assert not record.is_terminal
    assert record.committed_step == record.step >= 3
    await deployment.start("trainer", "trainer-1")
    record = await deployment.ended(job_id)
    assert (record.status, record.step) == ("succeeded", 12), record.error
    artifacts = deployment.ctx.artifacts.job(job_id)
    assert manifests.verify(artifacts, _refs(deployment, job_id)[-1])["parent"] is not None


async def test_cancelling_ends_a_running_job(deployment: Cluster) -> None:
    job_id = await deployment.submit(job_spec(stages__0__schedule={"steps": 1000, "prompts_per_step": 3}))
    await deployment.at_step(job_id, 2)
    await deployment.ctx.jobs.request(job_id, allowed=("running",), status="cancelling")
    record = await deployment.ended(job_id)
    assert record.status == "cancelled"
    assert 2 <= record.step < 1000
    assert record.committed_step == record.step


async def test_two_teachers_each_score_their_own_rows(deployment: Cluster) -> None:
    deployment.add_model("teacher-b", seed=3)
    rows = [{"prompt": f"row {index}", "teacher": "main" if index % 2 else "other"} for index in range(6)]
    job_id = await deployment.submit(
        job_spec(
            teachers__other={"model": "teacher-b"},
            stages__0__data={"rows": rows, "shuffle": False},
            stages__0__schedule={"steps": 2, "prompts_per_step": 6},
        )
    )
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    shas = {
        score.rollout.teacher: score.teacher_sha256
        for score in read_step(deployment.ctx.artifacts.job(job_id).journal(1, 0)).scores
    }
    models = deployment.models
    assert shas == {"main": models.get("teacher").sha256, "other": models.get("teacher-b").sha256}


async def test_a_teacher_may_read_another_prompt(deployment: Cluster) -> None:
    """Same model, but the teacher has a system prompt: the reverse KL is positive and every sample is scored."""
    job_id = await deployment.submit(
        job_spec(
            teachers__main={"model": "student", "system_prompt": "You are a pirate."}, stages__0__schedule__steps=1
        )
    )
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    (reverse_kl,) = await deployment.metric(job_id, "loss/reverse_kl/mean")
    assert reverse_kl > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student__model": "nobody"}, ["unknown model 'nobody'", "student", "models add"]),
        ({"stages__0__sampling__max_tokens": 250}, ["row 0", "256", "max_tokens"]),
    ],
    ids=["unknown model", "too long"],
)
async def test_a_job_that_cannot_work_fails_and_says_why(
    deployment: Cluster, changes: dict[str, Any], words: list[str]
) -> None:
    record = await deployment.ended(await deployment.submit(job_spec(**changes)))
    assert record.status == "failed"
    assert record.error is not None
    for word in words:
        assert word in record.error["message"]


@pytest.mark.parametrize("max_length", [20, 256])
async def test_a_job_says_at_its_start_that_a_sampler_reads_less_than_its_student(
    deployment: Cluster, max_length: int
) -> None:
    """vLLM with `vllm_max_length`: its completions end there."""
    short = ServiceInfo("sampler", "sampler-9", "a:1", 1, 0.0, 0.0, extra={"max_length": str(max_length)})
    await deployment.ctx.registry.beat(short)
    job_id = await deployment.submit(job_spec(samplers={"max": 1}, stages__0__schedule__steps=1))
    assert (await deployment.ended(job_id)).status == "succeeded"
    said = [event["message"] for event in await deployment.ctx.jobs.events(job_id) if event["type"] == "sampling.short"]
    if max_length == 256:
        assert not said
    else:
        assert len(said) == 1
        assert "sampler 'sampler-9' reads 20 tokens" in said[0]
        assert "completions of 5 of 5 prompts end there, before max_tokens 8" in said[0]


def _refs(made: Cluster, job_id: str) -> list[manifests.ManifestRef]:
    return manifests.list_manifests(made.ctx.artifacts.job(job_id))

"""The teacher as a service: real queue, real gRPC, tiny models; rollouts in, scores out, exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.blobs import sha256_bytes, xxh3
from stillhouse.core.errors import ConflictError, EngineDeadError, NotFoundError, UnavailableError, WireError
from stillhouse.core.models import ModelEntry
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import MAX_DELIVERIES, Outcome, Scope
from stillhouse.core.rpc import Peer, collect
from stillhouse.core.service import open_context, serve
from stillhouse.core.tensors import DTYPE_NAMES, from_bytes, from_tensor, ids_list, ids_tensor, to_tensor
from stillhouse.teacher.app import build as build_teacher
from stillhouse.teacher.engines.base import ScoreItem
from stillhouse.teacher.engines.transformers import TransformersEngine
from stillhouse.teacher.pool import Resident
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import teacher_pb2, teacher_pb2_grpc, tensor_pb2, weights_pb2
from tests.cluster import Cluster, job_spec
from tests.tiny import TOKENIZER_SIZE
from tests.waiting import wait_until

PEER = "teacher-0"
PULL_S = 0.3
"""How long the pull of an average takes here."""


class Desk:
    """A job as its trainer sees it: rollouts go in, scores come out."""

    def __init__(self, cluster: Cluster, scope: Scope, teacher: str = "main") -> None:
        self.cluster, self.scope, self.queue, self.teacher = cluster, scope, cluster.ctx.queue, teacher
        self.rollouts_stream = keys.rollouts(scope.job_id, scope.epoch, teacher)
        self.scored_stream = keys.scored(scope.job_id, scope.epoch)

    async def open(self, model: str = "teacher", dtype: str = "float32", model_sha256: str = "") -> pb.TeacherTask:
        """Streams and index entry, as a trainer makes them."""
        entry = self.cluster.models.get(model)
        task = pb.TeacherTask(
            schema_version=1,
            job_id=self.scope.job_id,
            epoch=self.scope.epoch,
            teacher=self.teacher,
            model=model,
            model_sha256=model_sha256 or entry.sha256,
            dtype=DTYPE_NAMES[dtype],
        )
        await self.queue.open_stream(self.scope, self.scored_stream, keys.TRAINERS_GROUP)
        await self.queue.open_stream(self.scope, self.rollouts_stream, keys.TEACHERS_GROUP)
        redis: Any = self.cluster.ctx.redis
        await redis.hset(keys.teacher(task.model_sha256), self.rollouts_stream, task.SerializeToString())
        await redis.sadd(keys.TEACHERS, task.model_sha256)
        return task

    def rollout(self, group: int, kind: pb.ScoreKind = pb.SCORE_KIND_SAMPLED, **fields: Any) -> pb.Rollout:
        rng = np.random.default_rng(group)
        options: dict[str, Any] = {
            "prompt_ids": ids_tensor(rng.integers(4, TOKENIZER_SIZE, 3 + group % 5)),
            "completion_ids": ids_tensor(rng.integers(4, TOKENIZER_SIZE, 1 + group % 7)),
            "score": pb.ScoreSpec(kind=kind, top_k=4),
            **fields,
        }
        return pb.Rollout(
            schema_version=1,
            job_id=self.scope.job_id,
            epoch=self.scope.epoch,
            sample_id=f"{group}/0",
            group=group,
            teacher=self.teacher,
            **options,
        )

    async def add(self, rollout: pb.Rollout) -> pb.Rollout:
        mark = f"rollout:{rollout.sample_id}:{rollout.attempt}"
        outcome = await self.queue.add(self.scope, self.rollouts_stream, mark, rollout.SerializeToString())
        assert outcome is Outcome.DONE
        return rollout

    async def scores(self) -> dict[tuple[str, int], pb.Score]:
        entries: Any = await self.cluster.ctx.redis.xrange(self.scored_stream)
        found = [pb.Score.FromString(fields[b"p"]) for _, fields in entries]
        by_sample = {(score.rollout.sample_id, score.rollout.attempt): score for score in found}
        assert len(by_sample) == len(found), "a sample was scored twice"
        return by_sample

    async def wait_for(self, count: int, timeout_s: float = 20) -> dict[str, pb.Score]:
        async def arrived() -> bool:
            return len(await self.scores()) >= count and await self.queue.length(self.rollouts_stream) == 0

        await wait_until(arrived, timeout_s=timeout_s, what=f"{count} scores and an empty stream of rollouts")
        return {sample_id: score for (sample_id, _), score in (await self.scores()).items()}

    async def peer(self, instance: str = PEER) -> Peer:
        info = await self.cluster.ctx.registry.find("teacher", instance)
        return self.cluster.ctx.peers.get(info.address, teacher_pb2_grpc.TeacherServiceStub, instance)

    async def fetch(self, blob: tensor_pb2.BlobRef, release: bool = False) -> bytearray:
        peer = await self.peer(blob.instance)
        request = teacher_pb2.FetchScoreRequest(blob=blob, release=release)
        parts = (part.chunk async for part in peer.stream("FetchScore", request, timeout_s=10))
        data = await collect(parts, blob.size_bytes, "payload")
        assert xxh3(data) == blob.xxh3_128
        return data


async def open_job(made: Cluster, **spec: Any) -> Desk:
    job_id = await made.submit(job_spec(**spec))
    return Desk(made, Scope(job_id, await made.ctx.jobs.claim(job_id, "trainer-0", 60, 0)))


@pytest.fixture
async def cluster(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path, redis_url, teacher_batch_tokens=64)
    for number, name in enumerate(("student", "teacher", "other")):
        made.add_model(name, seed=number, tie=name != "other", max_position_embeddings=64)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def desk(cluster: Cluster) -> Desk:
    return await open_job(cluster)


@torch.no_grad()
def naive(cluster: Cluster, model: str, rollout: pb.Rollout) -> torch.Tensor:
    """[T, V] log-probabilities by one full forward."""
    loaded = AutoModelForCausalLM.from_pretrained(cluster.models.get(model).path, dtype=torch.float32)
    own = rollout.HasField("teacher_prompt_ids")
    prompt = ids_list(rollout.teacher_prompt_ids if own else rollout.prompt_ids)
    logits = loaded(input_ids=torch.tensor([prompt + ids_list(rollout.completion_ids)])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1, :TOKENIZER_SIZE] / (rollout.score.temperature or 1.0), -1)


def sampled(cluster: Cluster, model: str, rollout: pb.Rollout) -> np.ndarray:
    ids = ids_list(rollout.completion_ids)
    return naive(cluster, model, rollout)[range(len(ids)), ids].numpy()


async def test_rollouts_become_scores_exactly_once(desk: Desk) -> None:
    task = await desk.open()
    await desk.cluster.start("teacher")
    added = [await desk.add(desk.rollout(group)) for group in range(20)]
    own = desk.rollout(
        20, teacher_prompt_ids=ids_tensor([9, 8, 7]), score=pb.ScoreSpec(kind=pb.SCORE_KIND_SAMPLED, temperature=0.5)
    )
    added.append(await desk.add(own))
    got = await desk.wait_for(len(added))
    for rollout in added:
        score = got[rollout.sample_id]
        assert score.WhichOneof("result") == "sampled"
        np.testing.assert_allclose(
            from_tensor(score.sampled.teacher_logprobs), sampled(desk.cluster, "teacher", rollout), atol=2e-5
        )
        assert score.rollout == rollout, "the score carries its rollout"
        assert (score.teacher_sha256, score.teacher_instance) == (task.model_sha256, PEER)


async def test_hidden_states_and_head_give_the_exact_distribution(desk: Desk) -> None:
    task = await desk.open("other")
    await desk.cluster.start("teacher")
    rollout = await desk.add(desk.rollout(6, pb.SCORE_KIND_HIDDEN))
    score = (await desk.wait_for(1))["6/0"].hidden
    peer = await desk.peer()
    request = teacher_pb2.FetchHeadRequest(model="other", model_sha256=task.model_sha256, dtype=task.dtype)
    parts = [part async for part in peer.stream("FetchHead", request, timeout_s=10)]
    info, raw = parts[0].info, b"".join(part.chunk.data for part in parts[1:])
    assert sha256_bytes(raw) == info.sha256 == score.head_sha256
    assert len(raw) == info.size_bytes
    weight = from_bytes(raw, info.dtype, info.shape)[: info.vocab_size]
    hidden = from_bytes(await desk.fetch(score.blob), score.dtype, score.shape)
    assert hidden.dtype == np.float16
    rebuilt = torch.log_softmax(torch.from_numpy(hidden.astype(np.float32) @ weight.T), -1)
    exact = naive(desk.cluster, "other", rollout)
    assert float((exact.exp() * (exact - rebuilt)).sum(-1).max()) < 1e-5
    np.testing.assert_allclose(from_tensor(score.teacher_logprobs), sampled(desk.cluster, "other", rollout), atol=2e-5)


async def test_a_payload_is_there_until_it_is_released(desk: Desk) -> None:
    await desk.open()
    await desk.cluster.start("teacher")
    await desk.add(desk.rollout(4, pb.SCORE_KIND_HIDDEN))
    blob = (await desk.wait_for(1))["4/0"].hidden.blob
    assert await desk.fetch(blob) == await desk.fetch(blob, release=True)
    with pytest.raises(NotFoundError, match="scored again"):
        await desk.fetch(blob)
    again = desk.rollout(4, pb.SCORE_KIND_HIDDEN, attempt=1)
    await desk.add(again)
    await desk.wait_for(2)
    second = (await desk.scores())["4/0", 1].hidden.blob
    assert second.xxh3_128 == blob.xxh3_128, "a new attempt gives the same payload"
    await desk.fetch(second)


async def test_the_end_of_an_epoch_frees_its_payloads(desk: Desk) -> None:
    await desk.open()
    await desk.cluster.start("teacher")
    await desk.add(desk.rollout(4, pb.SCORE_KIND_HIDDEN))
    await desk.wait_for(1)
    peer = await desk.peer()

    async def held() -> int:
        return (await peer.unary("GetInfo", teacher_pb2.TeacherServiceGetInfoRequest(), timeout_s=5)).blob_bytes

    assert await held() > 0
    await desk.queue.close_epoch(desk.scope)

    async def is_free() -> bool:
        return await held() == 0

    await wait_until(is_free, timeout_s=10, what="the payloads to be dropped")


@pytest.mark.parametrize("inline_bytes", [1 << 20, 0], ids=["inline", "blob"])
async def test_lists_travel_inline_or_as_references(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr("stillhouse.teacher.messages.INLINE_BYTES", inline_bytes)
    await desk.open()
    await desk.cluster.start("teacher")
    topk = await desk.add(desk.rollout(5, pb.SCORE_KIND_TOPK))
    targets, union = desk.rollout(6, pb.SCORE_KIND_TARGETS), desk.rollout(13, pb.SCORE_KIND_TOPK)
    wanted = np.arange(2 * 7, dtype=np.int32).reshape(7, 2)
    for rollout in (targets, union):
        rollout.target_ids.CopyFrom(to_tensor(wanted))
        await desk.add(rollout)
    got = await desk.wait_for(3)
    first, second, third = got["5/0"].topk, got["6/0"].targets, got["13/0"].topk
    assert not first.HasField("target_logprobs")
    if inline_bytes == 0:
        assert not first.HasField("teacher_topk_ids")
        first = pb.TopKScore.FromString(bytes(await desk.fetch(first.blob)))
        second = pb.TargetsScore.FromString(bytes(await desk.fetch(second.blob)))
        third = pb.TopKScore.FromString(bytes(await desk.fetch(third.blob)))
    values, ids = naive(desk.cluster, "teacher", topk).topk(4)
    np.testing.assert_array_equal(from_tensor(first.teacher_topk_ids), ids)
    np.testing.assert_allclose(from_tensor(first.teacher_topk_logprobs), values, atol=0.01)
    for rollout, score in ((targets, second), (union, third)):
        expected = naive(desk.cluster, "teacher", rollout).gather(1, torch.from_numpy(wanted).long())
        np.testing.assert_allclose(from_tensor(score.target_logprobs), expected, atol=2e-5)
    assert from_tensor(third.teacher_topk_ids).shape == (7, 4)


async def test_a_list_is_fetched_when_its_rollout_fills_the_entry(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts that name target ids are large themselves: 4 k bytes a token."""
    rollout = desk.rollout(6, pb.SCORE_KIND_TARGETS)
    rollout.target_ids.CopyFrom(to_tensor(np.zeros((7, 2), dtype=np.int32)))
    monkeypatch.setattr("stillhouse.teacher.messages.ENTRY_BYTES", rollout.ByteSize() + 16)
    await desk.open()
    await desk.cluster.start("teacher")
    await desk.add(rollout)
    assert (await desk.wait_for(1))["6/0"].targets.blob.size_bytes > 16


async def test_jobs_are_served_in_turns(cluster: Cluster) -> None:
    desks = [await open_job(cluster) for _ in range(3)]
    for number, desk in enumerate(desks):
        await desk.open("teacher" if number != 1 else "other")
        for group in range(60 if number == 0 else 4):
            await desk.add(desk.rollout(group))
    await cluster.start("teacher")
    for desk, count in zip(desks[1:], (4, 4), strict=True):
        await desk.wait_for(count)
    assert len(await desks[0].scores()) < 60, "the long stream did not keep the others waiting"
    got = await desks[1].wait_for(4)
    rollout = desks[1].rollout(2)
    np.testing.assert_allclose(
        from_tensor(got["2/0"].sampled.teacher_logprobs), sampled(cluster, "other", rollout), atol=2e-5
    )
    await desks[0].wait_for(60)


async def test_impossible_samples_fail_alone(desk: Desk) -> None:
    await desk.open()
    for group in (0, 1, 2):
        await desk.add(desk.rollout(group))
    await desk.add(desk.rollout(3, completion_ids=ids_tensor([TOKENIZER_SIZE])))
    await desk.add(desk.rollout(4, prompt_ids=ids_tensor([5] * 64)))
    await desk.add(desk.rollout(5, pb.SCORE_KIND_UNSPECIFIED))
    torn = tensor_pb2.Tensor(dtype=DTYPE_NAMES["int32"], shape=[3], data=b"1234")
    await desk.add(desk.rollout(6, completion_ids=torn))
    await desk.cluster.start("teacher")
    got = await desk.wait_for(7)
    failed = {name: score.failed for name, score in got.items() if score.WhichOneof("result") == "failed"}
    assert {name: failure.reason for name, failure in failed.items()} == {
        "3/0": "bad_ids",
        "4/0": "too_long",
        "5/0": "bad_request",
        "6/0": "bad_request",
    }
    assert {failure.service for failure in failed.values()} == {"teacher"}
    assert await desk.queue.length(keys.dead(desk.scope.job_id, desk.scope.epoch)) == 4


async def test_a_dead_teachers_claim_is_taken_over_and_given_up_in_the_end(desk: Desk) -> None:
    await desk.open()
    for group in (0, 1):
        await desk.add(desk.rollout(group))
    claimed = await desk.queue.claim([desk.rollouts_stream], keys.TEACHERS_GROUP, "teacher-dead", 2)
    assert len(claimed) == 2
    for _ in range(4):  # the first of them kills whoever takes it
        await desk.queue.reclaim(desk.rollouts_stream, keys.TEACHERS_GROUP, "teacher-dead", 0, 1)
    await desk.cluster.start("teacher")
    got = await desk.wait_for(2)
    assert got["0/0"].failed.reason == "exhausted"
    assert got["0/0"].failed.attempts == 6
    assert got["1/0"].WhichOneof("result") == "sampled"


def poison(monkeypatch: pytest.MonkeyPatch, sample_id: str) -> None:
    """A sample that kills engines."""
    score = TransformersEngine.score

    def deadly(self: TransformersEngine, items: Sequence[ScoreItem]) -> Any:
        if any(item.key == sample_id for item in items):
            raise EngineDeadError("engine_died: killed by signal 9")
        return score(self, items)

    monkeypatch.setattr(TransformersEngine, "score", deadly)


async def test_a_sample_that_kills_engines_is_given_up_in_the_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "0/0")
    await desk.open()
    for group in (0, 1):
        await desk.add(desk.rollout(group))
    for number in range(MAX_DELIVERIES):
        ctx = open_context(desk.cluster.settings, "teacher", structlog.get_logger(), instance=f"teacher-dies-{number}")
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(serve(ctx, build_teacher), 20)
        await ctx.close()
    await desk.cluster.start("teacher")
    got = await desk.wait_for(2)
    assert got["0/0"].failed.reason == "exhausted"
    assert got["1/0"].WhichOneof("result") == "sampled"


async def test_a_direct_call_whose_engine_dies_may_be_tried_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """At another teacher, or at this one when it is back."""
    poison(monkeypatch, "0/0")
    ctx = open_context(desk.cluster.settings, "teacher", structlog.get_logger(), instance=PEER)
    teacher = asyncio.create_task(serve(ctx, build_teacher))
    await wait_until(lambda: desk.cluster.ctx.registry.services("teacher"), timeout_s=20, what="the teacher")
    request = teacher_pb2.ScoreRequest(task=pb.TeacherTask(model="teacher"), rollouts=[desk.rollout(0)])
    with pytest.raises(UnavailableError, match="killed by signal 9"):
        [part async for part in (await desk.peer()).stream("Score", request, timeout_s=20)]
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(teacher, 20)
    await ctx.close()


async def test_a_closed_epoch_takes_no_scores(desk: Desk) -> None:
    await desk.open()
    ctx = await desk.cluster.start("teacher")
    for group in range(40):
        await desk.add(desk.rollout(group))
    await wait_until(desk.scores, timeout_s=10, what="the first score")
    redis = desk.cluster.ctx.redis
    await redis.delete(keys.lease(desk.scope.job_id))
    epoch = await desk.cluster.ctx.jobs.claim(desk.scope.job_id, "trainer-1", 60, 0)
    await desk.queue.close_epoch(desk.scope)
    successor = Desk(desk.cluster, Scope(desk.scope.job_id, epoch))
    await successor.open()
    await successor.add(successor.rollout(0))
    assert (await successor.wait_for(1))["0/0"].rollout.epoch == epoch
    assert not await desk.scores()
    assert not ctx.stop.is_set()


async def test_a_stream_without_its_model_does_not_stop_the_others(desk: Desk) -> None:
    await desk.open(model_sha256="0" * 64)
    await desk.add(desk.rollout(0))
    good = await open_job(desk.cluster)
    await good.open()
    await good.add(good.rollout(0))
    await desk.cluster.start("teacher")
    await good.wait_for(1)
    assert not await desk.scores()
    assert await desk.queue.length(desk.rollouts_stream) == 1, "it waits for a teacher that has the model"


async def test_a_model_that_cannot_be_read_does_not_stop_the_others(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(entry: ModelEntry) -> None:
        if entry.name == "other":
            raise PermissionError(13, "Permission denied", entry.path)

    monkeypatch.setattr("stillhouse.teacher.pool.verify_files", verify)
    await desk.open("other")
    await desk.add(desk.rollout(0))
    good = await open_job(desk.cluster)
    await good.open()
    await desk.cluster.start("teacher")
    for group in range(2):
        await good.add(good.rollout(group))
        await good.wait_for(group + 1)
    assert await desk.queue.length(desk.rollouts_stream) == 1, "it waits for a teacher that can read the model"


async def test_texts_wait_for_a_teacher_that_has_their_tokenizer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.teacher.worker.UNUSABLE_S", 0.5)
    task = await desk.open()
    task.tokenizer_sha256 = desk.cluster.models.get("teacher").tokenizer_sha256
    task.retokenize.student = "late"
    redis: Any = desk.cluster.ctx.redis
    await redis.hset(keys.teacher(task.model_sha256), desk.rollouts_stream, task.SerializeToString())
    for group in range(20):
        await desk.add(desk.rollout(group, pb.SCORE_KIND_SPANS, tokenizer_sha256=task.tokenizer_sha256))
    good = await open_job(desk.cluster)
    await good.open()
    await good.add(good.rollout(0))
    await desk.cluster.start("teacher")
    await good.wait_for(1)
    await good.add(good.rollout(1))
    await good.wait_for(2)
    assert not await desk.scores()
    desk.cluster.add_model("late")
    assert {score.WhichOneof("result") for score in (await desk.wait_for(20)).values()} == {"spans"}


async def test_deterministic_scores_do_not_depend_on_company(cluster: Cluster) -> None:
    one, many = [await open_job(cluster, deterministic=True) for _ in range(2)]
    for desk in (one, many):
        await desk.open()
    await one.add(one.rollout(5))
    for group in range(12):
        await many.add(many.rollout(group))
    await cluster.start("teacher")
    alone, together = (await one.wait_for(1))["5/0"], (await many.wait_for(12))["5/0"]
    assert alone.sampled.teacher_logprobs == together.sampled.teacher_logprobs, "bit for bit"


async def test_direct_scores_and_models(desk: Desk) -> None:
    await desk.cluster.start("teacher")
    peer = await desk.peer()
    entry = desk.cluster.models.get("teacher")
    request = teacher_pb2.EnsureModelRequest(model="teacher", model_sha256=entry.sha256)
    loaded = (await peer.unary("EnsureModel", request, timeout_s=20)).model
    assert (loaded.vocab_size, loaded.max_sequence_length) == (TOKENIZER_SIZE, 64)
    task = pb.TeacherTask(model="teacher")
    rollouts = [desk.rollout(group) for group in (6, 0, 3)]
    parts = [
        part.score
        async for part in peer.stream("Score", teacher_pb2.ScoreRequest(task=task, rollouts=rollouts), timeout_s=20)
    ]
    assert [score.rollout.sample_id for score in parts] == ["6/0", "0/0", "3/0"]
    for rollout, score in zip(rollouts, parts, strict=True):
        np.testing.assert_allclose(
            from_tensor(score.sampled.teacher_logprobs), sampled(desk.cluster, "teacher", rollout), atol=2e-5
        )
    info = await peer.unary("GetInfo", teacher_pb2.TeacherServiceGetInfoRequest(), timeout_s=5)
    assert [model.model for model in info.models] == ["teacher"]
    assert len(info.kinds) == 5
    assert info.scored_tokens == sum(len(ids_list(rollout.completion_ids)) for rollout in rollouts)


async def test_a_direct_score_names_the_weights_that_judged(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its teacher follows a student, and has newer weights before the call ends."""

    async def follow(_: Any, resident: Resident, *__: Any) -> None:
        version = resident.weights.policy_version + 1 if resident.weights else 0
        resident.weights = weights_pb2.WeightsRef(policy_version=version, sha256=f"average-{version}")
        resident.engine.__dict__["_described_head"] = SimpleNamespace(sha256=f"head-{version}")

    monkeypatch.setattr("stillhouse.teacher.following.Follower.follow", follow)
    monkeypatch.setattr("stillhouse.teacher.service.DIRECT_BATCHES", 1)
    await desk.cluster.start("teacher")
    task = pb.TeacherTask(model="student", job_id="job_x", epoch=1, follows_student=True)
    long = ids_tensor([5] * 50)
    rollouts = [desk.rollout(group, pb.SCORE_KIND_HIDDEN, completion_ids=long) for group in range(3)]
    request = teacher_pb2.ScoreRequest(task=task, rollouts=rollouts)
    got = [part.score async for part in (await desk.peer()).stream("Score", request, timeout_s=20)]
    assert sorted(score.teacher_sha256 for score in got) == ["average-0", "average-1", "average-2"]
    for score in got:
        assert score.hidden.head_sha256 == score.teacher_sha256.replace("average", "head")


async def test_the_pull_of_an_average_is_part_of_its_turn(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[float] = []

    async def follow(*_: Any) -> None:
        await asyncio.sleep(PULL_S)

    monkeypatch.setattr("stillhouse.teacher.following.Follower.follow", follow)
    monkeypatch.setattr("stillhouse.teacher.schedule.Schedule.served", lambda *args: charged.append(args[-1]))

    async def charged_seconds() -> list[float]:
        return charged

    task = await desk.open("student")
    task.follows_student = True
    redis: Any = desk.cluster.ctx.redis
    await redis.hset(keys.teacher(task.model_sha256), desk.rollouts_stream, task.SerializeToString())
    await desk.add(desk.rollout(0))
    await desk.cluster.start("teacher")
    await desk.wait_for(1)
    assert (await wait_until(charged_seconds, timeout_s=5, what="the turn's end"))[0] >= PULL_S


async def test_calls_say_what_is_wrong(desk: Desk) -> None:
    await desk.cluster.start("teacher")
    peer = await desk.peer()
    for change, error in (({"model": "nobody"}, NotFoundError), ({"model_sha256": "0" * 64}, ConflictError)):
        fields: Any = {"model": "teacher", **change}
        request = teacher_pb2.EnsureModelRequest(**fields)
        with pytest.raises(error):
            await peer.unary("EnsureModel", request, timeout_s=20)
    task = pb.TeacherTask(model="teacher")
    bad = teacher_pb2.ScoreRequest(task=task, rollouts=[desk.rollout(0, prompt_ids=ids_tensor([5] * 64))])
    with pytest.raises(WireError, match="the teacher reads 64"):
        [part async for part in peer.stream("Score", bad, timeout_s=20)]
    answer = await peer.unary("SyncWeights", teacher_pb2.TeacherServiceSyncWeightsRequest(job_id="job_x"), timeout_s=5)
    assert not answer.HasField("weights"), "no model here follows that job"


def start_process(module: str, env: dict[str, str], log_file: Path) -> subprocess.Popen[bytes]:
    with log_file.open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", module], env=env, stdout=log, stderr=log)


async def test_sigterm_hands_back_and_exits_0(desk: Desk, redis_url: str) -> None:
    desk.cluster.add_model("big", seed=3, num_layers=40, hidden_size=256, num_heads=4, max_position_embeddings=2048)
    await desk.open("big")
    long = ids_tensor([5] * 1500)
    for group in range(40):
        await desk.add(desk.rollout(group, completion_ids=long))
    home = desk.cluster.settings.home
    env = {key: value for key, value in os.environ.items() if not key.startswith("STILLHOUSE_")}
    env |= {
        "STILLHOUSE_HOME": str(home),
        "STILLHOUSE_REDIS_URL": redis_url,
        "STILLHOUSE_INTERNAL_TOKEN": desk.cluster.settings.internal_token,
        "STILLHOUSE_INSTANCE": "teacher-p",
        "STILLHOUSE_LEASE_S": "30",
        "STILLHOUSE_THREADS": "1",
        # several forward passes per claim, so that the signal comes between two
        "STILLHOUSE_TEACHER_BATCH_TOKENS": "1600",
        "OMP_NUM_THREADS": "1",
    }
    process = start_process("stillhouse.teacher", env, home / "teacher.log")
    try:
        await wait_until(desk.scores, timeout_s=45, what="the first score")
        process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(asyncio.to_thread(process.wait), 20)
    finally:
        process.kill()
        process.wait()
    assert code == 0, (home / "teacher.log").read_text()[-3000:]
    done = len(await desk.scores())
    assert done < 40, "it stopped in the middle"
    left = await desk.queue.length(desk.rollouts_stream)
    assert done + left == 40, "nothing is lost, nothing is there twice"
    claimed = await desk.queue.reclaim(desk.rollouts_stream, keys.TEACHERS_GROUP, "other", 3600, 40)
    fresh = await desk.queue.claim([desk.rollouts_stream], keys.TEACHERS_GROUP, "other", 40, block_ms=1)
    assert len(claimed) + len(fresh) == left, "what it held was handed back, not left to run out"

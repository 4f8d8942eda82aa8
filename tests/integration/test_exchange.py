"""The trainer's end of the queue when things go wrong between server and client. On a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from stillhouse.core.queue import keys
from stillhouse.core.queue.client import connect, connect_blocking
from stillhouse.core.queue.registry import Registry
from stillhouse.core.queue.streams import Entry, Scope, WorkQueue
from stillhouse.core.rollouts import add_further, score_mark, scores_of
from stillhouse.core.tasks import cancel_all
from stillhouse.core.tensors import floats_tensor, ids_list, ids_tensor
from stillhouse.trainer.exchange import Exchange
from stillhouse.v1 import rollout_pb2
from tests.waiting import wait_until

JOB = Scope("job_exchange", 3)


class LosingQueue(WorkQueue):
    """Loses the answer of a claim: the server has delivered, the client never hears of it."""

    def __init__(self, redis: Any, blocking: Any) -> None:
        super().__init__(redis, blocking)
        self.losses = 1

    async def claim(self, *args: Any, **kwargs: Any) -> list[Entry]:
        entries = await super().claim(*args, **kwargs)
        if entries and self.losses:
            self.losses -= 1
            raise RedisConnectionError("connection reset by peer")
        return entries


@pytest.fixture
async def parts(redis_url: str) -> AsyncIterator[Any]:
    redis, blocking = connect(redis_url), connect_blocking(redis_url)
    await redis.hset(keys.job(JOB.job_id), "epoch", str(JOB.epoch))  # type: ignore[misc]
    queue = LosingQueue(redis, blocking)
    exchange = Exchange(
        JOB,
        queue=queue,
        redis=redis,
        registry=Registry(redis),
        peers=None,  # type: ignore[arg-type]
        consumer="trainer-0",
        log=structlog.get_logger(),
    )
    yield SimpleNamespace(redis=redis, queue=queue, exchange=exchange)
    await redis.aclose()
    await blocking.aclose()


def group(number: int) -> rollout_pb2.PromptGroup:
    return rollout_pb2.PromptGroup(group=number, group_id=str(number), sample_indices=[0], seeds=[1], teacher="main")


def score(number: int, teacher: str = "main") -> bytes:
    rollout = rollout_pb2.Rollout(
        sample_id=f"{number}/0", group=number, teacher=teacher, completion_ids=ids_tensor([1, 2])
    )
    sampled = rollout_pb2.SampledScore(teacher_logprobs=floats_tensor([-1.0, -2.0]))
    return rollout_pb2.Score(rollout=rollout, sampled=sampled).SerializeToString()


async def test_a_lost_answer_loses_no_score(parts: Any) -> None:
    await parts.exchange.open()
    futures = [await parts.exchange.plan(group(number)) for number in range(3)]
    taking = asyncio.create_task(parts.exchange.run())
    for number in range(3):
        await parts.queue.add(JOB, keys.scored(JOB.job_id, JOB.epoch), f"score:{number}/0:0", score(number))
    groups = await asyncio.wait_for(asyncio.gather(*futures), 20)
    assert parts.queue.losses == 0, "the answer was lost, so the test tested something"
    assert [g.samples[0].sample_id for g in groups] == ["0/0", "1/0", "2/0"]
    await parts.exchange.done([sample for g in groups for sample in g.samples])
    assert await parts.queue.length(keys.scored(JOB.job_id, JOB.epoch)) == 0
    await cancel_all([taking])


async def test_opening_an_epoch_takes_away_what_a_killed_trainer_left(parts: Any) -> None:
    old = Scope(JOB.job_id, 1)
    await parts.redis.hset(keys.job(JOB.job_id), "epoch", "1")
    stream = keys.rollouts(old.job_id, old.epoch, "main")
    await parts.queue.open_stream(old, stream, keys.TEACHERS_GROUP)
    await parts.queue.add(old, stream, "rollout:0/0:0", b"late")
    await parts.redis.sadd(keys.TEACHERS, "a" * 64)
    await parts.redis.hset(keys.teacher("a" * 64), stream, b"task")
    await parts.redis.hset(keys.teacher("a" * 64), keys.rollouts("job_other", 1, "main"), b"task")
    await parts.redis.hset(keys.job(JOB.job_id), "epoch", str(JOB.epoch))

    await parts.exchange.open()
    await parts.exchange.open_teachers({"main": rollout_pb2.TeacherTask(model_sha256="a" * 64)})
    fields = {field.decode() for field in await parts.redis.hkeys(keys.teacher("a" * 64))}
    assert fields == {keys.rollouts(JOB.job_id, JOB.epoch, "main"), keys.rollouts("job_other", 1, "main")}
    assert await parts.redis.keys(f"{keys.job(JOB.job_id)}:1:*") == []

    await parts.exchange.close()
    left = {key.decode() for key in await parts.redis.keys(f"{keys.job(JOB.job_id)}:*")}
    assert left == set()


async def test_a_put_back_rollout_is_a_new_attempt_and_ends_once(parts: Any) -> None:
    """A hidden score whose teacher is gone goes back for scoring."""
    await parts.exchange.open()
    await parts.exchange.open_teachers({"main": rollout_pb2.TeacherTask(model_sha256="a" * 64)})
    future = await parts.exchange.plan(group(7))
    taking = asyncio.create_task(parts.exchange.run())
    rollout = rollout_pb2.Rollout(sample_id="7/0", group=7, teacher="main", completion_ids=ids_tensor([1, 2]))
    lost = rollout_pb2.Score(rollout=rollout, hidden=rollout_pb2.HiddenScore())
    lost.hidden.blob.instance = "teacher-that-died"
    scored = keys.scored(JOB.job_id, JOB.epoch)
    await parts.queue.add(JOB, scored, "score:7/0:0", lost.SerializeToString())

    stream = keys.rollouts(JOB.job_id, JOB.epoch, "main")

    async def is_back() -> bool:
        return await parts.queue.length(stream) == 1

    await wait_until(is_back, timeout_s=20, what="the rollout to be put back")
    (entry,) = await parts.queue.claim([stream], keys.TEACHERS_GROUP, "teacher-1", 1, 100)
    assert rollout_pb2.Rollout.FromString(entry.payload).attempt == 1
    await parts.queue.hand_over(JOB, entry, scored, "score:7/0:1", score(7))
    assert not (await asyncio.wait_for(future, 20)).samples[0].is_failed
    await cancel_all([taking])


# -- mixtures --------------------------------------------------------------------------------------------------------

SCORED = keys.scored(JOB.job_id, JOB.epoch)
TASKS = {name: rollout_pb2.TeacherTask(model_sha256=sha * 64) for name, sha in (("main", "a"), ("second", "b"))}


def mixture(number: int) -> rollout_pb2.PromptGroup:
    made = group(number)
    made.further.add(teacher="second", teacher_prompt_ids=ids_tensor([7, 8, 9]))
    return made


async def asked(parts: Any, teacher: str) -> Entry:
    """The next rollout on a teacher's stream."""
    stream = keys.rollouts(JOB.job_id, JOB.epoch, teacher)

    async def found() -> Entry | None:
        entries = await parts.queue.claim([stream], keys.TEACHERS_GROUP, f"of-{teacher}", 1, 100)
        return entries[0] if entries else None

    return await wait_until(found, timeout_s=20, what=f"a rollout for teacher {teacher}")


async def say(parts: Any, payload: bytes, attempt: int = 0) -> None:
    rollout = rollout_pb2.Score.FromString(payload).rollout
    await parts.queue.add(JOB, SCORED, score_mark(rollout.sample_id, rollout.teacher, attempt), payload)


async def test_a_sample_of_a_mixture_ends_when_all_of_its_teachers_have_spoken(parts: Any) -> None:
    await parts.exchange.open()
    await parts.exchange.open_teachers(TASKS)
    future = await parts.exchange.plan(mixture(7))
    taking = asyncio.create_task(parts.exchange.run())
    await say(parts, score(7))
    entry = await asked(parts, "second")
    rollout = rollout_pb2.Rollout.FromString(entry.payload)
    assert (rollout.sample_id, rollout.teacher, rollout.attempt) == ("7/0", "second", 0)
    assert ids_list(rollout.teacher_prompt_ids) == [7, 8, 9]
    assert ids_list(rollout.completion_ids) == [1, 2]
    assert not future.done()
    await say(parts, score(7))  # the same word again says nothing new
    assert parts.exchange.num_ended == 0
    await parts.queue.hand_over(JOB, entry, SCORED, score_mark("7/0", "second"), score(7, "second"))
    (sample,) = (await asyncio.wait_for(future, 20)).samples
    assert [each.rollout.teacher for each in scores_of(sample.score)] == ["main", "second"]
    assert [each.teacher for each in sample.by_teacher()] == ["main", "second"]
    assert all(ids_list(each.score.rollout.completion_ids) == [1, 2] for each in sample.by_teacher())
    assert not sample.score.further[0].rollout.HasField("completion_ids"), "the journal holds the tokens once"
    assert (parts.exchange.num_ended, parts.exchange.num_failed) == (1, 0)
    await parts.exchange.done([sample])
    assert await parts.queue.length(SCORED) == 0
    await cancel_all([taking])


async def test_one_failed_teacher_is_the_end_of_the_sample_once(parts: Any) -> None:
    """What the others say then is late."""
    await parts.exchange.open()
    await parts.exchange.open_teachers(TASKS)
    future = await parts.exchange.plan(mixture(7))
    taking = asyncio.create_task(parts.exchange.run())
    failed = rollout_pb2.Score.FromString(score(7, "second"))
    failed.failed.reason = "teacher_error"
    await say(parts, failed.SerializeToString())
    (sample,) = (await asyncio.wait_for(future, 20)).samples
    assert sample.is_failed
    assert (parts.exchange.num_ended, parts.exchange.num_failed) == (1, 1)
    await parts.exchange.done([sample])
    await say(parts, score(7))

    async def is_dropped() -> bool:
        return await parts.queue.length(SCORED) == 0

    await wait_until(is_dropped, timeout_s=20, what="the late word to leave the queue")
    assert parts.exchange.num_ended == 1
    await cancel_all([taking])


async def test_all_teachers_of_a_journalled_sample_are_asked_again(parts: Any) -> None:
    """Replay: the completion is there, so nobody waits for another."""
    parts.queue.losses = 0
    await parts.exchange.open()
    await parts.exchange.open_teachers(TASKS)
    journalled = rollout_pb2.Score.FromString(score(7))
    journalled.rollout.attempt = 3
    add_further(journalled, rollout_pb2.Score.FromString(score(7, "second")))
    future = await parts.exchange.rescore(7, [journalled])
    taking = asyncio.create_task(parts.exchange.run())
    for teacher in ("second", "main"):
        entry = await asked(parts, teacher)
        rollout = rollout_pb2.Rollout.FromString(entry.payload)
        assert (rollout.teacher, rollout.attempt, rollout.epoch) == (teacher, 1, JOB.epoch)
        await parts.queue.hand_over(JOB, entry, SCORED, score_mark("7/0", teacher, 1), score(7, teacher))
    (sample,) = (await asyncio.wait_for(future, 20)).samples
    assert [each.teacher for each in sample.by_teacher()] == ["main", "second"], "in the order of the journal"
    await cancel_all([taking])


async def test_a_full_queue_server_delays_the_other_teachers_of_a_mixture(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the claim once, and all that was in flight was sampled anew."""
    monkeypatch.setattr("stillhouse.trainer.exchange.FULL_PAUSE_S", 0.01)
    await parts.exchange.open()
    stream = keys.rollouts(JOB.job_id, JOB.epoch, "other")
    await parts.queue.open_stream(JOB, stream, keys.TEACHERS_GROUP)
    mixture = group(0)
    mixture.further.add(teacher="other")
    future = await parts.exchange.plan(mixture)
    add, refusals = parts.queue.add, 3

    async def full(scope: Any, to: str, *args: Any) -> Any:
        nonlocal refusals
        if to == stream and refusals:
            refusals -= 1
            raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'")
        return await add(scope, to, *args)

    monkeypatch.setattr(parts.queue, "add", full)
    run = asyncio.create_task(parts.exchange.run())
    scored = keys.scored(JOB.job_id, JOB.epoch)
    await add(JOB, scored, score_mark("0/0", "main"), score(0))
    await wait_until(lambda: parts.queue.length(stream), timeout_s=10, what="the other teacher to be asked")
    assert refusals == 0
    assert not run.done()
    await add(JOB, scored, score_mark("0/0", "other"), score(0, "other"))
    [sample] = (await asyncio.wait_for(future, 10)).samples
    assert not sample.is_failed
    assert await parts.queue.length(stream) == 1, "asked once"
    run.cancel()


# -- samples that are tried again --------------------------------------------------------------------------------------

PROMPTS = keys.prompts(JOB.job_id, JOB.epoch)


def pair(number: int) -> rollout_pb2.PromptGroup:
    group = rollout_pb2.PromptGroup(group=number, group_id=str(number), sample_indices=[0, 1], seeds=[7, 8])
    group.teacher = "main"
    return group


def failure(name: str, ids: list[int], attempt: int = 0) -> bytes:
    rollout = rollout_pb2.Rollout(sample_id=name, teacher="main", attempt=attempt, index=int(name[-1]))
    if ids:
        rollout.completion_ids.CopyFrom(ids_tensor(ids))
    failed = rollout_pb2.Failure(reason="bad", message="it was bad", service="sampler", attempts=1)
    return rollout_pb2.Score(rollout=rollout, failed=failed).SerializeToString()


async def hand_in(parts: Any, name: str, payload: bytes, attempt: int = 0) -> None:
    await parts.queue.add(JOB, SCORED, score_mark(name, "main", attempt), payload)


def answer(name: str, attempt: int = 0) -> bytes:
    rollout = rollout_pb2.Rollout(sample_id=name, teacher="main", attempt=attempt, index=int(name[-1]))
    rollout.completion_ids.CopyFrom(ids_tensor([1, 2]))
    sampled = rollout_pb2.SampledScore(teacher_logprobs=floats_tensor([-1.0, -2.0]))
    return rollout_pb2.Score(rollout=rollout, sampled=sampled).SerializeToString()


async def failed(parts: Any, number: int) -> None:
    async def reached() -> bool:
        return parts.exchange.num_failed == number

    await wait_until(reached, timeout_s=20, what=f"{number} failures")


async def planned(parts: Any) -> tuple[Any, Any]:
    parts.queue.losses = 0
    await parts.exchange.open()
    await parts.exchange.open_teachers(TASKS)
    future = await parts.exchange.plan(pair(7))
    await parts.queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "sampler-0", 1, 100)
    return future, asyncio.create_task(parts.exchange.run())


async def test_a_sample_without_text_is_written_again_with_its_seed(parts: Any) -> None:
    future, taking = await planned(parts)
    await hand_in(parts, "7/1", failure("7/1", []))
    await failed(parts, 1)
    assert "not known here, or is being worked on" in await parts.exchange.retry("7/0")
    assert await parts.exchange.retry("7/1") == ""
    assert (parts.exchange.num_failed, parts.exchange.num_ended) == (0, 0)
    assert "being worked on" in await parts.exchange.retry("7/1"), "once at a time"
    (entry,) = await parts.queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "sampler-0", 5, 100)
    again = rollout_pb2.PromptGroup.FromString(entry.payload)
    assert (list(again.sample_indices), list(again.seeds), again.group_id) == ([1], [8], "7")
    await hand_in(parts, "7/0", answer("7/0"))
    await hand_in(parts, "7/1", answer("7/1", again.attempt), again.attempt)
    group = await asyncio.wait_for(future, 20)
    assert [(sample.sample_id, sample.is_failed) for sample in group.samples] == [("7/0", False), ("7/1", False)]
    await parts.exchange.done(group.samples)
    assert await parts.queue.length(SCORED) == 0, "nothing of the failure is left"
    await cancel_all([taking])


async def test_a_complete_group_waits_for_what_is_tried_again_until_its_step_is_put_together(parts: Any) -> None:
    future, taking = await planned(parts)
    await hand_in(parts, "7/0", answer("7/0"))
    await hand_in(parts, "7/1", failure("7/1", [1, 2]))
    group = await asyncio.wait_for(future, 20)
    assert [sample.is_failed for sample in group.samples] == [False, True]
    assert await parts.exchange.retry("7/1") == ""
    settled = asyncio.create_task(parts.exchange.settled([group]))
    stream = keys.rollouts(JOB.job_id, JOB.epoch, "main")
    (entry,) = await parts.queue.claim([stream], keys.TEACHERS_GROUP, "teacher-0", 1, 100)
    attempt = rollout_pb2.Rollout.FromString(entry.payload).attempt
    assert attempt > 0
    await hand_in(parts, "7/1", failure("7/1", [1, 2], attempt), attempt)
    await asyncio.wait_for(settled, 20)
    assert [sample.is_failed for sample in group.samples] == [False, True], "it failed again"
    assert (parts.exchange.num_failed, parts.exchange.num_ended) == (1, 2)
    assert "is done or about to be" in await parts.exchange.retry("7/1")
    await parts.exchange.done(group.samples)
    assert await parts.queue.length(SCORED) == 0
    await cancel_all([taking])


async def test_a_retry_that_the_queue_does_not_take_changes_nothing(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    future, taking = await planned(parts)
    await hand_in(parts, "7/0", answer("7/0"))
    await hand_in(parts, "7/1", failure("7/1", []))
    group = await asyncio.wait_for(future, 20)

    async def lost(*args: Any) -> None:
        raise RedisConnectionError("connection reset by peer")

    with monkeypatch.context() as broken:
        broken.setattr(parts.exchange, "_add", lost)
        with pytest.raises(RedisConnectionError):
            await parts.exchange.retry("7/1")
    await asyncio.wait_for(parts.exchange.settled([group]), 5)
    assert [sample.is_failed for sample in group.samples] == [False, True]
    assert (parts.exchange.num_failed, parts.exchange.num_ended) == (1, 2)
    await parts.exchange.done(group.samples)
    assert await parts.queue.length(SCORED) == 0
    await cancel_all([taking])


async def test_an_evaluation_that_has_all_its_samples_is_not_reopened(parts: Any) -> None:
    await parts.exchange.open()
    parts.queue.losses = 0
    group = pair(7)
    group.purpose = rollout_pb2.PURPOSE_EVALUATE
    future = await parts.exchange.plan(group)
    taking = asyncio.create_task(parts.exchange.run())
    await hand_in(parts, "7/0", answer("7/0"))
    await hand_in(parts, "7/1", failure("7/1", []))
    await asyncio.wait_for(future, 20)
    assert "is done or about to be" in await parts.exchange.retry("7/1")
    await cancel_all([taking])

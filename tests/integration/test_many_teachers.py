"""Ten teachers on a process with room for two, and two jobs on one teacher: loads, turns and accounts, for real."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.queue.streams import PAYLOAD
from stillhouse.core.tensors import ids_list, ids_tensor
from stillhouse.v1 import teacher_pb2
from tests.cluster import Cluster
from tests.integration.test_teacher_service import Desk, open_job
from tests.waiting import wait_until

MODELS = [f"m{number}" for number in range(10)]
ROOM = 2
STEPS, SAMPLES = 3, 60


@pytest.fixture
async def cluster(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path, redis_url, teacher_batch_tokens=64)
    for number, name in enumerate(MODELS):
        made.add_model(name, seed=number, max_position_embeddings=64)
    size = 4 * made.models.get("m0").num_parameters
    made.settings = made.settings.model_copy(update={"teacher_memory_gib": (ROOM + 0.5) * size / 2**30})
    try:
        yield made
    finally:
        await made.close()


async def info(desk: Desk) -> Any:
    return await (await desk.peer()).unary("GetInfo", teacher_pb2.TeacherServiceGetInfoRequest(), timeout_s=10)


def loads_in_order(arrivals: Sequence[str]) -> int:
    """Loads if work was done as it comes, least recently used models out first."""
    resident: OrderedDict[str, None] = OrderedDict()
    loads = 0
    for model in arrivals:
        if model not in resident:
            loads += 1
            if len(resident) == ROOM:
                resident.popitem(last=False)
        resident[model] = None
        resident.move_to_end(model)
    return loads


async def test_ten_teachers_with_room_for_two_are_loaded_once_a_step(cluster: Cluster) -> None:
    first = await open_job(cluster)
    desks = {name: Desk(cluster, first.scope, name) for name in MODELS}
    for name, desk in desks.items():
        await desk.open(name)
    draw, arrivals, in_order = random.Random(0), [], 0
    await cluster.start("teacher")
    for step in range(STEPS):
        steps_arrivals = draw.choices(MODELS, k=SAMPLES)
        async with cluster.ctx.redis.pipeline(transaction=True) as pipe:  # a step arrives at once, in any order
            for number, name in enumerate(steps_arrivals):
                rollout = desks[name].rollout(step * SAMPLES + number)
                pipe.xadd(desks[name].rollouts_stream, {PAYLOAD: rollout.SerializeToString()})
            await pipe.execute()
        arrivals += steps_arrivals

        async def scored(wanted: int = len(arrivals)) -> bool:
            return len(await first.scores()) >= wanted

        await wait_until(scored, timeout_s=60, what=f"the scores of step {step}")
        assert {score.rollout.teacher for score in (await first.scores()).values()} <= set(MODELS)
    found = await info(first)
    loads = sum(count.loads for count in found.loads)
    in_order = loads_in_order(arrivals)
    print(
        f"{loads} loads of {len(MODELS)} teachers in {STEPS} steps of {SAMPLES} samples; in order of arrival {in_order}"
    )
    assert len(MODELS) <= loads <= len(MODELS) * STEPS < in_order
    assert all(count.load_s > 0 for count in found.loads)
    assert len(found.models) == ROOM
    scores = await first.scores()
    assert sum(score.model_loads for score in scores.values()) == loads, "each load is told with a sample"
    for (_, _), score in scores.items():
        assert score.teacher_sha256 == cluster.models.get(score.rollout.teacher).sha256
    (account,) = found.accounts
    assert (account.job_id, account.model_loads) == (first.scope.job_id, loads)


async def test_a_small_job_waits_for_a_batch_of_a_large_one(cluster: Cluster) -> None:
    """With accounts of both."""
    large, small = [await open_job(cluster) for _ in range(2)]
    for desk, count, token in ((large, 100, 5), (small, 10, 6)):
        await desk.open("m0")
        for group in range(count):
            await desk.add(desk.rollout(group, completion_ids=ids_tensor([token] * 8)))
    await cluster.start("teacher")
    await small.wait_for(10)
    await large.wait_for(100, timeout_s=60)
    ends: Any = await cluster.ctx.redis.xrange(small.scored_stream)
    others: Any = await cluster.ctx.redis.xrange(large.scored_stream)
    before = sum(_id(entry) <= _id(ends[-1]) for entry in others)
    a_batch = 64 // 11  # of the shortest
    assert before <= 10 + 2 * a_batch, f"{before} of the large job's samples before the last of the small one's ten"
    accounts = {account.job_id: account for account in (await info(small)).accounts}
    for desk, count in ((large, 100), (small, 10)):
        scores = (await desk.scores()).values()
        account = accounts[desk.scope.job_id]
        assert account.scored_tokens == 8 * count == sum(len(ids_list(s.rollout.completion_ids)) for s in scores)
        assert account.score_s > 0
        assert account.score_bytes == sum(s.ByteSize() - s.rollout.ByteSize() for s in scores)


def _id(entry: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in entry[0].split(b"-"))


async def test_a_sample_scored_again_comes_from_the_cache(cluster: Cluster) -> None:
    desk = await open_job(cluster)
    await desk.open("m0")
    rollout = await desk.add(desk.rollout(3))
    await cluster.start("teacher")
    await desk.wait_for(1)
    rollout.attempt = 1
    await desk.add(rollout)
    await desk.wait_for(2)
    first, again = (await desk.scores()).values()
    assert (first.is_cached, again.is_cached) == (False, True)
    assert first.sampled == again.sampled
    assert (await info(desk)).cache_hits == 1

"""One behaviour suite for every queue back end: in memory, simulated, Valkey, and Debian's Redis where installed."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import structlog

from stillhouse.core.errors import TooLargeError
from stillhouse.core.queue import keys
from stillhouse.core.queue.claims import Claims
from stillhouse.core.queue.client import connect, connect_blocking
from stillhouse.core.queue.streams import MAX_DELIVERIES, MAX_ENTRY_BYTES, Outcome, QueueBackend, Scope, WorkQueue
from tests.chaos.sim.redis_client import Line, SimRedis
from tests.chaos.sim.redis_server import RedisServer
from tests.conftest import free_port, server_answers, stop_valkey
from tests.fakes import MemoryQueue
from tests.waiting import wait_until

JOB = Scope("job_contract", 1)
PROMPTS = keys.prompts(JOB.job_id, JOB.epoch)
ROLLOUTS = keys.rollouts(JOB.job_id, JOB.epoch, "main")
NOW_MS = 10
SetEpoch = Callable[[int], Awaitable[None]]


@pytest.fixture(scope="session")
def debian_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Debian's redis-server (7.0), the oldest command set that we promise to run on."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert server_answers(process, port)
    yield f"redis://127.0.0.1:{port}/0"
    stop_valkey(process)


async def simulated_queue() -> tuple[QueueBackend, SetEpoch]:
    """The real class on the queue server of the simulation, here in real time."""
    line = Line(RedisServer(), random.Random(0), lambda *_: None)
    redis: Any = SimRedis(line)

    async def set_simulated(epoch: int) -> None:
        await redis.hset(keys.job(JOB.job_id), "epoch", str(epoch))

    await set_simulated(JOB.epoch)
    blocking: Any = SimRedis(line, retries=0)
    return WorkQueue(redis, blocking), set_simulated


@pytest.fixture(params=["memory", "simulated", "valkey", "redis"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[tuple[QueueBackend, SetEpoch]]:
    """(queue, function that does to the job's epoch what a claim does)."""
    if request.param == "memory":
        memory = MemoryQueue()

        async def set_memory(epoch: int) -> None:
            memory.set_epoch(JOB.job_id, epoch)

        await set_memory(JOB.epoch)
        yield memory, set_memory
        return
    if request.param == "simulated":
        yield await simulated_queue()
        return
    url = request.getfixturevalue("redis_url" if request.param == "valkey" else "debian_redis_url")
    redis, blocking = connect(url), connect_blocking(url)
    await redis.flushall()

    async def set_real(epoch: int) -> None:
        await redis.hset(keys.job(JOB.job_id), "epoch", str(epoch))  # type: ignore[misc]

    await set_real(JOB.epoch)
    yield WorkQueue(redis, blocking), set_real
    await redis.aclose()
    await blocking.aclose()


@pytest.fixture
async def queue(backend: tuple[QueueBackend, SetEpoch]) -> QueueBackend:
    queue, _ = backend
    await queue.open_stream(JOB, PROMPTS, keys.SAMPLERS_GROUP)
    await queue.open_stream(JOB, ROLLOUTS, keys.TEACHERS_GROUP)
    return queue


async def claim_one(
    queue: QueueBackend, consumer: str = "a", stream: str = PROMPTS, group: str = keys.SAMPLERS_GROUP
) -> Any:
    (entry,) = await queue.claim([stream], group, consumer, 1, NOW_MS)
    return entry


async def test_entries_come_in_order_and_once(queue: QueueBackend) -> None:
    for number in range(5):
        assert await queue.add(JOB, PROMPTS, f"plan:{number}", b"%d" % number) is Outcome.DONE
    first = await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "a", 3, NOW_MS)
    second = await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "b", 3, NOW_MS)
    assert [entry.payload for entry in first + second] == [b"0", b"1", b"2", b"3", b"4"]
    assert await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "c", 3, NOW_MS) == []


async def test_a_group_sees_entries_that_were_added_before_it(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"early")
    await queue.open_stream(JOB, PROMPTS, "another group")
    assert (await claim_one(queue, group="another group")).payload == b"early"


async def test_a_stream_that_was_closed_takes_nothing_although_the_epoch_is_the_newest(queue: QueueBackend) -> None:
    """A trainer that drains closes its streams while samplers still write: their work must not pile up in Redis."""
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue)
    await queue.close_epoch(JOB)
    assert await queue.hand_over(JOB, entry, ROLLOUTS, "rollout:0/0:0", b"late") is Outcome.CLOSED
    assert await queue.add(JOB, PROMPTS, "plan:1", b"late") is Outcome.CLOSED
    assert (await queue.length(PROMPTS), await queue.length(ROLLOUTS)) == (0, 0)


async def test_work_that_waits_is_what_could_be_had(queue: QueueBackend) -> None:
    async def waits(min_idle_s: float = 60.0) -> dict[str, int]:
        return await queue.waiting([PROMPTS, ROLLOUTS, "sh:gone"], "workers", min_idle_s)

    assert await queue.waiting([], "workers", 1.0) == {}
    await queue.open_stream(JOB, PROMPTS, "workers")
    await queue.open_stream(JOB, ROLLOUTS, "workers")
    assert await waits() == {PROMPTS: 0, ROLLOUTS: 0}
    for number in range(3):
        await queue.add(JOB, ROLLOUTS, f"mark {number}", b"work")
    assert await waits() == {PROMPTS: 0, ROLLOUTS: 3}
    entries = await queue.claim([ROLLOUTS], "workers", "a", 2, NOW_MS)
    assert await waits() == {PROMPTS: 0, ROLLOUTS: 1}
    await queue.ack_delete(entries[:1])
    assert (await waits())[ROLLOUTS] == 1
    await queue.hand_back(entries[1:], "a")
    assert (await waits())[ROLLOUTS] == 2, "what was handed back, too"
    assert (await waits(0.0))[ROLLOUTS] == 2


async def test_adding_twice_under_one_mark_adds_once(queue: QueueBackend) -> None:
    assert await queue.add(JOB, PROMPTS, "plan:0", b"x") is Outcome.DONE
    assert await queue.add(JOB, PROMPTS, "plan:0", b"x") is Outcome.DUPLICATE
    assert await queue.length(PROMPTS) == 1


async def test_hand_over_moves_the_work_in_one_step(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue)
    assert await queue.hand_over(JOB, entry, ROLLOUTS, "rollout:0/0:0", b"rollout") is Outcome.DONE
    assert (await queue.length(PROMPTS), await queue.length(ROLLOUTS)) == (0, 1)


async def test_the_source_stays_until_its_last_sample(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"group of two")
    entry = await claim_one(queue)
    await queue.hand_over(JOB, entry, ROLLOUTS, "rollout:0/0:0", b"first", last=False)
    assert (await queue.length(PROMPTS), await queue.length(ROLLOUTS)) == (1, 1)
    await queue.hand_over(JOB, entry, ROLLOUTS, "rollout:0/1:0", b"second", last=True)
    assert (await queue.length(PROMPTS), await queue.length(ROLLOUTS)) == (0, 2)


async def test_two_holders_of_one_entry_hand_over_one_result(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    slow = await claim_one(queue, "slow")
    (thief,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "thief", 0.0, 10)
    assert await queue.hand_over(JOB, thief, ROLLOUTS, "rollout:0/0:0", b"thief") is Outcome.DONE
    assert await queue.hand_over(JOB, slow, ROLLOUTS, "rollout:0/0:0", b"slow") is Outcome.DUPLICATE
    assert (await claim_one(queue, "t", ROLLOUTS, keys.TEACHERS_GROUP)).payload == b"thief"
    assert await queue.length(ROLLOUTS) == 1


async def test_a_new_attempt_is_not_a_duplicate(queue: QueueBackend) -> None:
    assert await queue.add(JOB, ROLLOUTS, "rollout:0/0:0", b"first attempt") is Outcome.DONE
    assert await queue.add(JOB, ROLLOUTS, "rollout:0/0:1", b"second attempt") is Outcome.DONE


async def test_a_silent_holder_loses_its_claim_and_a_living_one_does_not(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue, "a")
    assert await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "b", 60.0, 10) == []
    await queue.renew([entry], "a")
    assert await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "b", 60.0, 10) == []
    (taken,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "b", 0.0, 10)
    assert taken.payload == b"prompt"
    assert taken.deliveries == 2


async def test_handing_back_is_found_at_once_and_renewing_is_no_delivery(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue, "a")
    for _ in range(10):
        await queue.renew([entry], "a")
    await queue.hand_back([entry], "a")
    (taken,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "b", 60.0, 10)
    assert taken.deliveries <= 2
    assert not taken.is_exhausted


async def test_an_entry_that_kills_its_holders_is_exhausted(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"poison")
    await claim_one(queue, "victim")
    entry = None
    for _ in range(MAX_DELIVERIES):
        (entry,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "next victim", 0.0, 10)
    assert entry is not None
    assert entry.is_exhausted
    await queue.hand_over(JOB, entry, ROLLOUTS, "score:0/0:0", b"failed", dead=b"why")
    assert await queue.length(keys.dead(JOB.job_id, JOB.epoch)) == 1


async def test_a_closed_epoch_takes_nothing(backend: tuple[QueueBackend, SetEpoch], queue: QueueBackend) -> None:
    _, set_epoch = backend
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    zombie = await claim_one(queue)
    await set_epoch(JOB.epoch + 1)
    assert await queue.add(JOB, PROMPTS, "plan:1", b"late") is Outcome.CLOSED
    assert await queue.hand_over(JOB, zombie, ROLLOUTS, "rollout:0/0:0", b"late") is Outcome.CLOSED
    assert await queue.open_stream(JOB, ROLLOUTS, keys.TEACHERS_GROUP) is Outcome.CLOSED
    assert await queue.length(ROLLOUTS) == 0


async def test_closing_an_epoch_leaves_nothing_behind(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    await queue.close_epoch(JOB)
    assert await queue.length(PROMPTS) == 0
    assert await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "a", 1, NOW_MS) == []
    assert await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "a", 0.0, 1) == []


async def test_marks_tell_what_was_handed_over(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue)
    await queue.hand_over(JOB, entry, ROLLOUTS, "rollout:0/0:0", b"rollout")
    assert await queue.marked(JOB, ["rollout:0/0:0", "rollout:0/1:0"]) == {"rollout:0/0:0"}
    assert await queue.marked(JOB, []) == set()


async def test_five_graceful_stops_do_not_make_a_sample_poison(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue)
    for _ in range(MAX_DELIVERIES + 3):
        await queue.hand_back([entry], "a")
        (entry,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "a", 60.0, 10)
    assert not entry.is_exhausted


async def test_renewing_takes_nothing_back_from_who_took_it_over(queue: QueueBackend) -> None:
    """After a long freeze: the old holder's renewal must neither own the claim again nor keep it from going stale."""
    for number in range(2):
        await queue.add(JOB, PROMPTS, f"plan:{number}", b"%d" % number)
    entries = await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "frozen", 2, NOW_MS)
    (taken,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "thief", 0.0, 1)
    await asyncio.sleep(0.05)
    assert await queue.renew(entries, "frozen") == [entries[0]]
    assert await queue.renew([taken], "thief") == []
    assert await queue.renew(entries, "frozen") == [entries[0]], "the thief still owns it"
    assert await queue.renew([entries[1]], "frozen") == [], "what was not taken over is still its own"


async def test_a_refused_renewal_does_not_reset_the_idle_time_of_the_new_holder(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    entry = await claim_one(queue, "frozen")
    await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "thief", 0.0, 1)
    await asyncio.sleep(0.2)
    await queue.renew([entry], "frozen")
    (again,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "next", 0.15, 1)
    assert again.deliveries == 3, "two takeovers; renewals are no deliveries"


async def test_handing_back_leaves_alone_what_another_took_over(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    entry = await claim_one(queue, "frozen")
    (taken,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "thief", 0.0, 1)
    await queue.hand_back([entry], "frozen")
    assert await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "next", 60.0, 1) == []
    assert await queue.renew([taken], "thief") == []


async def test_renewing_what_is_done_or_closed_is_harmless(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    entry = await claim_one(queue)
    await queue.ack_delete([entry])
    assert await queue.renew([entry], "a") == [entry]
    await queue.hand_back([entry], "a")
    await queue.close_epoch(JOB)
    assert await queue.renew([entry], "a") == [entry]
    await queue.hand_back([entry], "a")


async def test_claims_forget_what_was_taken_over(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    async with Claims(queue, "frozen", 0.15, structlog.get_logger()) as claims:
        await claims.take([PROMPTS], keys.SAMPLERS_GROUP, 1, NOW_MS)
        assert claims.num_held == 1
        (taken,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "thief", 0.0, 1)
        await wait_until(lambda: claims.num_held == 0, timeout_s=5, what="the claim to be dropped")
    assert await queue.renew([taken], "thief") == [], "leaving the block handed nothing back"


async def test_what_a_worker_has_so_far_is_found_by_the_next_holder(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    entry = await claim_one(queue)
    assert not entry.was_held
    assert await queue.partials(entry) == []
    assert await queue.append_partial(JOB, entry, "a", 0, b"first") is Outcome.DONE
    assert await queue.append_partial(JOB, entry, "a", 1, b"second \x00\xff") is Outcome.DONE
    (taken,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "b", 0.0, 1)
    assert taken.was_held
    assert await queue.partials(taken) == [b"first", b"second \x00\xff"]
    assert await queue.append_partial(JOB, taken, "b", 2, b"third") is Outcome.DONE
    assert await queue.append_partial(JOB, entry, "a", 2, b"third of the old holder") is Outcome.LOST
    assert len(await queue.partials(taken)) == 3


async def test_a_part_is_appended_once_and_only_to_what_its_writer_knows(queue: QueueBackend) -> None:
    """Two holders of one name: a process that was started again while its predecessor is frozen."""
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    entry = await claim_one(queue)
    assert await queue.append_partial(JOB, entry, "a", 0, b"part") is Outcome.DONE
    assert await queue.append_partial(JOB, entry, "a", 0, b"part") is Outcome.DONE, "the answer was lost, say"
    assert await queue.append_partial(JOB, entry, "a", 0, b"other") is Outcome.LOST
    assert await queue.append_partial(JOB, entry, "a", 2, b"other") is Outcome.LOST
    assert await queue.partials(entry) == [b"part"]


async def test_parts_leave_with_their_entry_and_with_the_epoch(queue: QueueBackend) -> None:
    for number in range(2):
        await queue.add(JOB, PROMPTS, f"plan:{number}", b"group of two")
    done, left = await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "a", 2, NOW_MS)
    for entry in (done, left):
        await queue.append_partial(JOB, entry, "a", 0, b"part")
    await queue.hand_over(JOB, done, ROLLOUTS, "rollout:0/0:0", b"one", last=False)
    assert await queue.partials(done) == [b"part"], "the other sample still needs it"
    await queue.hand_over(JOB, done, ROLLOUTS, "rollout:0/1:0", b"two")
    assert await queue.partials(done) == []
    assert await queue.append_partial(JOB, done, "a", 0, b"late") is Outcome.LOST
    await queue.close_epoch(JOB)
    assert await queue.partials(left) == []
    assert await queue.append_partial(JOB, left, "a", 0, b"late") is Outcome.CLOSED
    assert await queue.partials(left) == []


async def test_parts_leave_with_an_entry_that_is_dropped(queue: QueueBackend) -> None:
    for number in range(3):
        await queue.add(JOB, PROMPTS, f"plan:{number}", b"group")
    first, bare, other = await queue.claim([PROMPTS], keys.SAMPLERS_GROUP, "a", 3, NOW_MS)
    for entry in (first, other):
        await queue.append_partial(JOB, entry, "a", 0, b"part")
    assert await queue.ack_delete([bare, first]) == 2
    assert (await queue.partials(first), await queue.partials(other)) == ([], [b"part"])
    assert await queue.ack_delete([first]) == 0
    assert await queue.append_partial(JOB, first, "a", 0, b"late") is Outcome.LOST


async def test_the_parts_of_an_epoch_are_found_from_its_streams() -> None:
    assert {keys.partials_beside(stream) for stream in (PROMPTS, ROLLOUTS)} == {keys.partials(JOB.job_id, JOB.epoch)}


async def test_a_closed_epoch_takes_no_parts(backend: tuple[QueueBackend, SetEpoch], queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    zombie = await claim_one(queue)
    await backend[1](JOB.epoch + 1)
    assert await queue.append_partial(JOB, zombie, "a", 0, b"late") is Outcome.CLOSED
    assert await queue.partials(zombie) == []


async def test_deliveries_count_anew_with_every_progress_and_only_then(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    entry = await claim_one(queue)
    for number in range(MAX_DELIVERIES + 3):
        assert await queue.append_partial(JOB, entry, "a", number, b"%d" % number) is Outcome.DONE
        (entry,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "a", 0.0, 1)
        assert entry.deliveries == 2
    for _ in range(MAX_DELIVERIES - 1):
        assert not entry.is_exhausted
        (entry,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "a", 0.0, 1)
    assert entry.is_exhausted


async def test_a_claim_that_made_progress_goes_back_as_a_fresh_one(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"0")
    await claim_one(queue, "victim")
    for _ in range(3):
        await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "victim", 0.0, 1)
    async with Claims(queue, "a", 0.0, structlog.get_logger()) as claims:
        (entry,) = await claims.take_over(PROMPTS, keys.SAMPLERS_GROUP, 1)
        assert entry.deliveries == 5
        assert await claims.append_partial(JOB, entry, 0, b"part") is Outcome.DONE
    (entry,) = await queue.reclaim(PROMPTS, keys.SAMPLERS_GROUP, "b", 60.0, 1)
    assert entry.deliveries == 1


async def test_acknowledging_counts_what_was_there(queue: QueueBackend) -> None:
    await queue.add(JOB, PROMPTS, "plan:0", b"prompt")
    entry = await claim_one(queue)
    assert await queue.ack_delete([entry]) == 1
    assert await queue.ack_delete([entry]) == 0
    assert await queue.length(PROMPTS) == 0


async def test_oversized_entries_are_refused_by_the_real_queue(redis_url: str) -> None:
    redis, blocking = connect(redis_url), connect_blocking(redis_url)
    await redis.hset(keys.job(JOB.job_id), "epoch", "1")  # type: ignore[misc]
    with pytest.raises(TooLargeError, match=str(MAX_ENTRY_BYTES)):
        await WorkQueue(redis, blocking).add(JOB, PROMPTS, "plan:0", b"x" * (MAX_ENTRY_BYTES + 1))
    await redis.aclose()
    await blocking.aclose()

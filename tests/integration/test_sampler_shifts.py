"""Samplers come and go, are killed and stormed: every sample ends once, and what was written is not written again."""

from __future__ import annotations

import asyncio
import itertools
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core import failpoints
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.rollouts import rollout_mark
from stillhouse.core.rpc import Server
from stillhouse.core.tensors import from_tensor, ids_list
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import sampler_pb2, trainer_pb2_grpc
from tests.cluster import Cluster, job_spec
from tests.conftest import start_valkey, stop_valkey
from tests.desk import (
    Desk,
    FakeTrainer,
    announce,
    full_logprobs,
    is_claimed,
    kept_tokens,
    open_desk,
    sampler_process,
    taken_back,
)
from tests.tiny import make_tiny_model
from tests.waiting import wait_until


async def test_a_claim_whose_holder_is_silent_is_taken_over(desk: Desk) -> None:
    desk.publish(0)
    group = await desk.plan(0, num_samples=3)
    [lost] = await desk.queue.claim([desk.prompts], keys.SAMPLERS_GROUP, "sampler-dead", 1)
    # it had handed over one sample before it died
    outcome = await desk.queue.hand_over(
        desk.scope,
        lost,
        desk.rollouts_stream,
        rollout_mark("0/1", group.teacher),
        pb.Rollout(sample_id="0/1", sampler="sampler-dead").SerializeToString(),
        last=False,
    )
    assert outcome is Outcome.DONE
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    got = await desk.wait_for("0/0", "0/1", "0/2")
    assert {name: rollout.sampler for name, rollout in got.items()} == {
        "0/0": "sampler-0",
        "0/1": "sampler-dead",
        "0/2": "sampler-0",
    }
    await wait_until(desk.is_drained, timeout_s=5, what="the group to leave the queue")
    assert group.seeds[2] == got["0/2"].seed


async def test_a_group_that_kills_its_samplers_is_given_up(desk: Desk) -> None:
    desk.publish(0)
    await desk.plan(0, num_samples=2)
    [entry] = await desk.queue.claim([desk.prompts], keys.SAMPLERS_GROUP, "sampler-dead", 1)
    for _ in range(4):
        [entry] = await desk.queue.reclaim(desk.prompts, keys.SAMPLERS_GROUP, "sampler-dead", 0, 1)
    assert entry.deliveries == 5
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await wait_until(desk.is_drained, timeout_s=15, what="the group to be given up")
    failures = await desk.failures()
    assert {(name, score.failed.reason, score.failed.attempts) for name, score in failures.items()} == {
        ("0/0", "exhausted", 6),
        ("0/1", "exhausted", 6),
    }
    assert not await desk.rollouts()


async def test_a_group_whose_parts_are_unreadable_is_written_anew(desk: Desk) -> None:
    desk.publish(0)
    await desk.plan(0, num_samples=8, sampling={"max_tokens": 61, "temperature": 9.0})
    [entry] = await desk.queue.claim([desk.prompts], keys.SAMPLERS_GROUP, "other", 1)
    assert await desk.queue.append_partial(desk.scope, entry, "other", 0, b"\xff") is Outcome.DONE
    await desk.queue.hand_back([entry], "other")
    desk.cluster.settings = desk.cluster.settings.model_copy(update={"sampler_keep_s": 0.01})
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.wait_for(*[f"0/{index}" for index in range(8)])
    assert not await desk.failures()
    await wait_until(desk.is_drained, timeout_s=5, what="the group to leave the queue")
    assert await desk.queue.partials(entry) == []


async def test_a_closed_epoch_drops_the_work(desk: Desk) -> None:
    desk.publish(0)
    ctx = await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    await desk.wait_for("0/0", "0/1")
    # a long group is running when another trainer claims the job
    await desk.plan(1, num_samples=8, sampling={"max_tokens": 61, "temperature": 5.0}, prompt_ids=[9, 9])
    await wait_until(lambda: is_claimed(desk), timeout_s=10, what="the sampler to claim the group")
    await desk.cluster.ctx.redis.delete(keys.lease(desk.scope.job_id))
    epoch = await desk.cluster.ctx.jobs.claim(desk.scope.job_id, "trainer-0", 60, 0)
    before = await desk.rollouts()
    await desk.queue.close_epoch(desk.scope)
    successor = Desk(desk.cluster, desk.trainer, Scope(desk.scope.job_id, epoch), desk.cluster.settings.home / "next")
    for stream, group in (
        (successor.prompts, keys.SAMPLERS_GROUP),
        (successor.rollouts_stream, keys.TEACHERS_GROUP),
    ):
        await successor.queue.open_stream(successor.scope, stream, group)
    desk.trainer.versions.clear()
    successor.publish(0)
    await successor.lease("sampler-0")
    await successor.plan(0)
    got = await successor.wait_for("0/0", "0/1")
    assert got["0/0"].spans[0].epoch == epoch
    assert set(before) <= {"0/0", "0/1", *(f"1/{index}" for index in range(8))}
    assert not await desk.rollouts(), "nothing reaches a closed epoch"
    assert not ctx.stop.is_set()


async def test_a_storm_of_aborts_ends_each_sample_once_and_leaves_no_damage(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    for group in range(6):
        await desk.plan(group, num_samples=4, sampling={"max_tokens": 60, "temperature": 9.0})
    peer, aborted = await desk.peer("sampler-0"), 0
    while not await desk.is_drained():
        aborted += (await peer.unary("Abort", sampler_pb2.AbortRequest(), timeout_s=5)).aborted
    ended, failures = await desk.rollouts(), await desk.failures()
    assert not ended.keys() & failures.keys()
    assert ended.keys() | failures.keys() == {f"{group}/{index}" for group in range(6) for index in range(4)}
    assert aborted >= len(failures) > 0
    assert {score.failed.reason for score in failures.values()} == {"aborted"}
    assert {rollout.finish_reason for rollout in ended.values()} <= {pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH}
    await desk.plan(6)
    got = await desk.wait_for("6/0", "6/1")
    np.testing.assert_allclose(
        from_tensor(got["6/0"].rollout_logprobs), full_logprobs(desk.trainer.models[0], got["6/0"]), atol=1e-4
    )


async def test_weights_are_replaced_while_completions_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer weights come while long completions are written: they go on with them, and chat is answered meanwhile."""
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    visits, published = itertools.count(), asyncio.Event()

    def publish_once(name: str, detail: str) -> None:
        if name == "sampler.generating" and next(visits) == 5:
            published.set()

    monkeypatch.setattr(failpoints, "_handler", publish_once)
    await desk.plan(0, num_samples=8, sampling={"max_tokens": 61, "temperature": 9.0})
    await asyncio.wait_for(published.wait(), 20)
    peer = await desk.peer("sampler-0")
    hint = sampler_pb2.SamplerServiceSyncWeightsRequest(job_id=desk.scope.job_id, weights=desk.publish(1))
    await peer.unary("SyncWeights", hint, timeout_s=5)
    got = await desk.wait_for(*[f"0/{index}" for index in range(8)])
    versions = {tuple(span.policy_version for span in rollout.spans) for rollout in got.values()}
    assert versions <= {(0,), (0, 1)}
    await desk.plan(1, min_policy_version=1)
    assert [span.policy_version for span in (await desk.wait_for("1/0"))["1/0"].spans] == [1]


async def test_a_sampler_does_not_take_over_its_own_groups(desk: Desk) -> None:
    """Its renewals fail for a lease while it writes; what it asks for then is its own."""
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, num_samples=4, sampling={"max_tokens": 60, "temperature": 9.0})
    await wait_until(lambda: is_claimed(desk), timeout_s=10, what="the group to be claimed")
    redis: Any = desk.cluster.ctx.redis
    while not await desk.is_drained():
        [pending] = await redis.xpending_range(desk.prompts, keys.SAMPLERS_GROUP, "-", "+", 1) or [None]
        if pending is not None:
            ids = [pending["message_id"]]
            await redis.xclaim(desk.prompts, keys.SAMPLERS_GROUP, "sampler-0", 0, ids, idle=60_000, justid=True)
    got = await desk.wait_for(*[f"0/{index}" for index in range(4)])
    peer = await desk.peer("sampler-0")
    info = await peer.unary("GetInfo", sampler_pb2.SamplerServiceGetInfoRequest(), timeout_s=5)
    assert info.sampled_tokens == sum(len(ids_list(rollout.completion_ids)) for rollout in got.values())


async def test_two_samplers_share_the_work(desk: Desk) -> None:
    desk.publish(0)
    for name in ("sampler-0", "sampler-1"):
        await desk.cluster.start("sampler", name)
        await desk.lease(name)
    registry = desk.cluster.ctx.registry

    async def both_serve() -> bool:
        return [info.job_id for info in await registry.services("sampler")] == [desk.scope.job_id] * 2

    await wait_until(both_serve, timeout_s=15, what="both samplers to announce the job")
    for group in range(6):
        await desk.plan(group, sampling={"max_tokens": 40})
    got = await desk.wait_for(*[f"{group}/1" for group in range(6)])
    await wait_until(desk.is_drained, timeout_s=10, what="the groups to leave the queue")
    assert {rollout.sampler for rollout in (await desk.rollouts()).values()} == {"sampler-0", "sampler-1"}
    assert len(got) <= 12


async def test_a_lost_lease_hands_the_work_back(desk: Desk) -> None:
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, min_policy_version=5)  # never published: the claim is held while it waits
    await wait_until(lambda: is_claimed(desk), timeout_s=10, what="the sampler to claim the group")
    await desk.cluster.ctx.registry.release_sampler("sampler-0", desk.scope)
    handed_back = await wait_until(lambda: taken_back(desk), timeout_s=10, what="the group to be handed back")
    assert handed_back.deliveries == 1, "handing back is no attempt: only ours counts"


@pytest.mark.timeout(180)
async def test_sigterm_hands_back_and_exits_0(desk: Desk, redis_url: str) -> None:
    desk.cluster.add_model("big", seed=3, num_layers=24, hidden_size=64, max_position_embeddings=4096)
    big = await open_desk(desk.cluster, desk.cluster.settings.home, desk.trainer, student={"model": "big"})
    desk.trainer.publish(big.scope, 0, Path(desk.cluster.models.get("big").path))
    # what is written is kept at the end alone
    with sampler_process(big, redis_url, "sampler-p", STILLHOUSE_SAMPLER_KEEP_S="3600") as process:
        await big.lease("sampler-p")
        # minutes of work: it cannot be finished by chance
        await big.plan(0, num_samples=8, sampling={"max_tokens": 4000, "temperature": 9.0})
        await wait_until(lambda: is_claimed(big), timeout_s=40, what="the process to claim the group")
        peer = await big.peer("sampler-p")

        async def writes() -> bool:
            info = await peer.unary("GetInfo", sampler_pb2.SamplerServiceGetInfoRequest(), timeout_s=5)
            return info.sampled_tokens >= 16

        await wait_until(writes, timeout_s=20, what="the process to write")
        process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(asyncio.to_thread(process.wait), 20)
    assert code == 0, (big.cluster.settings.home / "sampler.log").read_text()[-3000:]
    entry = await taken_back(big)
    assert entry is not None, "the group was handed back, not left to run out"
    kept = await kept_tokens(big, entry)
    assert sum(map(len, kept.values())) + len(await big.rollouts()) >= 8, "with what was written of it"
    assert not [info for info in await big.cluster.ctx.registry.services("sampler") if info.instance == "sampler-p"]


@pytest.mark.timeout(180)
async def test_what_a_killed_sampler_had_written_is_continued_by_another(desk: Desk, redis_url: str) -> None:
    """kill -9 of a real process in the middle of long completions. Its successor has newer weights, so that the spans
    of each rollout say where it went on; the log-probabilities before are of the old weights, those after of the new.
    """
    desk.cluster.add_model("big", seed=3, num_layers=24, hidden_size=64, max_position_embeddings=4096)
    big = await open_desk(desk.cluster, desk.cluster.settings.home, desk.trainer, student={"model": "big"})
    old = Path(desk.cluster.models.get("big").path)
    new = make_tiny_model(desk.cluster.settings.home / "newer", seed=4, num_layers=24, hidden_size=64)
    desk.trainer.publish(big.scope, 0, old)
    entry = Entry(big.prompts, keys.SAMPLERS_GROUP, "", b"")
    with sampler_process(big, redis_url, "sampler-p", STILLHOUSE_SAMPLER_KEEP_S="0.05") as process:
        await big.lease("sampler-p")
        # flat logits: one token in 270 ends a completion
        await big.plan(0, num_samples=4, sampling={"max_tokens": 150, "temperature": 9.0})

        async def has_begun() -> bool:
            nonlocal entry
            pending: Any = await desk.cluster.ctx.redis.xpending_range(big.prompts, keys.SAMPLERS_GROUP, "-", "+", 1)
            if pending:
                entry = Entry(big.prompts, keys.SAMPLERS_GROUP, pending[0]["message_id"].decode(), b"")
            return sum(map(len, (await kept_tokens(big, entry)).values())) >= 40

        await wait_until(has_begun, timeout_s=60, what="the process to keep 40 tokens")
        process.kill()
        process.wait()
    kept, handed_over = await kept_tokens(big, entry), await big.rollouts()
    desk.trainer.publish(big.scope, 1, new)
    await desk.cluster.start("sampler")
    await big.lease("sampler-0")
    got = await big.wait_for(*[f"0/{index}" for index in range(4)], timeout_s=60)
    await wait_until(big.is_drained, timeout_s=5, what="the group to leave the queue")
    continued = [name for name, rollout in got.items() if len(rollout.spans) > 1]
    assert continued
    assert sorted(continued) == [f"0/{index}" for index in range(4) if f"0/{index}" not in handed_over]
    for name in continued:
        rollout, written = got[name], kept[got[name].index]
        spans = [(span.first_token, span.policy_version) for span in rollout.spans]
        assert spans == [(0, 0), (len(written), 1)]
        assert ids_list(rollout.completion_ids)[: len(written)] == written
        assert (rollout.sampler, rollout.weights_sha256) == ("sampler-0", desk.trainer.versions[1][0].ref.sha256)
        assert len(from_tensor(rollout.rollout_logprobs)) == len(ids_list(rollout.completion_ids))
        logprobs = from_tensor(rollout.rollout_logprobs)
        before, after = full_logprobs(old, rollout), full_logprobs(new, rollout)
        np.testing.assert_allclose(logprobs[: len(written)], before[: len(written)], atol=1e-3)
        np.testing.assert_allclose(logprobs[len(written) :], after[len(written) :], atol=1e-3)
    assert not await big.queue.partials(entry), "freed with the group"


async def test_the_queue_server_may_restart(tmp_path: Path) -> None:
    folder = tmp_path / "valkey"
    folder.mkdir()
    process, url = start_valkey(folder)
    made = Cluster(tmp_path, url)
    server = Server(made.settings)
    trainer = FakeTrainer()
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, trainer, "stillhouse.v1.TrainerService")
    beat: asyncio.Task[None] | None = None
    try:
        made.add_model("student", seed=1)
        made.add_model("teacher", seed=2)
        desk = await open_desk(made, tmp_path, trainer)
        desk.publish(0)
        beat = asyncio.create_task(announce(made, await server.start()))
        await made.start("sampler")
        await desk.lease("sampler-0")
        await desk.plan(0)
        await desk.wait_for("0/0", "0/1")
        stop_valkey(process)
        process, _ = start_valkey(folder, int(url.rpartition(":")[2].partition("/")[0]))
        await desk.plan(1)
        await desk.wait_for("0/0", "0/1", "1/0", "1/1", timeout_s=25)
    finally:
        if beat is not None:
            beat.cancel()
        await made.close()
        await server.stop(0)
        stop_valkey(process)


async def test_samplers_come_and_go_while_a_job_runs(deployment: Cluster) -> None:
    """One joins, one stops, one is killed: the job ends, and the oracle finds each sample trained once."""
    schedule = {"steps": 9, "prompts_per_step": 3, "group_size": 2, "max_staleness": 1}
    sampling = {"max_tokens": 40, "temperature": 1.0}
    job_id = await deployment.submit(job_spec(stages__0__schedule=schedule, stages__0__sampling=sampling))
    await deployment.at_step(job_id, 1)
    await deployment.start("sampler", "sampler-1")
    await deployment.at_step(job_id, 3)
    await deployment.stop("sampler-0")
    await deployment.at_step(job_id, 5)
    await deployment.start("sampler", "sampler-2")
    await deployment.crash("sampler-1")
    record = await deployment.ended(job_id, 90)
    assert (record.status, record.step, record.usage["failed_samples"]) == ("succeeded", 9, 0), record.error
    artifacts = deployment.ctx.artifacts.job(job_id)
    report = verify_job(artifacts, record)
    assert report.ok, report.text()
    assert report.counts["samples_trained"] == 54
    steps = [read_step(artifacts.journal(1, step)).scores for step in range(9)]
    assert {score.rollout.sampler for scores in steps for score in scores} == {f"sampler-{n}" for n in range(3)}

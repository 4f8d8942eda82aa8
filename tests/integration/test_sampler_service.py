"""The sampler as a service: real queue, real gRPC, a tiny student; the trainer is an honest fake with weights."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import ConflictError, NotFoundError, SpecError, UnimplementedError, WireError
from stillhouse.core.queue import keys
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.rpc import Peer, Server, chunks
from stillhouse.core.tensors import DTYPE_NAMES, from_tensor, ids_list, ids_tensor
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.core.weights import weights_sha256
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import sampler_pb2, sampler_pb2_grpc, tensor_pb2, trainer_pb2, trainer_pb2_grpc, weights_pb2
from tests.cluster import Cluster, job_spec
from tests.conftest import start_valkey, stop_valkey
from tests.reading import slow_end
from tests.tiny import TOKENIZER_SIZE, make_tiny_model
from tests.waiting import wait_until

LEASE_S = 600.0
"""Lease of the sampler in these tests: longer than any of them."""


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Serves published weights; a version is a tiny model of another seed."""

    def __init__(self) -> None:
        self.versions: dict[int, tuple[weights_pb2.WeightsIndex, bytes]] = {}
        self.models: dict[int, Path] = {}
        self.requests: list[trainer_pb2.FetchWeightsRequest] = []

    def publish(self, scope: Scope, version: int, folder: Path) -> weights_pb2.WeightsRef:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        entries, payload = [], b""
        for name, parameter in model.named_parameters():
            data = parameter.detach().numpy().tobytes()
            entries.append(
                weights_pb2.TensorEntry(
                    name=name,
                    dtype=DTYPE_NAMES["float32"],
                    shape=parameter.shape,
                    offset=len(payload),
                    size_bytes=len(data),
                    xxh3_128=xxh3(data),
                )
            )
            payload += data
        ref = weights_pb2.WeightsRef(epoch=scope.epoch, policy_version=version, sha256=weights_sha256(entries))
        index = weights_pb2.WeightsIndex(ref=ref, tensors=entries, total_bytes=len(payload))
        self.versions[version] = (index, payload)
        self.models[version] = folder
        return ref

    async def FetchWeights(self, request: trainer_pb2.FetchWeightsRequest, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        version = request.weights.policy_version if request.HasField("weights") else max(self.versions, default=-1)
        if version not in self.versions:
            raise NotFoundError(f"version {version} is not held")
        index, payload = self.versions[version]
        yield trainer_pb2.FetchWeightsResponse(index=index)
        for offset, data in chunks(payload):
            yield trainer_pb2.FetchWeightsResponse(chunk=tensor_pb2.Chunk(offset=offset, data=data))


class Desk:
    """A job as its trainer sees it: plans groups, publishes weights, reads rollouts."""

    def __init__(self, cluster: Cluster, trainer: FakeTrainer, scope: Scope, home: Path) -> None:
        self.cluster, self.trainer, self.scope, self._home = cluster, trainer, scope, home
        self.queue = cluster.ctx.queue
        self.prompts = keys.prompts(scope.job_id, scope.epoch)
        self.rollouts_stream = keys.rollouts(scope.job_id, scope.epoch, "main")
        self.scored_stream = keys.scored(scope.job_id, scope.epoch)

    def publish(self, version: int) -> weights_pb2.WeightsRef:
        folder = make_tiny_model(self._home / f"v{version}", seed=100 + version)
        return self.trainer.publish(self.scope, version, folder)

    async def plan(self, group: int, num_samples: int = 2, **fields: Any) -> pb.PromptGroup:
        prompt = fields.pop("prompt_ids", [10 + group, 11, 12])
        options: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6, **fields.pop("sampling", {})}
        message = pb.PromptGroup(
            schema_version=1,
            job_id=self.scope.job_id,
            epoch=self.scope.epoch,
            purpose=pb.PURPOSE_TRAIN,
            group=group,
            group_id=str(group),
            sample_indices=range(num_samples),
            seeds=fields.pop("seeds", [1000 * group + index for index in range(num_samples)]),
            prompt_ids=ids_tensor(prompt),
            teacher="main",
            sampling=pb.SamplingParams(**options),
            score=fields.pop("score", pb.ScoreSpec(kind=pb.SCORE_KIND_SAMPLED)),
            row=group,
            **fields,
        )
        outcome = await self.queue.add(self.scope, self.prompts, f"plan:{group}", message.SerializeToString())
        assert outcome is Outcome.DONE
        return message

    async def rollouts(self) -> dict[str, pb.Rollout]:
        entries: Any = await self.cluster.ctx.redis.xrange(self.rollouts_stream)
        found = [pb.Rollout.FromString(fields[b"p"]) for _, fields in entries]
        assert len({rollout.sample_id for rollout in found}) == len(found), "a sample was handed over twice"
        return {rollout.sample_id: rollout for rollout in found}

    async def failures(self) -> dict[str, pb.Score]:
        entries: Any = await self.cluster.ctx.redis.xrange(self.scored_stream)
        found = [pb.Score.FromString(fields[b"p"]) for _, fields in entries]
        return {score.rollout.sample_id: score for score in found}

    async def wait_for(self, *sample_ids: str, timeout_s: float = 20) -> dict[str, pb.Rollout]:
        async def arrived() -> dict[str, pb.Rollout] | None:
            found = await self.rollouts()
            return found if found.keys() >= set(sample_ids) else None

        return await wait_until(arrived, timeout_s=timeout_s, what=f"rollouts {sample_ids}")

    async def is_drained(self) -> bool:
        return await self.queue.length(self.prompts) == 0

    async def lease(self, instance: str, seconds: float = LEASE_S) -> None:
        assert await self.cluster.ctx.registry.lease_sampler(instance, self.scope, seconds)

    async def peer(self, instance: str) -> Peer:
        info = await self.cluster.ctx.registry.find("sampler", instance)
        return self.cluster.ctx.peers.get(info.address, sampler_pb2_grpc.SamplerServiceStub, instance)


@pytest.fixture
async def desk(tmp_path: Path, redis_url: str) -> AsyncIterator[Desk]:
    made = Cluster(tmp_path, redis_url, sampler_max_sequences=8)
    made.add_model("student", seed=1, max_position_embeddings=64)
    made.add_model("teacher", seed=2)
    desk = await open_desk(made, tmp_path, FakeTrainer())
    server = Server(made.settings)
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, desk.trainer, "stillhouse.v1.TrainerService")
    address = await server.start()
    beat = asyncio.create_task(announce(made, address))
    try:
        yield desk
    finally:
        beat.cancel()
        await made.close()
        await server.stop(0)


async def open_desk(made: Cluster, home: Path, trainer: FakeTrainer, **spec: Any) -> Desk:
    """A job in the epoch that a claim gives it, with its streams."""
    job_id = await made.submit(job_spec(**spec))
    epoch = await made.ctx.jobs.claim(job_id, "trainer-0", 60, 0)
    desk = Desk(made, trainer, Scope(job_id, epoch), home / job_id)
    for stream, group in (
        (desk.prompts, keys.SAMPLERS_GROUP),
        (desk.rollouts_stream, keys.TEACHERS_GROUP),
        (desk.scored_stream, keys.TRAINERS_GROUP),
    ):
        await desk.queue.open_stream(desk.scope, stream, group)
    return desk


async def announce(made: Cluster, address: str) -> None:
    while True:
        await made.ctx.registry.beat(
            ServiceInfo("trainer", "trainer-0", address, os.getpid(), started_at=0.0, seen_at=0.0)
        )
        await asyncio.sleep(2)


@torch.no_grad()
def full_logprobs(folder: Path, rollout: pb.Rollout) -> np.ndarray:
    """[T] log-probabilities of the completion by one forward of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, completion = ids_list(rollout.prompt_ids), ids_list(rollout.completion_ids)
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :TOKENIZER_SIZE]
    logits = logits / (rollout.sampling.temperature or 1.0)
    return torch.log_softmax(logits, -1)[range(len(completion)), completion].numpy()


async def test_prompts_become_rollouts_of_the_published_weights(desk: Desk) -> None:
    ref = desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    planned = [await desk.plan(group, num_samples=3, traceparent="00-aa-bb-01") for group in range(4)]
    got = await desk.wait_for(*[f"{group}/{index}" for group in range(4) for index in range(3)])
    await wait_until(desk.is_drained, timeout_s=5, what="the prompts to leave the queue")
    student = desk.cluster.models.get("student")
    for group in planned:
        for index in group.sample_indices:
            rollout = got[f"{group.group_id}/{index}"]
            tokens = ids_list(rollout.completion_ids)
            assert 1 <= len(tokens) <= group.sampling.max_tokens
            is_truncated = rollout.finish_reason == pb.FINISH_REASON_LENGTH
            assert is_truncated == (len(tokens) == group.sampling.max_tokens and tokens[-1] != 2)
            np.testing.assert_allclose(
                from_tensor(rollout.rollout_logprobs), full_logprobs(desk.trainer.models[0], rollout), atol=1e-4
            )
            assert [(span.first_token, span.policy_version, span.epoch) for span in rollout.spans] == [
                (0, 0, desk.scope.epoch)
            ]
            assert (rollout.seed, rollout.row, rollout.traceparent) == (group.seeds[index], group.row, "00-aa-bb-01")
            assert (rollout.weights_sha256, rollout.tokenizer_sha256) == (ref.sha256, student.tokenizer_sha256)
            assert (rollout.sampler, rollout.attempt, rollout.teacher) == ("sampler-0", 0, "main")
            assert rollout.sample_s > 0
    assert len(desk.trainer.requests) == 1, "one pull serves all groups"


async def test_samples_that_no_teacher_is_asked_about_end_with_the_sampler(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, score=pb.ScoreSpec(kind=pb.SCORE_KIND_NONE))
    await wait_until(desk.is_drained, timeout_s=20, what="the prompts to leave the queue")
    ended = await desk.failures()
    assert {name: score.WhichOneof("result") for name, score in ended.items()} == {"0/0": "none", "0/1": "none"}
    for score in ended.values():
        tokens = ids_list(score.rollout.completion_ids)
        assert len(tokens) == len(from_tensor(score.rollout.rollout_logprobs)) >= 1
        assert score.rollout.spans[0].policy_version == 0
    assert await desk.rollouts() == {}
    marks = await desk.queue.marked(desk.scope, ["score:0/0:0", "score:0/1:0"])
    assert len(marks) == 2, "a second hand-over of the sample would be a duplicate"


async def test_a_sampler_that_missed_the_hint_pulls_at_the_claim(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    await desk.wait_for("0/0", "0/1")
    ref = desk.publish(1)
    await desk.plan(1, min_policy_version=0)
    got = await desk.wait_for("1/0", "1/1")
    assert got["1/0"].spans[0].policy_version == 0, "allowed by the bound, and nobody said there is more"
    await desk.plan(2, min_policy_version=1)
    got = await desk.wait_for("2/0", "2/1")
    assert got["2/0"].spans[0].policy_version == 1
    assert got["2/0"].weights_sha256 == ref.sha256
    np.testing.assert_allclose(
        from_tensor(got["2/0"].rollout_logprobs), full_logprobs(desk.trainer.models[1], got["2/0"]), atol=1e-4
    )


async def test_weights_that_do_not_exist_yet_are_waited_for(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, min_policy_version=2)
    await wait_until(lambda: len(desk.trainer.requests) >= 2, timeout_s=10, what="the sampler to ask again")
    assert not await desk.rollouts()
    desk.publish(2)
    got = await desk.wait_for("0/0", "0/1")
    assert {rollout.spans[0].policy_version for rollout in got.values()} == {2}


async def test_a_hint_brings_newer_weights(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    await desk.wait_for("0/0")
    peer = await desk.peer("sampler-0")
    request = sampler_pb2.SamplerServiceSyncWeightsRequest(job_id=desk.scope.job_id, weights=desk.publish(1))
    await peer.unary("SyncWeights", request, timeout_s=5)
    await desk.plan(1)
    got = await desk.wait_for("1/0")
    assert got["1/0"].spans[0].policy_version == 1
    for job_id, epoch in (("job_other0000", desk.scope.epoch), (desk.scope.job_id, desk.scope.epoch - 1)):
        foreign = weights_pb2.WeightsRef(epoch=epoch, policy_version=9)
        request = sampler_pb2.SamplerServiceSyncWeightsRequest(job_id=job_id, weights=foreign)
        with pytest.raises(ConflictError):
            await peer.unary("SyncWeights", request, timeout_s=5)


async def test_an_exact_version_is_used_even_if_newer_ones_exist(desk: Desk) -> None:
    for version in (0, 1, 2):
        desk.publish(version)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    assert (await desk.wait_for("0/0"))["0/0"].spans[0].policy_version == 2
    for group, version in ((1, 1), (2, 0), (3, 2)):
        await desk.plan(group, exact_policy_version_plus_one=version + 1)
    got = await desk.wait_for("1/1", "2/1", "3/1")
    assert [got[f"{group}/1"].spans[0].policy_version for group in (1, 2, 3)] == [1, 0, 2]


async def test_deterministic_groups_do_not_depend_on_who_else_is_there(desk: Desk) -> None:
    desk.publish(0)
    for group in range(4):
        await desk.plan(group, num_samples=3, exact_policy_version_plus_one=1, prompt_ids=[7] * (3 + group))
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    together = await desk.wait_for(*[f"{group}/2" for group in range(4)])
    await wait_until(desk.is_drained, timeout_s=5, what="the prompts to leave the queue")
    other = await open_desk(desk.cluster, desk.cluster.settings.home, desk.trainer)
    await desk.cluster.ctx.registry.release_sampler("sampler-0", desk.scope)
    desk.trainer.publish(other.scope, 0, desk.trainer.models[0])
    await other.lease("sampler-0")
    for group in (3, 1):
        await other.plan(group, num_samples=3, exact_policy_version_plus_one=1, prompt_ids=[7] * (3 + group))
    alone = await other.wait_for("3/0", "3/1", "3/2", "1/0", "1/1", "1/2")
    together = await desk.rollouts()
    for name, rollout in alone.items():
        assert rollout.rollout_logprobs == together[name].rollout_logprobs, "bit for bit"
        assert rollout.completion_ids == together[name].completion_ids


async def test_a_claim_whose_holder_is_silent_is_taken_over(desk: Desk) -> None:
    desk.publish(0)
    group = await desk.plan(0, num_samples=3)
    [lost] = await desk.queue.claim([desk.prompts], keys.SAMPLERS_GROUP, "sampler-dead", 1)
    # it had handed over one sample before it died
    outcome = await desk.queue.hand_over(
        desk.scope,
        lost,
        desk.rollouts_stream,
        "rollout:0/1:0",
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


async def test_impossible_samples_end_as_failures_and_the_others_go_on(desk: Desk) -> None:
    desk.publish(0)
    await desk.plan(0, num_samples=2, prompt_ids=[5] * 64)
    await desk.plan(1, num_samples=2)
    await desk.plan(2, num_samples=1, sampling={"stop": [""]})
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.wait_for("1/0", "1/1")
    await wait_until(desk.is_drained, timeout_s=5, what="all groups to leave the queue")
    failures = await desk.failures()
    assert {name: score.failed.reason for name, score in failures.items()} == {
        "0/0": "too_long",
        "0/1": "too_long",
        "2/0": "bad_request",
    }
    assert failures["0/1"].failed.service == "sampler"
    assert ids_list(failures["0/1"].rollout.prompt_ids) == [5] * 64
    assert await desk.queue.length(keys.dead(desk.scope.job_id, desk.scope.epoch)) == 3


async def test_what_is_recorded_travels_with_the_rollout(desk: Desk) -> None:
    desk.publish(0)
    await desk.plan(0, num_samples=1, sampling={"record_top_k": 5, "record_entropies": True})
    await desk.plan(1, num_samples=1)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    got = await desk.wait_for("0/0", "1/0")
    recorded, plain = got["0/0"], got["1/0"]
    num_tokens = len(ids_list(recorded.completion_ids))
    assert (list(recorded.target_ids.shape), list(recorded.entropies.shape)) == ([num_tokens, 5], [num_tokens])
    assert (from_tensor(recorded.target_ids).dtype, from_tensor(recorded.entropies).dtype) == (np.int32, np.float32)
    assert not plain.HasField("target_ids")
    assert not plain.HasField("entropies")


async def test_a_rollout_that_outgrows_its_entry_names_the_knobs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.core.queue.streams.MAX_ENTRY_BYTES", 2000)
    desk.publish(0)
    await desk.plan(0, num_samples=1, sampling={"record_top_k": 200, "stop_token_ids": [], "max_tokens": 20})
    await desk.plan(1, num_samples=1)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.wait_for("1/0")
    await wait_until(desk.is_drained, timeout_s=5, what="both groups to leave the queue")
    (failed,) = [score.failed for score in (await desk.failures()).values()]
    assert failed.reason == "too_large"
    for part in ("2000", "the 200 likeliest", "lower loss.k or sampling.max_tokens"):
        assert part in failed.message


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


async def test_a_closed_epoch_drops_the_work(desk: Desk) -> None:
    desk.publish(0)
    ctx = await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    await desk.wait_for("0/0", "0/1")
    # a long group is running when another trainer claims the job
    await desk.plan(1, num_samples=8, sampling={"max_tokens": 61, "temperature": 5.0}, prompt_ids=[9, 9])
    await wait_until(lambda: _is_claimed(desk), timeout_s=10, what="the sampler to claim the group")
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


async def _is_claimed(desk: Desk) -> bool:
    pending: Any = await desk.cluster.ctx.redis.xpending(desk.prompts, keys.SAMPLERS_GROUP)
    return pending["pending"] > 0


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


async def test_generate_outside_the_queue(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    request = sampler_pb2.GenerateRequest(
        model="teacher",
        prompt_ids=ids_tensor([5, 6, 7]),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=5),
        seeds=[1, 2],
    )
    frozen = [part async for part in peer.stream("Generate", request, timeout_s=20)]
    assert sorted(part.index for part in frozen) == [0, 1]
    assert ids_list(frozen[0].completion_ids) == ids_list(frozen[1].completion_ids), "greedy"
    assert not frozen[0].HasField("weights")
    probe = pb.Rollout(
        prompt_ids=request.prompt_ids, completion_ids=frozen[0].completion_ids, sampling=request.sampling
    )
    folder = Path(desk.cluster.models.get("teacher").path)
    np.testing.assert_allclose(from_tensor(frozen[0].rollout_logprobs), full_logprobs(folder, probe), atol=1e-4)
    request.model = ""
    with pytest.raises(ConflictError, match="serves no job"):
        await drain(peer, request)
    await desk.lease("sampler-0")

    async def answers() -> list[Any] | None:
        try:
            return await drain(peer, request)
        except ConflictError:
            return None

    [first, _] = await wait_until(answers, timeout_s=20, what="the student to be there")
    assert first.weights.policy_version == 0
    probe.completion_ids.CopyFrom(first.completion_ids)
    np.testing.assert_allclose(
        from_tensor(first.rollout_logprobs), full_logprobs(desk.trainer.models[0], probe), atol=1e-4
    )


async def test_stop_strings_end_rollouts_and_what_callers_ask_for(desk: Desk) -> None:
    """Both models write as without them, up to the token that completes one: with one seed the same draws."""
    desk.publish(0)
    await desk.plan(0, sampling={"max_tokens": 30})
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    await desk.lease("sampler-0")
    plain = await desk.wait_for("0/0", "0/1")
    tokenizer = tokenizer_of(desk.cluster.models.get("student"))

    def stop_in(ids: list[int]) -> str:
        return next(char for char in tokenizer.decode(ids[3:], skip_special_tokens=False) if char != "\ufffd")

    whole = ids_list(plain["0/0"].completion_ids)
    stop = stop_in(whole)
    # group 0 with the same seeds and prompt, under other names
    fields: dict[str, Any] = {
        "prompt_ids": ids_list(plain["0/0"].prompt_ids),
        "sampling": {"max_tokens": 30, "stop": [stop]},
    }
    for group, exact in ((1, 0), (2, 1)):
        await desk.plan(group, seeds=[0, 1], exact_policy_version_plus_one=exact, **fields)
    got = await desk.wait_for("1/0", "1/1", "2/0", "2/1")
    for name in ("1/0", "2/0"):
        assert ids_list(got[name].completion_ids) == whole[: slow_end(tokenizer, whole, [stop])]
        assert got[name].finish_reason == pb.FINISH_REASON_STOP
        assert list(got[name].rollout_logprobs.shape) == list(got[name].completion_ids.shape)

    request = sampler_pb2.GenerateRequest(
        model="teacher",
        prompt_ids=ids_tensor([5, 6, 7]),
        sampling=pb.SamplingParams(temperature=1.0, max_tokens=30),
        seeds=[1, 2],
    )
    frozen = {part.index: ids_list(part.completion_ids) for part in await drain(peer, request)}
    request.sampling.stop.extend([stop_in(frozen[0]), "never there"])
    for part in await drain(peer, request):
        end = slow_end(tokenizer, frozen[part.index], request.sampling.stop)
        assert ids_list(part.completion_ids) == frozen[part.index][:end]
        assert part.index != 0 or (end is not None and part.finish_reason == pb.FINISH_REASON_STOP)


async def drain(peer: Peer, request: Any) -> list[Any]:
    return [part async for part in peer.stream("Generate", request, timeout_s=20)]


async def test_generate_refuses_what_it_cannot_do(desk: Desk) -> None:
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    good = {
        "model": "teacher",
        "prompt_ids": ids_tensor([5]),
        "sampling": pb.SamplingParams(temperature=1.0, max_tokens=5),
        "seeds": [1],
    }
    assert len(await drain(peer, sampler_pb2.GenerateRequest(**good))) == 1
    for change, error in (
        ({"model": "nobody"}, NotFoundError),
        ({"prompt_ids": ids_tensor([5] * 256)}, WireError),
        ({"prompt_ids": ids_tensor([TOKENIZER_SIZE])}, WireError),
        ({"sampling": pb.SamplingParams(max_tokens=5, stop=[""])}, WireError),
        ({"sampling": pb.SamplingParams(max_tokens=5, record_top_k=2)}, UnimplementedError),
        ({"seeds": []}, SpecError),
    ):
        with pytest.raises(error):
            await drain(peer, sampler_pb2.GenerateRequest(**{**good, **change}))


async def test_pause_holds_work_and_resume_lets_it_go(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    await peer.unary("Pause", sampler_pb2.PauseRequest(), timeout_s=5)
    await desk.lease("sampler-0")
    await desk.plan(0)
    info = await peer.unary("GetInfo", sampler_pb2.SamplerServiceGetInfoRequest(), timeout_s=5)
    assert (info.instance, info.engine, info.paused) == ("sampler-0", "transformers", True)
    assert not await _is_claimed(desk)
    await peer.unary("Resume", sampler_pb2.ResumeRequest(), timeout_s=5)
    await desk.wait_for("0/0", "0/1")
    info = await peer.unary("GetInfo", sampler_pb2.SamplerServiceGetInfoRequest(), timeout_s=5)
    assert (info.job_id, info.model, info.paused) == (desk.scope.job_id, "student", False)
    assert (info.vocab_size, info.max_sequence_length) == (TOKENIZER_SIZE, 64)
    assert info.sampled_tokens > 0
    assert info.weights.policy_version == 0
    assert (await peer.unary("Abort", sampler_pb2.AbortRequest(), timeout_s=5)).aborted == 0


async def test_a_lost_lease_hands_the_work_back(desk: Desk) -> None:
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, min_policy_version=5)  # never published: the claim is held while it waits
    await wait_until(lambda: _is_claimed(desk), timeout_s=10, what="the sampler to claim the group")
    await desk.cluster.ctx.registry.release_sampler("sampler-0", desk.scope)
    handed_back = await wait_until(lambda: _take(desk), timeout_s=10, what="the group to be handed back")
    assert handed_back.deliveries == 1, "handing back is no attempt: only ours counts"


async def _take(desk: Desk) -> Entry | None:
    """A claim that is only possible at once if the entry was handed back."""
    found = await desk.queue.reclaim(desk.prompts, keys.SAMPLERS_GROUP, "other", 3600, 1)
    return found[0] if found else None


# --- the real process ---


@contextmanager
def sampler_process(desk: Desk, redis_url: str, instance: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("STILLHOUSE_")}
    env |= {
        "STILLHOUSE_HOME": str(desk.cluster.settings.home),
        "STILLHOUSE_REDIS_URL": redis_url,
        "STILLHOUSE_INTERNAL_TOKEN": desk.cluster.settings.internal_token,
        "STILLHOUSE_INSTANCE": instance,
        "STILLHOUSE_LEASE_S": "30",
        "STILLHOUSE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (desk.cluster.settings.home / "sampler.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "stillhouse.sampler"], env=env, stderr=log, stdout=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_sigterm_hands_back_and_exits_0(desk: Desk, redis_url: str) -> None:
    desk.cluster.add_model("big", seed=3, num_layers=24, hidden_size=64, max_position_embeddings=4096)
    big = await open_desk(desk.cluster, desk.cluster.settings.home, desk.trainer, student={"model": "big"})
    desk.trainer.publish(big.scope, 0, Path(desk.cluster.models.get("big").path))
    with sampler_process(big, redis_url, "sampler-p") as process:
        await big.lease("sampler-p")
        # minutes of work in one batch: it cannot be finished by chance
        await big.plan(0, num_samples=8, sampling={"max_tokens": 4000, "temperature": 9.0})
        await wait_until(lambda: _is_claimed(big), timeout_s=40, what="the process to claim the group")
        await wait_until(lambda: bool(desk.trainer.requests), timeout_s=20, what="the process to pull weights")
        process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(asyncio.to_thread(process.wait), 20)
    assert code == 0, (big.cluster.settings.home / "sampler.log").read_text()[-3000:]
    entry = await _take(big)
    assert entry is not None, "the group was handed back, not left to run out"
    assert not [info for info in await big.cluster.ctx.registry.services("sampler") if info.instance == "sampler-p"]


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

"""A job as its trainer sees it, for tests of samplers: real queue, real gRPC, an honest fake of a trainer."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue import keys
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Entry, Outcome, Scope
from stillhouse.core.rpc import Peer, chunks
from stillhouse.core.tensors import DTYPE_NAMES, ids_list, ids_tensor
from stillhouse.core.weights import weights_sha256
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import sampler_pb2_grpc, tensor_pb2, trainer_pb2, trainer_pb2_grpc, weights_pb2
from tests.cluster import Cluster, job_spec
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


async def is_claimed(desk: Desk) -> bool:
    pending: Any = await desk.cluster.ctx.redis.xpending(desk.prompts, keys.SAMPLERS_GROUP)
    return pending["pending"] > 0


async def drain(peer: Peer, request: Any) -> list[Any]:
    return [part async for part in peer.stream("Generate", request, timeout_s=20)]


async def taken_back(desk: Desk) -> Entry | None:
    """A claim that is only possible at once if the entry was handed back."""
    found = await desk.queue.reclaim(desk.prompts, keys.SAMPLERS_GROUP, "other", 3600, 1)
    return found[0] if found else None


@contextmanager
def sampler_process(desk: Desk, redis_url: str, instance: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("STILLHOUSE_")}
    env |= {
        "STILLHOUSE_HOME": str(desk.cluster.settings.home),
        "STILLHOUSE_REDIS_URL": redis_url,
        "STILLHOUSE_INTERNAL_TOKEN": desk.cluster.settings.internal_token,
        "STILLHOUSE_INSTANCE": instance,
        "STILLHOUSE_LEASE_S": "30",
        "STILLHOUSE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    with (desk.cluster.settings.home / "sampler.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "stillhouse.sampler"], env=env, stderr=log, stdout=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def kept_tokens(desk: Desk, entry: Entry) -> dict[int, list[int]]:
    """Tokens that are kept beside a group, by sample."""
    kept: dict[int, list[int]] = {}
    for part in await desk.queue.partials(entry):
        for partial in pb.PartialGroup.FromString(part).completions:
            assert len(kept.setdefault(partial.index, [])) == partial.first_token
            kept[partial.index] += ids_list(partial.completion_ids)
    return kept

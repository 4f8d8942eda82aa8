"""Publishing student weights: named, held for `FetchWeights`, announced to the samplers.

A published version lives:  copied from the learner -> named and held -> reference durable in the job's record -> hinted
-> dropped when `max_staleness + 1` newer ones are held and no evaluation pins it. Samplers pull; nothing is pushed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.core.blobs import xxh3
from stillhouse.core.errors import ConflictError, NotFoundError, UnimplementedError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue.jobs import JobStore
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import chunks
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.weights import weights_sha256
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.v1 import tensor_pb2, trainer_pb2, weights_pb2


@dataclass(frozen=True, slots=True)
class Held:
    """One published version."""

    index: weights_pb2.WeightsIndex
    arrays: list[np.ndarray]

    def parts(self) -> Iterator[tensor_pb2.Chunk]:
        """The payload in parts of about 1 MiB."""
        for entry, array in zip(self.index.tensors, self.arrays, strict=True):
            for offset, data in chunks(array.data.cast("B")):
                yield tensor_pb2.Chunk(offset=entry.offset + offset, data=data)


def make_index(
    scope: Scope, policy_version: int, arrays: Sequence[tuple[str, np.ndarray, str]]
) -> weights_pb2.WeightsIndex:
    """Directory of a set of weights: offsets, checksums, name."""
    entries = []
    offset = 0
    for name, array, dtype in arrays:
        entries.append(
            weights_pb2.TensorEntry(
                name=name,
                dtype=DTYPE_NAMES[dtype],
                shape=array.shape,
                offset=offset,
                size_bytes=array.nbytes,
                xxh3_128=xxh3(array.data.cast("B")),
            )
        )
        offset += array.nbytes
    ref = weights_pb2.WeightsRef(epoch=scope.epoch, policy_version=policy_version, sha256=weights_sha256(entries))
    return weights_pb2.WeightsIndex(ref=ref, tensors=entries, total_bytes=offset)


class Shelf:
    """Holds the newest versions of one claim of a job for `FetchWeights`."""

    def __init__(self, scope: Scope, hold: int) -> None:
        self._scope = scope
        self._hold = hold
        self._held: dict[int, Held] = {}
        self._pinned: set[int] = set()

    @property
    def refs(self) -> list[weights_pb2.WeightsRef]:
        """Versions held, oldest first."""
        return [self._held[version].index.ref for version in sorted(self._held)]

    def keep(self, number: int) -> None:
        """Keep so many versions from now on."""
        self._hold = number

    async def hold(self, policy_version: int, arrays: list[tuple[str, np.ndarray, str]]) -> weights_pb2.WeightsRef:
        """Name the weights and keep them for `FetchWeights`, telling nobody."""
        index = await asyncio.to_thread(make_index, self._scope, policy_version, arrays)
        self._keep(policy_version, Held(index, [array for _, array, _ in arrays]))
        return index.ref

    def rename(self, policy_version: int) -> weights_pb2.WeightsRef:
        """The newest weights are those of a later version, too."""
        newest = self._held[max(self._held)]
        index = weights_pb2.WeightsIndex()
        index.CopyFrom(newest.index)
        index.ref.policy_version = policy_version
        self._keep(policy_version, Held(index, newest.arrays))
        return index.ref

    def pin(self, policy_version: int) -> None:
        """Keep a version that is held until it is unpinned, however many newer ones come."""
        self._pinned.add(policy_version)

    def unpin(self, policy_version: int) -> None:
        self._pinned.discard(policy_version)

    def _keep(self, policy_version: int, held: Held) -> None:
        self._held[policy_version] = held
        for version in sorted(self._held)[: -self._hold]:
            if version not in self._pinned:
                del self._held[version]

    def find(self, request: trainer_pb2.FetchWeightsRequest) -> Held:
        """The version a sampler or teacher asks for.

        Raises:
            ConflictError: it works for another job or epoch.
            NotFoundError: not held (any more); lists what is.
        """
        if request.job_id != self._scope.job_id or request.epoch != self._scope.epoch:
            raise ConflictError(
                f"asked for weights of {request.job_id} epoch {request.epoch}, "
                f"this trainer leads {self._scope.job_id} epoch {self._scope.epoch}"
            )
        if not self._held:
            raise NotFoundError("no weights are published yet")
        version = request.weights.policy_version if request.HasField("weights") else max(self._held)
        held = self._held.get(version)
        if held is None or (request.weights.sha256 and request.weights.sha256 != held.index.ref.sha256):
            raise NotFoundError(f"policy version {version} is not held; held are {sorted(self._held)}")
        if request.dtype and any(entry.dtype != request.dtype for entry in held.index.tensors):
            raise UnimplementedError("weights are served in the element type they are trained in; ask without a dtype")
        return held


class Publisher(Shelf):
    """Publishes the student to the samplers."""

    def __init__(self, scope: Scope, jobs: JobStore, samplers: SamplerPool, hold: int) -> None:
        super().__init__(scope, hold)
        self._jobs = jobs
        self._samplers = samplers

    async def publish(self, policy_version: int, arrays: list[tuple[str, np.ndarray, str]]) -> weights_pb2.WeightsRef:
        """Name and hold the weights; returns once the reference is durable."""
        ref = await self.hold(policy_version, arrays)
        reference: dict[str, Any] = {
            "epoch": ref.epoch,
            "policy_version": ref.policy_version,
            "sha256": ref.sha256,
        }
        await self._jobs.update(self._scope, weights=reference)
        failpoint("trainer.published")
        self._samplers.hint(ref)
        return ref

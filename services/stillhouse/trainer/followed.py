"""The moving average of the student, published for the teachers that follow it.

A version lives:  the learner's average -> copied, named and held -> hinted to all teachers -> replaced by the next
Teachers pull, as samplers do. Published before the student of the same step: what a policy wrote can be scored by an
average at least as new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import numpy as np
from redis.exceptions import RedisError

from stillhouse.core.errors import StillhouseError
from stillhouse.core.queue.registry import Registry, ServiceInfo
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import Peers
from stillhouse.core.spec import EmaSpec
from stillhouse.trainer.publish import Shelf
from stillhouse.v1 import teacher_pb2, teacher_pb2_grpc, weights_pb2

HINT_TIMEOUT_S: Final = 5.0
"""Deadline of a SyncWeights hint: it only leaves a note."""


class Followed(Shelf):
    """Holds the newest average of one claim of a job."""

    def __init__(self, scope: Scope, ema: EmaSpec, *, registry: Registry, peers: Peers, log: Any) -> None:
        super().__init__(scope, hold=1)
        self._ema = ema
        self._registry = registry
        self._peers = peers
        self._log = log
        self._hints: set[asyncio.Task[None]] = set()

    async def publish(
        self, policy_version: int, copy: Callable[[], Awaitable[list[tuple[str, np.ndarray, str]]]]
    ) -> None:
        """Hold the average of a policy version, copied if it has moved since the version before."""
        if not self.refs or policy_version % self._ema.every == 0:
            ref = await self.hold(policy_version, await copy())
        else:
            ref = self.rename(policy_version)
        task = asyncio.create_task(self._hint(ref))
        self._hints.add(task)
        task.add_done_callback(self._hints.discard)

    async def _hint(self, ref: weights_pb2.WeightsRef) -> None:
        """Tell all teachers; one that misses it pulls when a rollout needs newer weights than it has."""
        request = teacher_pb2.TeacherServiceSyncWeightsRequest(job_id=self._scope.job_id, weights=ref)
        try:
            teachers = await self._registry.services("teacher")
        except RedisError as error:
            self._log.debug("SyncWeights missed by all", error=str(error))
            return
        await asyncio.gather(*(self._hint_one(info, request) for info in teachers))

    async def _hint_one(self, info: ServiceInfo, request: teacher_pb2.TeacherServiceSyncWeightsRequest) -> None:
        peer = self._peers.get(info.address, teacher_pb2_grpc.TeacherServiceStub, f"teacher {info.instance}")
        try:
            await peer.unary("SyncWeights", request, timeout_s=HINT_TIMEOUT_S)
        except StillhouseError as error:
            self._log.debug("SyncWeights missed", teacher=info.instance, error=error.message)

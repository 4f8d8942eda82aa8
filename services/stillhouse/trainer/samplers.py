"""The samplers that serve a job: leased while it runs, told about new weights, released at the end."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core.errors import DeadlineError, OverloadedError, StillhouseError, UnavailableError
from stillhouse.core.queue.registry import EXPIRY_S, Registry, ServiceInfo
from stillhouse.core.queue.shares import Want, shares
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import Peers
from stillhouse.core.spec import SamplersSpec
from stillhouse.core.tasks import cancel_all
from stillhouse.v1 import rollout_pb2, sampler_pb2, sampler_pb2_grpc, weights_pb2

AWAY_LEASES: Final = (0.2, 1.2)
"""Shortest and longest pause after samplers were given back, in leases: of two jobs one comes back first and finds all
of them free."""
HINT_TIMEOUT_S: Final = 5.0
"""Deadline of a SyncWeights hint: it only wakes the sampler."""
GENERATE_TIMEOUT_S: Final = 86_400.0
"""Deadline of a prompt's texts, which need not notice anything: a sampler that is lost is seen within GENERATE_LOOK_S,
one that hangs is ended by its pulse. A slow machine is no reason to begin a long text again."""
GENERATE_LOOK_S: Final = 1.0
"""How often a wait for texts looks whether their sampler is still there."""
GENERATE_TRIES: Final = 5
"""As for samples over the queue: what five samplers died of is its own fault."""
GENERATE_PAUSE_LEASES: Final = 0.5
"""Pause between tries, in leases: all of them outlast the lease of a dead sampler. At least so long that they outlast
its heartbeat, too, which takes it off the list."""


@dataclass(frozen=True, slots=True)
class Written:
    """Completions of a prompt, in the order of their seeds."""

    answers: list[sampler_pb2.GenerateResponse]
    sampler: str
    """Instance that wrote them."""
    seconds: float


class SamplerPool:
    """Leases `samplers.min`..`max` samplers for one claim of a job, as many as its share is (core/queue/shares.py).

    Until a stage that needs them has had `min` once, it does not hold on to fewer for longer than a lease: two jobs
    that each hold what the other waits for would wait for ever. It gives them back and comes again after a random
    pause.
    """

    def __init__(
        self,
        scope: Scope,
        spec: SamplersSpec,
        *,
        registry: Registry,
        peers: Peers,
        lease_s: float,
        log: Any,
        priority: int = 0,
    ) -> None:
        self._scope = scope
        self._spec = spec
        self._registry = registry
        self._peers = peers
        self._lease_s = lease_s
        self._log = log
        self._priority = priority
        self._since = 0.0
        """Unix time since when it asks for samplers."""
        self._leased: dict[str, ServiceInfo] = {}
        self._is_needed = False
        """The stage has something written."""
        self.has_started = False
        """It has had `min` samplers."""
        self._short_since: float | None = None
        """Monotonic time since when a job that has not started holds too few."""
        self._away_until = 0.0
        """Monotonic time until when it leases none, so that others can."""
        self._changed = asyncio.Event()
        self._hints: set[asyncio.Task[None]] = set()
        self._turns = itertools.count()

    @property
    def size(self) -> int:
        """Samplers that serve the job now."""
        return len(self._leased)

    def has(self, instance: str) -> bool:
        """Whether this sampler is leased, be it that it does not serve the job yet."""
        return instance in self._leased

    def leased(self) -> list[ServiceInfo]:
        """Those that serve the job now, by name."""
        return [self._leased[instance] for instance in sorted(self._leased)]

    async def use(self, is_needed: bool) -> None:
        """Lease samplers from now on, or give back what is leased: not every stage has something written."""
        if is_needed and not self._is_needed:
            self._since = time.time()
        self._is_needed = is_needed
        if not is_needed:
            self.has_started = False
            await self.release()

    async def run(self) -> None:
        """While they are needed: lease samplers that appear, renew the leases, forget those that are gone."""
        while True:
            try:
                await self._refresh()
            except (RedisError, OSError) as error:
                self._log.warning("cannot renew sampler leases", error=str(error))
            await asyncio.sleep(min(1.0, self._lease_s / 3))

    async def _refresh(self) -> None:
        if not self._is_needed or time.monotonic() < self._away_until:
            return
        alive = {info.instance: info for info in await self._registry.services("sampler")}
        share = await self._share(len(alive))
        # those we have come first, so that no share swaps a warm sampler for a cold one
        candidates = sorted(alive, key=lambda instance: (instance not in self._leased, instance))
        leased: dict[str, ServiceInfo] = {}
        for instance in candidates:
            if len(leased) >= share:
                break
            if await self._registry.lease_sampler(instance, self._scope, self._lease_s):
                leased[instance] = alive[instance]
        for instance in self._leased.keys() - leased.keys():
            if instance in alive and len(leased) >= share:
                self._log.info("sampler given back: other jobs have less than their share", sampler=instance)
                await self._registry.release_sampler(instance, self._scope)
            else:
                self._log.warning("sampler lost", sampler=instance)
        self._leased = leased
        self.has_started |= self.size >= self._spec.min
        if not self._is_needed:  # no more, since a moment ago
            await self.release()
        elif self._holds_in_vain():
            await self._give_back()
        self._changed.set()

    async def _share(self, number: int) -> int:
        """How many of `number` samplers are this job's."""
        want = Want(
            job_id=self._scope.job_id,
            at_least=self._spec.min,
            at_most=self._spec.max,
            priority=self._priority,
            has_begun=self.has_started,
            since=self._since,
        )
        wants = await self._registry.ask_for_samplers(self._scope, want, self._lease_s)
        return shares(wants, number)[self._scope.job_id]

    def _holds_in_vain(self) -> bool:
        """It has held too few samplers for a whole lease, and others may be waiting for these."""
        if self.has_started or not self._leased:
            self._short_since = None
            return False
        if self._short_since is None:
            self._short_since = time.monotonic()
        return time.monotonic() - self._short_since > self._lease_s

    async def _give_back(self) -> None:
        pause_s = self._lease_s * random.uniform(*AWAY_LEASES)
        self._log.info("too few samplers are free; gives back what it holds", held=self.size, min=self._spec.min)
        await self.release()
        self._short_since, self._away_until = None, time.monotonic() + pause_s

    async def wait_for_min(self) -> None:
        """Wait until `samplers.min` samplers are leased (interrupted from outside)."""
        await self._wait_for(self._spec.min)

    async def _wait_for(self, number: int) -> None:
        while self.size < number:
            self._changed.clear()
            await self._changed.wait()

    def hint(self, ref: weights_pb2.WeightsRef) -> None:
        """Tell the samplers about new weights; whoever misses it finds out at its next claim."""
        request = sampler_pb2.SamplerServiceSyncWeightsRequest(job_id=self._scope.job_id, weights=ref)
        for info in self._leased.values():
            task = asyncio.create_task(self._hint_one(info, request))
            self._hints.add(task)
            task.add_done_callback(self._hints.discard)

    async def _hint_one(self, info: ServiceInfo, request: sampler_pb2.SamplerServiceSyncWeightsRequest) -> None:
        try:
            await self._peer(info).unary("SyncWeights", request, timeout_s=HINT_TIMEOUT_S)
        except StillhouseError as error:
            self._log.debug("SyncWeights missed", sampler=info.instance, error=error.message)

    async def generate(self, request: sampler_pb2.GenerateRequest) -> Written:
        """Completions outside the queue, from the samplers in turns; one that dies is replaced by another.

        Raises:
            StillhouseError: the sampler refused, or none answered in GENERATE_TRIES.
        """
        for number in range(1, GENERATE_TRIES + 1):
            await self._wait_for(1)
            info = sorted(self._leased.values(), key=lambda info: info.instance)[next(self._turns) % self.size]
            started = time.monotonic()
            try:
                return Written(await self.write(info, request), info.instance, time.monotonic() - started)
            except StillhouseError as error:
                self._log.warning("text not written", sampler=info.instance, error=error.message, tries=number)
                if number == GENERATE_TRIES or not _may_pass(error):
                    raise
                await asyncio.sleep(max(GENERATE_PAUSE_LEASES * self._lease_s, EXPIRY_S / (GENERATE_TRIES - 1)))
        raise AssertionError("the last try returns or raises")

    async def write(
        self, info: ServiceInfo, request: sampler_pb2.GenerateRequest
    ) -> list[sampler_pb2.GenerateResponse]:
        """Completions by one of the samplers that are leased; once."""
        call = asyncio.ensure_future(self._answers(info, request))
        try:
            while not (await asyncio.wait({call}, timeout=GENERATE_LOOK_S))[0]:
                if info.instance not in self._leased:  # its connection may be silent for long
                    raise UnavailableError(f"sampler {info.instance} is gone")
            answers = call.result()
        finally:
            await cancel_all([call])
        is_cut_off = any(part.finish_reason == rollout_pb2.FINISH_REASON_ABORT for part in answers.values())
        if is_cut_off or len(answers) != len(request.seeds):
            raise UnavailableError(f"sampler {info.instance} stopped in the middle of a text")
        return [answers[index] for index in range(len(request.seeds))]

    async def _answers(
        self, info: ServiceInfo, request: sampler_pb2.GenerateRequest
    ) -> dict[int, sampler_pb2.GenerateResponse]:
        parts = self._peer(info).stream("Generate", request, timeout_s=GENERATE_TIMEOUT_S)
        return {part.index: part async for part in parts}

    def _peer(self, info: ServiceInfo) -> Any:
        return self._peers.get(info.address, sampler_pb2_grpc.SamplerServiceStub, f"sampler {info.instance}")

    async def release(self) -> None:
        """Give all samplers back."""
        await self._registry.ask_no_more(self._scope)
        for instance in self._leased:
            await self._registry.release_sampler(instance, self._scope)
        self._leased = {}


def _may_pass(error: StillhouseError) -> bool:
    """The sampler had an accident, it did not refuse: the same request may be answered the next time."""
    return isinstance(error, UnavailableError | DeadlineError | OverloadedError) or type(error) is StillhouseError

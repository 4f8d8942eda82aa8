"""What no trainer can do for a job, done by the one gateway replica that holds the lease `sh:sweeper`.

Each sweep:  jobs whose trainer is gone -> `stalled`; cancelled jobs without a trainer -> `cancelled`;
             pausing ones -> `paused`; the wish to pause on disk -> as the record says;
             queued jobs say when no trainer is there at all; records that the queue server lost -> rebuilt from
             job.json and final.json; half-deleted jobs -> deleted; half-written files of finished jobs ->
             removed; queue gauges.

Everything here may be repeated or done by two replicas at once: changes go through the record's own compare-and-set.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core.blobs import remove_temporaries, unsealed
from stillhouse.core.errors import ConflictError, CorruptError, NotFoundError, StillhouseError
from stillhouse.core.queue import keys
from stillhouse.core.queue.client import BEYOND_MAXMEMORY
from stillhouse.core.queue.epochs import close_epochs
from stillhouse.core.queue.jobs import IDEMPOTENCY_TTL_S, JobRecord
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.gateway import gauges
from stillhouse.gateway.deleting import finish_deletions
from stillhouse.gateway.jobs import FINAL, final_fields, initial_record, read_final, with_evaluations, write_final
from stillhouse.gateway.pausing import RESTING, keep_wish, rebuilt_paused

SWEEP_S: Final = 2.0
"""Time between sweeps."""
SLICE: Final = 20
"""Jobs that are looked at before requests have their turn: a millisecond or two."""
LEASE_MS: Final = 10_000
"""The sweeper's own lease: five sweeps, so that another replica takes over ten seconds after a crash."""
STALLING: Final = ("validating", "starting", "running", "stalled")
LED: Final = (*STALLING, "pausing", "cancelling")
"""Statuses in which a trainer must lead the job."""
WAITING: Final = ("queued", "resuming")
"""Statuses of jobs that no trainer leads yet."""
GONE_S: Final = 1.0
"""Patience with a job whose trainer has no heartbeat: two sweeps agree. That is 12 s after the trainer froze."""
TAKEOVER_S: Final = 4.0
"""Patience with a job whose trainer is well and does not lead it: after a claim it says so with its next heartbeat."""
NO_TRAINER: Final = "no_trainer"

# KEYS sweeper; ARGV instance, lease_ms
_HOLD = f"""{BEYOND_MAXMEMORY}
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class _Orphan:
    """A job seen without a trainer."""

    epoch: int
    since: float
    """Monotonic time of the first look that found none."""


class Sweeper:
    """One per gateway process; idle unless it holds the lease."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._hold = ctx.redis.register_script(_HOLD)
        self._orphans: dict[str, _Orphan] = {}
        self._settled: set[str] = set()
        """Jobs whose folder has a final.json and whose record exists: nothing more to do on disk."""

    async def run(self) -> None:
        """Sweep until `Context.stop` is set.

        waits for:    SWEEP_S
        produces:     changed job records, gauges
        unblocked by: stop; a queue server that is down costs one sweep
        """
        while not self._ctx.stop.is_set():
            try:
                if await self.hold():
                    await self.sweep()
                else:
                    gauges.forget()
            except (RedisError, OSError, StillhouseError) as error:
                gauges.forget()
                self._ctx.log.warning("sweep failed", error=str(error))
            try:
                async with asyncio.timeout(SWEEP_S):
                    await self._ctx.stop.wait()
            except TimeoutError:
                continue
        await self.release()

    async def hold(self) -> bool:
        """Take or keep the sweeper's lease."""
        return int(await self._hold(keys=[keys.SWEEPER], args=[self._ctx.instance, LEASE_MS])) == 1

    async def release(self) -> None:
        """Give the lease up, so that another replica goes on at once."""
        try:
            if await self._ctx.redis.get(keys.SWEEPER) == self._ctx.instance.encode():
                await self._ctx.redis.delete(keys.SWEEPER)
        except (RedisError, OSError) as error:
            self._ctx.log.warning("the sweeper's lease was not released", error=str(error))

    async def sweep(self) -> None:
        """One round."""
        await finish_deletions(self._ctx)
        await self._rebuild()
        active = await self._ctx.jobs.get_many(await self._ctx.jobs.active_ids())
        trainers = {info.instance: info for info in await self._ctx.registry.services("trainer")}
        for number, record in enumerate(active):
            if number % SLICE == 0:
                await asyncio.sleep(0)
            await self._keep_wish(record)
            with suppress(ConflictError):  # a trainer came back in this very moment
                await self._look_after(record, trainers)
        self._orphans = {job.id: self._orphans[job.id] for job in active if job.id in self._orphans}
        await gauges.measure(self._ctx, active)
        await asyncio.to_thread(gauges.measure_disk, self._ctx)

    async def _look_after(self, record: JobRecord, trainers: Mapping[str, ServiceInfo]) -> None:
        """Act on a job that has been without a trainer for longer than a takeover takes."""
        patience_s = await self._patience_s(record, trainers)
        if patience_s is None:
            self._orphans.pop(record.id, None)
            if record.status in WAITING and record.status_reason == NO_TRAINER:
                await self._say_waiting(record, "", "")
            return
        orphan = self._orphans.get(record.id)
        if orphan is None or orphan.epoch != record.epoch:
            self._orphans[record.id] = orphan = _Orphan(record.epoch, time.monotonic())
        if time.monotonic() - orphan.since < patience_s:
            return
        if record.status == "cancelling":
            await self._end(record)
        elif record.status == "pausing":
            await self._pause(record)
        elif record.status_reason != NO_TRAINER and record.status in WAITING:
            message = "no trainer answers; `stillhouse services` shows what runs, and the job starts when one is there"
            await self._say_waiting(record, NO_TRAINER, message)
        elif record.status_reason != NO_TRAINER:
            await self._stall(record)

    async def _patience_s(self, record: JobRecord, trainers: Mapping[str, ServiceInfo]) -> float | None:
        """How long the job may be as it is, being without a trainer; None if it is not.

        The heartbeat goes before the lease: 8 s after its last sign a trainer is gone, whatever `lease_s` is.
        """
        if record.status in WAITING:
            return None if trainers else GONE_S
        if record.status not in LED:
            return None
        trainer = trainers.get(record.trainer)
        if trainer is None:
            return GONE_S
        # a process of the same name that was started after the crash holds no lease of its own
        leads = trainer.job_id == record.id and await self._ctx.redis.exists(keys.lease(record.id))
        return None if leads else TAKEOVER_S

    async def _say_waiting(self, record: JobRecord, reason: str, message: str) -> None:
        """Why a job does not start."""
        await self._ctx.jobs.request(
            record.id, allowed=WAITING, only_epoch=record.epoch, status_reason=reason, status_message=message
        )

    async def _stall(self, record: JobRecord) -> None:
        message = f"trainer '{record.trainer}' is gone; the job goes on from its last step when another one is free"
        await self._ctx.jobs.request(
            record.id,
            allowed=STALLING,
            only_epoch=record.epoch,
            status="stalled",
            status_reason=NO_TRAINER,
            status_message=message,
        )
        data = {"status": "stalled", "reason": NO_TRAINER}
        await self._ctx.jobs.event(record.id, "job.status", message, level="warning", **data)

    async def _end(self, record: JobRecord) -> None:
        """Cancel in the place of a trainer, once its lease has run out, under a claim of our own: a trainer that wakes
        up later is fenced off.
        """
        jobs, epoch = self._ctx.jobs, await self._claim(record)
        if epoch == 0:
            return
        await jobs.update(
            Scope(record.id, epoch),
            allowed=("cancelling",),
            release=True,
            status="cancelled",
            status_reason="user",
            status_message="cancelled; no trainer was there to stop it",
            finished_at=round(time.time(), 3),
        )
        await close_epochs(self._ctx.redis, self._ctx.queue, record.id, through=epoch)
        await jobs.event(record.id, "job.status", "cancelled", status="cancelled")
        await asyncio.to_thread(write_final, self._ctx, await jobs.get(record.id))

    async def _claim(self, record: JobRecord) -> int:
        """Take the place of the job's trainer; the epoch, or 0 if its lease has not run out."""
        epoch_on_disk, lease_s = self._ctx.artifacts.job(record.id).highest_epoch(), self._ctx.settings.lease_s
        return await self._ctx.jobs.claim(
            record.id, self._ctx.instance, lease_s, epoch_on_disk, allowed=(record.status,)
        )

    async def _pause(self, record: JobRecord) -> None:
        """Pause in the place of a trainer. Its journals hold what it had trained."""
        epoch = await self._claim(record)
        if epoch == 0:
            return
        await close_epochs(self._ctx.redis, self._ctx.queue, record.id, through=epoch)
        message = f"paused on request after step {record.step}; no trainer was there to stop it"
        await self._ctx.jobs.update(
            Scope(record.id, epoch),
            allowed=("pausing",),
            release=True,
            status="paused",
            status_reason="user",
            status_message=message,
        )
        await self._ctx.jobs.event(record.id, "job.status", message, status="paused", step=record.step)

    async def _keep_wish(self, record: JobRecord) -> None:
        """The wish to pause on disk is what the record says; a gateway may have died in between."""
        job = self._ctx.artifacts.job(record.id)
        if (record.status in RESTING) != job.paused.exists():
            await asyncio.to_thread(keep_wish, job, await self._ctx.jobs.get(record.id))

    async def _rebuild(self) -> None:
        """Bring back the records of jobs that lie in the artifacts and that the queue server does not know."""
        on_disk = await asyncio.to_thread(self._ctx.artifacts.job_ids)
        members: Any = await self._ctx.redis.zrange(keys.JOBS, 0, -1)
        known = {member.decode() for member in members}
        active = set(await self._ctx.jobs.active_ids())
        self._settled &= known
        for job_id in on_disk:
            if job_id in self._settled or job_id in active:
                continue
            final = self._ctx.artifacts.job(job_id).root / FINAL
            try:
                if job_id not in known:
                    await self._rebuild_one(job_id)
                elif final.is_file():
                    await asyncio.to_thread(remove_temporaries, final.parent, final.stat().st_mtime)
                    self._settled.add(job_id)
                elif (record := await self._ctx.jobs.get(job_id)).is_terminal:  # whoever ended it had no room, or died
                    await asyncio.to_thread(write_final, self._ctx, record)
            except (CorruptError, KeyError, TypeError, NotFoundError) as error:
                self._settled.add(job_id)  # said once; a person has to look
                self._ctx.log.error("job cannot be rebuilt", job_id=job_id, error=str(error))

    async def _rebuild_one(self, job_id: str) -> None:
        artifacts = self._ctx.artifacts.job(job_id)
        document = unsealed(artifacts.job_json)
        record = await asyncio.to_thread(with_evaluations, artifacts, initial_record(document))
        if epoch := artifacts.highest_epoch():  # a trainer that may still lead it is fenced off
            record = replace(record, epoch=epoch + 1)
        final = await asyncio.to_thread(read_final, artifacts, record.stop_step)
        if final is not None:
            record = replace(record, **final_fields(final))
            if record.status_reason == "corrupt":
                self._ctx.log.error("final.json does not verify", job_id=job_id, error=record.status_message)
        elif artifacts.paused.exists():
            record = rebuilt_paused(artifacts, record)
        token, body_sha256 = document["idempotency"]
        if time.time() - record.created_at > IDEMPOTENCY_TTL_S:
            token = ""  # forgotten by now; a later job may have used it again
        made = await self._ctx.jobs.create(record, idempotency_key=token, body_sha256=body_sha256)
        other_id = made.partition(":")[0]
        if made and other_id != job_id:
            if await asyncio.to_thread(self._remove_twin, job_id, other_id, token):
                return
            await self._ctx.jobs.create(record)
        if record.is_terminal:
            await self._ctx.redis.zrem(keys.JOBS_ACTIVE, job_id)
        else:
            await self._ctx.jobs.event(job_id, "job.rebuilt", "the queue server had lost this job's record")
        self._ctx.log.warning("job record rebuilt", job_id=job_id, status=record.status)

    def _remove_twin(self, job_id: str, other_id: str, token: str) -> bool:
        """Delete a job.json whose request died before the record existed, when the client's retry made another job.

        Whatever has more than what a request writes was a job once and stays.
        """
        twin, other = self._ctx.artifacts.job(job_id), self._ctx.artifacts.job(other_id)
        origin = unsealed(twin.job_json).get("origin")
        if twin.highest_epoch() > (origin["epoch"] if origin else 0):
            return False
        past = {twin.epochs.name, twin.evaluations.name} if origin else set()
        if {path.name for path in twin.root.iterdir()} - {twin.job_json.name, twin.references.name} - past:
            return False
        if not other.job_json.is_file() or unsealed(other.job_json)["idempotency"][0] != token:
            return False
        twin.references.unlink(missing_ok=True)
        for name in past:
            shutil.rmtree(twin.root / name, ignore_errors=True)
        twin.job_json.unlink()
        twin.root.rmdir()  # refuses a folder that was filled meanwhile
        return True

"""How a claim ends: the job ends with it, is handed on to another trainer, or rests as its user wished.

Written once, by a fenced update of the record, then beside the artifacts.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core.blobs import JobArtifacts, sealed, write_json
from stillhouse.core.errors import ConflictError, LeaseLostError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue.epochs import close_epochs
from stillhouse.core.queue.jobs import final_document
from stillhouse.core.queue.streams import Scope
from stillhouse.core.queue.turns import CLAIMABLE
from stillhouse.core.report.files import write_report
from stillhouse.core.service import Context
from stillhouse.trainer import manifests
from stillhouse.trainer.exchange import Exchange

ENDABLE: Final = (*CLAIMABLE, "pausing")
"""States in which a trainer may end the job that it leads."""
HANDED_ON: Final = "handed on"
CRASHED: Final = "crashed"


@dataclass(frozen=True, slots=True)
class End:
    """How a claim ended: a terminal status of the job, HANDED_ON or CRASHED (the job goes on under a new claim)."""

    status: str
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


class Ends:
    """Writes the end of one claim."""

    def __init__(self, ctx: Context, scope: Scope, artifacts: JobArtifacts, log: Any) -> None:
        self._ctx = ctx
        self._scope = scope
        self._artifacts = artifacts
        self._log = log

    async def write(self, end: End, exchange: Exchange | None, *, step: int) -> None:
        """Write how the claim ended, once; `step` = steps trained. A write that fails leaves the job to the next."""
        try:
            if exchange is not None:
                await exchange.close()
            else:  # it ended before it had streams; those of a trainer that died before it may still be there
                await close_epochs(self._ctx.redis, self._ctx.queue, self._scope.job_id, through=self._scope.epoch)
            if end.status in (HANDED_ON, CRASHED) and await self._obeyed(end, step):
                return
            if end.status == HANDED_ON:
                why = "drains" if self._ctx.stop.is_set() else "had stopped it when it was resumed"
                message = f"{self._ctx.instance} {why}; another trainer may take over"
                await self._release("draining", message, "job.handed_on", "info")
            elif end.status == CRASHED:
                assert end.error is not None
                await self._release("crashed", end.error["message"], "job.crashed", "error")
            else:
                await self._write_final(end)
        except (LeaseLostError, ConflictError) as lost:
            self._log.warning("the job went on without this trainer before its end was written", reason=lost.message)
        except (RedisError, OSError) as error:
            self._log.error(
                "the end of the job is not written; another claim will", status=end.status, error=str(error)
            )

    async def _obeyed(self, end: End, step: int) -> bool:
        """Whether a wish of the user's is what ends the claim, and is fulfilled, whatever else made it stop."""
        for _ in range(2):  # a wish may change once more while it is fulfilled
            status = (await self._ctx.jobs.get(self._scope.job_id)).status
            if status == "cancelling":
                await self._write_final(End("cancelled"))
                return True
            if status != "pausing":
                return False
            with suppress(ConflictError):
                await self._pause(end, step)
                return True
        return False

    async def _pause(self, end: End, step: int) -> None:
        """Give the job up until the user resumes it."""
        message = f"paused on request at step {step}; resume it to go on from there"
        await self.close_epoch("crashed" if end.status == CRASHED else "paused", message)
        await self._ctx.jobs.update(
            self._scope,
            allowed=("pausing",),
            release=True,
            status="paused",
            status_reason="user",
            status_message=message,
        )
        failpoint("trainer.paused")
        data = {"status": "paused", "step": step, "epoch": self._scope.epoch}
        await self._ctx.jobs.event(self._scope.job_id, "job.status", message, **data)

    async def _release(self, reason: str, message: str, event: str, level: str) -> None:
        """Give the job up for another trainer (or this one, later) to take."""
        await self.close_epoch(reason, message)
        await self._ctx.jobs.event(self._scope.job_id, event, message, level=level, epoch=self._scope.epoch)
        await self._ctx.jobs.update(
            self._scope,
            release=True,
            status_reason=reason,
            status_message=f"waits for another trainer: {message}",
        )

    async def close_epoch(self, reason: str, message: str) -> None:
        """Note in the epoch's folder how its claim ended."""
        if self._artifacts.epoch(self._scope.epoch).is_dir():
            with suppress(OSError):
                await asyncio.to_thread(manifests.close_epoch, self._artifacts, self._scope.epoch, reason, message)

    async def _write_final(self, end: End) -> None:
        fields: dict[str, Any] = {"status_reason": "", "status_message": "", "finished_at": round(time.time(), 3)}
        if end.error is not None:
            fields.update(status_reason=end.error["code"], status_message=end.error["message"], error=end.error)
        if end.result is not None:
            fields["result"] = end.result
        await self._ctx.jobs.update(self._scope, allowed=ENDABLE, release=True, status=end.status, **fields)
        failpoint("trainer.ended")
        # after the fenced update, so that a zombie never ends a job that goes on
        record = await self._ctx.jobs.get(self._scope.job_id)
        try:
            await asyncio.to_thread(write_report, record, self._artifacts)
        except (OSError, ValueError, KeyError, TypeError) as error:  # people read it: nothing else depends on it
            self._log.error("the report is not written", error=str(error))
        # last: what is half written when this is there was left by a process that died, and is removed
        await asyncio.to_thread(write_json, self._artifacts.final, sealed(final_document(record)))
        level = "warning" if end.status == "failed" else "info"
        message = f"job {end.status}" + (f": {end.error['message']}" if end.error else "")
        await self._ctx.jobs.event(self._scope.job_id, "job.status", message, level=level, status=end.status)
        self._log.info("job ended", status=end.status, error=end.error)

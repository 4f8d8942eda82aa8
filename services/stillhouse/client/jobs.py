"""Jobs: submit, look at, stop, go on, wait for."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.client import answers
from stillhouse.client.calls import Call, path
from stillhouse.client.errors import ConflictError
from stillhouse.client.history import JobHistory
from stillhouse.client.resource import PAGE, body_of, delete, tell
from stillhouse.client.sender import is_passing
from stillhouse.core.errors import DeadlineError, JobFailedError, StillhouseError
from stillhouse.core.schemas import Event, Job, Page, Preflight

if TYPE_CHECKING:
    from stillhouse.core.spec import JobSpec


class JobVerbs(JobHistory):
    """What can be done with jobs."""

    async def create(self, spec: Mapping[str, Any] | JobSpec, *, idempotency_key: str | None = None) -> Job:
        """Submit a job. With a key of your own, submitting again gives the same job, also from another process.

        >>> first = client.jobs.create(spec, idempotency_key="monday")
        >>> client.jobs.create(spec, idempotency_key="monday").id == first.id
        True
        """
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        return await self._sender.send(Call("POST", "/v1/jobs", Job, headers=headers, json=body_of(spec)))

    async def validate(
        self, spec: Mapping[str, Any] | JobSpec, *, live: bool = False, timeout_s: float | None = None
    ) -> Preflight:
        """Check a job without submitting it: `verdict`, `checks` with evidence and fix, and an estimate of the cost.

        With `live` models are loaded and probed, as a job of kind `preflight` whose end is waited for.

        Raises:
            InvalidRequestError: with `live`, what can be checked at once is wrong already.
            JobFailedError: the live checks could not be made.
            DeadlineError: they did not end within `timeout_s`; the job goes on.

        >>> report = client.jobs.validate(spec)
        >>> [check.message for check in report.checks if check.verdict == "error"]
        []
        """
        if not live:
            return await self._sender.send(Call("POST", "/v1/jobs/validate", Preflight, json=body_of(spec)))
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        call = Call("POST", "/v1/jobs/validate", Job, {"live": "true"}, headers, json=body_of(spec))
        job = await self.wait((await self._sender.send(call)).id, timeout_s=timeout_s)
        if job.status != "succeeded" or not job.result:
            reason = (job.error or {}).get("message") or job.status_message
            raise JobFailedError(f"the checks could not be made: job {job.id} {job.status}: {reason}")
        return answers.read(Preflight, job.result["preflight"])

    async def preflight(self, job_id: str) -> Preflight:
        """What was found when a job was checked before its first step.

        Raises:
            NotFoundError: it was not looked at yet.
        """
        return await self._sender.send(Call("GET", path("/v1/jobs/{}/preflight", job_id), Preflight))

    async def get(self, job_id: str) -> Job:
        """A job.

        >>> client.jobs.get(job.id).status
        'succeeded'
        """
        return await self._sender.send(Call("GET", path("/v1/jobs/{}", job_id), Job))

    async def iter(
        self, *, status: str | None = None, order: Literal["asc", "desc"] = "desc", owner: str | None = None
    ) -> AsyncIterator[Job]:
        """All jobs by creation time, newest first unless `order` is "asc", page by page as they are needed.

        `owner` needs the scope `admin`, which sees everybody's jobs.

        >>> job.id in {one.id for one in client.jobs.iter(status="succeeded")}
        True
        """
        async for job in self._sender.pages(_list(status, order, owner)):
            yield job

    async def list(
        self,
        *,
        limit: int | None = 20,
        after: str = "",
        status: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        owner: str | None = None,
    ) -> list[Job]:
        """Up to `limit` jobs (None = all) behind the one with id `after`, without their inline rows; see `iter`."""
        return [job async for job in self._sender.pages(_list(status, order, owner).after(after), limit=limit)]

    async def cancel(self, job_id: str) -> Job:
        """End a job; it may be `cancelling` for a while."""
        return await self._ask(job_id, "cancel", ("cancelling", "cancelled"))

    async def pause(self, job_id: str) -> Job:
        """Stop a job at the next step, with a checkpoint, and free its services; it may be `pausing` for a while."""
        return await self._ask(job_id, "pause", ("pausing", "paused"))

    async def resume(self, job_id: str) -> Job:
        """Let a paused job go on where it stopped."""
        return await self._ask(job_id, "resume", ("resuming", "queued", "validating", "starting", "running"))

    async def _ask(self, job_id: str, verb: str, reached: Collection[str]) -> Job:
        try:
            return await self._sender.send(Call("POST", path("/v1/jobs/{}/" + verb, job_id), Job))
        except ConflictError as error:
            # the answer to the first attempt got lost: has that one done it?
            if error.is_repeat and (job := await self.get(job_id)).status in reached:
                return job
            raise

    async def retry(self, job_id: str, *, checkpoint: str | None = None, idempotency_key: str | None = None) -> Job:
        """A new job that goes on from a checkpoint of an ended one, by default the newest: weights, optimizer, data."""
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        body = {"checkpoint": checkpoint} if checkpoint else {}
        return await self._sender.send(Call("POST", path("/v1/jobs/{}/retry", job_id), Job, headers=headers, json=body))

    async def delete(self, job_id: str) -> None:
        """Delete an ended job with all that it made.

        Raises:
            ConflictError: it has not ended, or another job needs its checkpoints.
        """
        await delete(self._sender, path("/v1/jobs/{}", job_id))

    async def wait(
        self,
        job_id: str,
        *,
        on_event: Callable[[Event], object] | None = None,
        on_progress: Callable[[Job], object] | None = None,
        until: Collection[str] = (),
        timeout_s: float | None = None,
        poll_s: float = 1.0,
    ) -> Job:
        """Wait for a job's end, whatever it is, and give the job.

        A paused job is waited for, too: somebody may resume it. `until=("paused",)` returns it then. A gateway that
        stops to answer is waited for up to ten minutes.

        Args:
            on_event: sees every event since the job began, once.
            on_progress: sees the job when its status or progress has changed.
            until: statuses at which to return besides the terminal ones.
            timeout_s: None = as long as it takes; Ctrl-C leaves the job running.

        Raises:
            DeadlineError: it did not end within `timeout_s`; it goes on.

        >>> client.jobs.wait(job.id, on_progress=lambda job: print(job.progress.percent), timeout_s=3600).is_terminal
        100.0
        True
        """
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        after, is_told, patience, shown = "", on_event is None, None, None
        while True:
            try:
                job = await self.get(job_id)
                # an ended job may be a moment ahead of its last event: the stream waits for that one
                source = self.stream_events if job.is_terminal else self.events
                news = [] if is_told else [event async for event in source(job_id, after=after)]
            except StillhouseError as error:
                if patience is None or not is_passing(error) or _is_over(deadline, 0):
                    raise
                await self._sender.again(patience, error)
                continue
            patience = self._sender.outage()
            for event in news:
                after, is_told = event.id, is_told or event.is_last
                await tell(on_event, event)
            if (job.status, job.get("progress")) != shown:
                shown = (job.status, job.get("progress"))
                await tell(on_progress, job)
            if job.is_terminal or job.status in until:
                return job
            if _is_over(deadline, poll_s):
                raise DeadlineError(_still(job, timeout_s or 0.0))
            await self._sender.transport.sleep(poll_s)


def _list(status: str | None, order: str, owner: str | None) -> Call[Page[Job]]:
    params = {"status": status, "order": order, "owner": owner, "limit": PAGE}
    return Call("GET", "/v1/jobs", Page[Job], params)


def _is_over(deadline: float | None, ahead_s: float) -> bool:
    return deadline is not None and time.monotonic() + ahead_s > deadline


def _still(job: Job, timeout_s: float) -> str:
    if job.status in ("pausing", "paused"):
        return f"job {job.id} is '{job.status}' after {timeout_s:g} s; `resume` lets it go on"
    return f"job {job.id} is still '{job.status}' after {timeout_s:g} s; it goes on"

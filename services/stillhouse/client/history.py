"""What happens in a job: events, logs, metrics, evaluations, samples."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from stillhouse.client import sse
from stillhouse.client.calls import Call, path
from stillhouse.client.resource import PAGE, Resource
from stillhouse.core.schemas import (
    DeadLetter,
    Event,
    Job,
    LetterRetries,
    LetterRetry,
    LogLine,
    MetricPoint,
    Page,
    Report,
    Sample,
)


class JobHistory(Resource):
    """What happened in a job, and what its steps measured."""

    async def events(self, job_id: str, *, after: str | None = "") -> AsyncIterator[Event]:
        """Events so far, after the one with id `after`, oldest first. `stream_events` goes on with those to come.

        >>> [event.data["status"] for event in client.jobs.events(job.id) if event.type == "job.status"][0]
        'queued'
        """
        async for event in self._sender.pages(_events(job_id).after(after or "")):
            yield event

    async def stream_events(self, job_id: str, *, after: str = "") -> AsyncIterator[Event]:
        """Events after the one with id `after`, each once, as they happen, until the job's last one.

        Connects again by itself, also to a gateway that was away for some minutes.

        >>> [event.data["status"] for event in client.jobs.stream_events(job.id) if event.is_last]
        ['succeeded']
        """
        pages = _events(job_id)
        async for event in sse.follow(
            self._sender,
            pages,
            replace(pages, params={}),
            Event,
            after,
            is_last=lambda event: event.is_last,
            is_over=lambda: self._has_ended(job_id),
        ):
            yield event

    async def _has_ended(self, job_id: str) -> bool:
        return (await self._sender.send(Call("GET", path("/v1/jobs/{}", job_id), Job))).is_terminal

    async def logs(
        self, job_id: str, *, service: str = "", tail: int = 100, follow: bool = False, after: str = ""
    ) -> AsyncIterator[LogLine]:
        """The last `tail` lines that services wrote about a job; with `follow` those to come, too, until it ends.

        `service`: only those of samplers, teachers, trainers or gateways, by role. `after`: only those behind this id.
        """
        where = path("/v1/jobs/{}/logs", job_id)
        pages = Call("GET", where, Page[LogLine], {"service": service, "tail": tail})
        if not follow:
            for line in (await self._sender.send(pages.after(after))).data:
                yield line
            return
        async for line in sse.follow(
            self._sender,
            pages,
            replace(pages, params={**pages.params, "follow": "true"}),
            LogLine,
            after,
            is_last=lambda _: False,
            is_over=lambda: self._has_ended(job_id),
        ):
            yield line

    async def metrics(
        self,
        job_id: str,
        *,
        names: Sequence[str] = (),
        step_from: int = 0,
        step_to: int | None = None,
        resolution: int | None = None,
    ) -> list[MetricPoint]:
        """Points by step, each with `values` by name; at most `resolution`, each then a mean over neighbours.

        >>> [point.step for point in client.jobs.metrics(job.id, names=["loss/total"], step_from=3)]
        [3, 4]
        """
        params = {"names": ",".join(names), "step_from": step_from, "step_to": step_to, "resolution": resolution}
        call = Call("GET", path("/v1/jobs/{}/metrics", job_id), Page[MetricPoint], params)
        return (await self._sender.send(call)).data

    async def evaluations(self, job_id: str) -> list[dict[str, Any]]:
        """Held-out measurements by step."""
        call = Call("GET", path("/v1/jobs/{}/evaluations", job_id), Page[dict[str, Any]])
        return (await self._sender.send(call)).data

    async def report(self, job_id: str) -> Report:
        """What a job was, cost and reached, in one document."""
        return await self._sender.send(Call("GET", path("/v1/jobs/{}/report", job_id), Report))

    async def report_html(self, job_id: str) -> str:
        """The same as a page for people, complete in itself."""
        headers = {"Accept": "text/html"}
        return await self._sender.send(Call("GET", path("/v1/jobs/{}/report", job_id), str, headers=headers))

    async def samples(
        self,
        job_id: str,
        *,
        step: int | None = None,
        teacher: str = "",
        top: int = 5,
        order: Literal["asc", "desc"] = "desc",
        after: str = "",
        limit: int | None = 20,
    ) -> list[Sample]:
        """What steps trained on: completions with the log-probabilities of student and teacher for every token.

        Args:
            step: only of this step, from 1.
            teacher: only those that this teacher judged, in its words.
            top: alternatives to each token, at most, where the job stored any.
            order: of the steps; "desc" = newest first.
            limit: samples, at most; None = all.

        >>> sample = client.jobs.samples(job.id, step=1, limit=1)[0]
        >>> sample.completion == "".join(token.text for token in sample.tokens)
        True
        """
        params = {"step": step, "teacher": teacher, "top": top, "order": order, "after": after, "limit": PAGE}
        call = Call("GET", path("/v1/jobs/{}/samples", job_id), Page[Sample], params)
        return [sample async for sample in self._sender.pages(call, limit=limit)]

    async def dead_letters(self, job_id: str) -> list[DeadLetter]:
        """Samples that could not be sampled or scored, by step, with the reason."""
        params = {"limit": 10 * PAGE}
        call = Call("GET", path("/v1/jobs/{}/dead_letters", job_id), Page[DeadLetter], params)
        return [letter async for letter in self._sender.pages(call)]

    async def retry_dead_letters(self, job_id: str, ids: Iterable[str]) -> list[LetterRetry]:
        """Try samples again that were given up, while their step is still being collected; says of each whether."""
        where = path("/v1/jobs/{}/dead_letters/retry", job_id)
        return (await self._sender.send(Call("POST", where, LetterRetries, json={"ids": [*ids]}))).data


def _events(job_id: str) -> Call[Page[Event]]:
    return Call("GET", path("/v1/jobs/{}/events", job_id), Page[Event], {"limit": PAGE})

"""How long the client tries again, and what it says in the end."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from stillhouse import (
    AsyncClient,
    Client,
    DeadlineError,
    RateLimitError,
    ServerError,
    UnavailableError,
)
from stillhouse.client import calls, errors
from stillhouse.client.transport import BlockingTransport
from stillhouse.core.errors import SpecError

Answer = httpx.Response | Exception
PROGRESS = {"step": 1, "total_steps": 4, "percent": 25.0}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the client makes; none is waited for."""
    pauses: list[float] = []

    async def sleep(_: BlockingTransport, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(BlockingTransport, "sleep", sleep)
    return pauses


def playing(answers: list[Answer], **options: Any) -> Client:
    """A client whose gateway gives one answer after the other, the last one again and again."""

    def answer(_: httpx.Request) -> httpx.Response:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, Exception):
            raise found
        return found

    return Client("http://gateway", "key", transport=httpx.MockTransport(answer), **options)


def busy(after: str) -> httpx.Response:
    return httpx.Response(429, headers={"Retry-After": after}, json={"code": "overloaded", "detail": "slow down"})


def job(status: str, *, is_terminal: bool = False) -> httpx.Response:
    return httpx.Response(200, json={"id": "job_1", "status": status, "is_terminal": is_terminal, "progress": PROGRESS})


def test_it_never_comes_back_before_it_was_asked_to(slept: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    with playing([busy("30"), busy(date), busy("nonsense"), job("running")]) as client:
        assert client.jobs.get("job_1").status == "running"
    assert slept[0] == 30
    assert 15 < slept[1] <= 20
    assert slept[2] <= calls.PAUSE_MAX_S


def test_a_longer_pause_is_the_callers_to_decide(slept: list[float]) -> None:
    with playing([busy("3600")]) as client, pytest.raises(RateLimitError) as caught:
        client.jobs.get("job_1")
    assert caught.value.retry_after_s == 3600
    assert slept == []


def test_pauses_grow_and_end() -> None:
    pauses = [calls.pause_s(attempt) for attempt in range(12)]
    assert all(0.5 * calls.PAUSE_S <= pause <= calls.PAUSE_MAX_S for pause in pauses)
    assert pauses[0] < 0.3 < 2 <= min(pauses[5:])


def test_a_deadline_ends_the_repeats(slept: list[float]) -> None:
    down = httpx.ConnectError("refused")
    with playing([down], retries=1000, deadline_s=0.0) as client, pytest.raises(UnavailableError, match="refused"):
        client.health()
    assert slept == []
    with playing([busy("30")], deadline_s=5) as client, pytest.raises(RateLimitError):
        client.health()
    assert slept == []


def test_other_patience_over_the_same_connections(slept: list[float]) -> None:
    with playing([httpx.Response(503, json={})]) as client:
        with pytest.raises(ServerError):
            client.with_options(retries=0).health()
        assert slept == []
        with pytest.raises(ServerError):
            client.health()
        assert len(slept) == 5


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequestError),
        (401, errors.AuthenticationError),
        (403, errors.ForbiddenError),
        (404, errors.NotFoundError),
        (409, errors.ConflictError),
        (413, errors.InvalidRequestError),
        (422, errors.InvalidRequestError),
        (429, errors.RateLimitError),
        (500, errors.ServerError),
        (418, errors.ApiError),
    ],
)
def test_errors_by_status_survive_pickling(status: int, kind: type[errors.ApiError]) -> None:
    body = {"code": "c", "detail": "d", "param": "p", "request_id": "r", "errors": [{"param": "p", "message": "m"}]}
    with playing([httpx.Response(status, json=body)], retries=0) as client, pytest.raises(errors.ApiError) as caught:
        client.jobs.get("job_1")
    assert type(caught.value) is kind
    twin = pickle.loads(pickle.dumps(caught.value))
    assert type(twin) is kind
    assert (twin.status, twin.code, str(twin), twin.param, twin.request_id) == (status, "c", "d", "p", "r")
    assert twin.errors == body["errors"]


def test_no_id_leads_elsewhere() -> None:
    paths = []

    def note(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(200, json={"id": "x"})

    with Client("http://gateway", "key", transport=httpx.MockTransport(note)) as client:
        client.jobs.get("job_1/../../keys?x=1")
        for nothing in ("", ".", ".."):
            with pytest.raises(SpecError):
                client.jobs.delete(nothing)
    assert paths == [b"/v1/jobs/job_1%2F..%2F..%2Fkeys%3Fx%3D1"]


def test_waiting_lives_through_an_outage(slept: list[float]) -> None:
    down: list[Answer] = [httpx.ConnectError("refused")] * 30
    with playing([job("running"), *down, job("succeeded", is_terminal=True)]) as client:
        assert client.jobs.wait("job_1").status == "succeeded"
    with playing([httpx.ConnectError("refused")]) as client, pytest.raises(UnavailableError):
        client.jobs.wait("job_1")


def test_waiting_tells_progress_and_stops_where_it_was_told_to(slept: list[float]) -> None:
    seen: list[str] = []
    answers: list[Answer] = [job("queued"), job("running"), job("running"), job("paused")]
    with playing(answers) as client:
        ended = client.jobs.wait("job_1", until=("paused",), on_progress=lambda job: seen.append(job.status))
        assert ended.status == "paused"
        assert seen == ["queued", "running", "paused"]
        with pytest.raises(DeadlineError, match="resume"):
            client.jobs.wait("job_1", timeout_s=0)


def test_a_coroutine_function_is_no_callback_of_the_blocking_client() -> None:
    async def wrong(_: Any) -> None:
        import asyncio

        await asyncio.sleep(0)

    with playing([job("succeeded", is_terminal=True)]) as client, pytest.raises(RuntimeError, match="AsyncClient"):
        client.jobs.wait("job_1", on_progress=wrong)


async def test_it_is_one_of_the_asynchronous_client() -> None:
    seen: list[str] = []

    async def right(job: Any) -> None:
        seen.append(job.status)

    transport = httpx.MockTransport(lambda _: job("succeeded", is_terminal=True))
    async with AsyncClient("http://gateway", "key", transport=transport) as client:
        await client.jobs.wait("job_1", on_progress=right)
    assert seen == ["succeeded"]


def test_an_answer_that_is_no_json_is_an_error_that_shows_it() -> None:
    page = httpx.Response(200, text="<html>log in first")
    with playing([page]) as client, pytest.raises(errors.ApiError, match="log in first"):
        client.jobs.get("job_1")


def test_the_key_is_in_no_text() -> None:
    with Client("http://gateway", "very-secret") as client:
        assert "very-secret" not in repr(client._twin._sender)

"""The client: where it finds the gateway, what it repeats, how it resumes, what it refuses to unpack."""

from __future__ import annotations

import copy
import inspect
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.client import calls, unpack
from stillhouse.client.aio import AsyncClient
from stillhouse.client.client import Client
from stillhouse.client.errors import ApiError, ConflictError, NotFoundError
from stillhouse.client.sse import Reader
from stillhouse.client.target import Target, find_target
from stillhouse.client.transport import Blocking
from stillhouse.core.errors import ConfigError, CorruptError, DeadlineError, SpecError, UnavailableError

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "pause_s", lambda *_: 0.0)


def make_client(handler: Handler, retries: int = 3, **options: Any) -> Client:
    return Client("http://gateway", "key", retries=retries, transport=httpx.MockTransport(handler), **options)


def make_async_client(handler: Handler, retries: int = 3) -> AsyncClient:
    return AsyncClient("http://gateway", "key", retries=retries, transport=httpx.MockTransport(handler))


def test_where_the_gateway_is(tmp_path: Path) -> None:
    env = {"STILLHOUSE_HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="stillhouse up"):
        find_target(None, None, env)
    (tmp_path / "client.json").write_text(json.dumps({"url": "http://local:1/", "api_key": "local-key"}))
    assert find_target(None, None, env) == Target("http://local:1", "local-key")
    env["STILLHOUSE_URL"] = "http://env:2"
    assert find_target(None, None, env) == Target("http://env:2", ""), "the local key stays here"
    env["STILLHOUSE_API_KEY"] = "env-key"
    assert find_target(None, None, env) == Target("http://env:2", "env-key")
    assert find_target("http://arg:3", "arg-key", env) == Target("http://arg:3", "arg-key")
    with pytest.raises(ConfigError, match="http://"):
        find_target("ftp://x", None, env)
    (tmp_path / "client.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_target(None, None, env)


def test_errors_carry_what_the_problem_says() -> None:
    body = {"status": 422, "code": "invalid_request", "detail": "seed: bad", "param": "seed", "request_id": "req_1"}
    with make_client(lambda _: httpx.Response(422, json=body)) as made, pytest.raises(ApiError) as caught:
        made.jobs.get("job_x")
    error = caught.value
    assert (error.status, error.code, error.param, error.detail, error.request_id) == (
        422, "invalid_request", "seed", "seed: bad", "req_1",
    )  # fmt: skip
    twin = copy.copy(error)  # takes the way of pickling, as multiprocessing does
    assert (twin.status, twin.param, str(twin)) == (422, "seed", "seed: bad")
    with make_client(lambda _: httpx.Response(404, text="<html>proxy")) as made, pytest.raises(ApiError, match="proxy"):
        made.models.list()


def test_a_create_is_repeated_with_the_same_key_until_it_gets_through() -> None:
    keys = []

    def flaky(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["idempotency-key"])
        if len(keys) == 1:
            raise httpx.ReadError("cut")
        if len(keys) == 2:
            return httpx.Response(503, headers={"Retry-After": "1"}, json={})
        return httpx.Response(201, json={"id": "job_1"})

    with make_client(flaky) as made:
        assert made.jobs.create({"name": "x"})["id"] == "job_1"
        made.jobs.create({"name": "x"})
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_it_gives_up_with_a_reason() -> None:
    attempts = []

    def down(request: httpx.Request) -> httpx.Response:
        attempts.append(request)
        raise httpx.ConnectError("refused")

    with make_client(down, retries=2) as made, pytest.raises(UnavailableError, match=r"http://gateway.*refused"):
        made.health()
    assert len(attempts) == 3


@pytest.mark.parametrize(("status", "is_done"), [("cancelling", True), ("cancelled", True), ("succeeded", False)])
def test_a_cancel_whose_answer_got_lost_is_done_if_the_job_says_so(status: str, is_done: bool) -> None:
    sent = []

    def lost(request: httpx.Request) -> httpx.Response:
        sent.append(request.method)
        if len(sent) == 1:
            raise httpx.ReadTimeout("slow")
        if request.method == "POST":
            return httpx.Response(409, json={"code": "conflict", "detail": f"it is {status}"})
        return httpx.Response(200, json={"id": "job_1", "status": status})

    with make_client(lost) as made:
        if is_done:
            assert made.jobs.cancel("job_1").status == status
        else:
            with pytest.raises(ConflictError, match="succeeded"):
                made.jobs.cancel("job_1")
    assert sent == ["POST", "POST", "GET"]


def test_a_conflict_is_one_where_no_answer_got_lost() -> None:
    answer = httpx.Response(409, json={"code": "conflict", "detail": "it is cancelled"})
    with make_client(lambda _: answer) as made, pytest.raises(ConflictError) as caught:
        made.jobs.cancel("job_1")
    assert not caught.value.is_repeat


def test_what_a_lost_attempt_has_deleted_is_deleted() -> None:
    answers: list[Any] = [httpx.ReadError("cut"), httpx.Response(404, json={"code": "not_found", "detail": "gone"})]

    def gone(_: httpx.Request) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with make_client(gone) as made:
        made.jobs.delete("job_1")
        answers.append(httpx.Response(404, json={"code": "not_found", "detail": "gone"}))
        with pytest.raises(NotFoundError):
            made.jobs.delete("job_1")


def test_scores_that_took_too_long_are_not_asked_for_again() -> None:
    answers = [httpx.Response(503, json={"code": "unavailable"}), httpx.Response(504, json={"code": "deadline"})]
    sent = []

    def busy(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return answers[len(sent) - 1]

    with make_client(busy) as made, pytest.raises(ApiError) as caught:
        made.score("m", ["b", {"token_ids": [1, 2]}], prompt="a", top_k=2)
    assert caught.value.status == 504
    assert len(sent) == 2, "a teacher that still loads is asked again"
    assert sent[0]["items"] == [{"prompt": "a", "text": "b"}, {"token_ids": [1, 2]}]


class History:
    """A gateway whose event stream breaks after every `burst` events."""

    def __init__(self, number: int, burst: int) -> None:
        self.events = [
            {"id": f"{i}-0", "type": "log", "message": str(i), "data": {"status": "succeeded"} if i == number else {}}
            for i in range(1, number + 1)
        ]
        self.burst = burst
        self.resumed_after: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json={"id": "job_1", "is_terminal": self.is_read, "status": "running"})
        if request.headers.get("accept") != "text/event-stream":
            rest = self._after(request.url.params["after"])
            return httpx.Response(200, json={"data": rest[:2], "has_more": len(rest) > 2})
        after = request.headers.get("last-event-id", "")
        self.resumed_after.append(after)
        rest = self._after(after)
        text = ": ping\n\n" + "".join(
            f"event: log\ndata: {json.dumps(event)}\nid: {event['id']}\n\n" for event in rest[: self.burst]
        )
        return httpx.Response(200, text=text + 'data: {"id": "torn')

    def _after(self, after: str) -> list[dict[str, Any]]:
        return self.events[int(after.partition("-")[0]) if after else 0 :]

    @property
    def is_read(self) -> bool:
        return len(self.resumed_after) * self.burst >= len(self.events)


async def test_events_come_once_each_over_broken_streams() -> None:
    for burst in (1, 3, 10):
        history = History(7, burst)
        with make_client(history) as made:
            assert [event["message"] for event in made.jobs.stream_events("job_1")] == [str(i) for i in range(1, 8)]
        assert history.resumed_after[1:2] == ([f"{burst}-0"] if burst < 7 else [])
        history = History(7, burst)
        async with make_async_client(history) as twin:
            assert [event["message"] async for event in twin.jobs.stream_events("job_1", after="2-0")] == list("34567")


async def test_events_without_following_are_all_pages() -> None:
    with make_client(History(7, 1)) as made:
        assert [event["message"] for event in made.jobs.events("job_1", after="1-0")] == list("234567")


async def test_wait_tells_every_event_once_and_gives_the_job() -> None:
    seen: list[str] = []
    history = History(5, 5)
    history.resumed_after.append("")  # the job is finished already
    with make_client(history) as made:
        assert made.jobs.wait("job_1", on_event=lambda event: seen.append(event["message"]))["is_terminal"]
    assert seen == list("12345")
    with make_client(History(5, 1)) as made, pytest.raises(DeadlineError, match="running"):
        made.jobs.wait("job_1", timeout_s=0)
    async with make_async_client(History(5, 1)) as twin:
        with pytest.raises(DeadlineError, match="running"):
            await twin.jobs.wait("job_1", timeout_s=0)


def test_lists_page_up_to_the_limit() -> None:
    def pages(request: httpx.Request) -> httpx.Response:
        after, limit = request.url.params.get("after", "0"), min(int(request.url.params["limit"]), 3)
        ids = range(int(after) + 1, min(int(after) + limit, 8) + 1)
        return httpx.Response(200, json={"data": [{"id": str(i)} for i in ids], "has_more": ids[-1] < 8})

    with make_client(pages) as made:
        assert [job["id"] for job in made.jobs.list(limit=5)] == list("12345")
        assert [job["id"] for job in made.jobs.list(limit=50)] == list("12345678")


def test_the_event_reader_ignores_comments_and_joins_lines() -> None:
    reader = Reader()
    lines = [": hi", "", "event: x", 'data: {"id":', 'data: "7-0"}', "id: 7-0", "", 'data: {"torn']
    assert [event for line in lines if (event := reader.feed(line))] == [{"id": "7-0"}]


def make_tar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def test_a_tar_becomes_a_folder_without_its_top(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "t", {"top/a": b"1", "top/sub/b": b"2"})
    (tmp_path / "out").mkdir()
    folder = unpack.place(tar, tmp_path / "out")
    assert (folder / "a").read_bytes() == b"1"
    assert (folder / "sub" / "b").read_bytes() == b"2"
    with pytest.raises(SpecError, match="exists already"):
        unpack.check_target(folder)
    assert unpack.place(make_tar(tmp_path / "u", {"top/a": b"1"}), tmp_path / "kept.tar").is_file()


@pytest.mark.parametrize("name", ["top/../../evil", "/etc/evil", "top//etc/evil", "flat"])
def test_a_tar_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    tar = make_tar(tmp_path / "t", {name: b"1"})
    with pytest.raises(CorruptError):
        unpack.place(tar, tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "t"]


def test_a_tar_with_links_or_damage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="not a file"):
        unpack.place(make_tar(tmp_path / "t", {}, {"top/link": "/etc/passwd"}), tmp_path / "out")
    (tmp_path / "junk").write_bytes(b"junk" * 999)
    with pytest.raises(CorruptError, match="not usable"):
        unpack.place(tmp_path / "junk", tmp_path / "out")


def _public(cls: type) -> dict[str, Any]:
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


def test_both_clients_have_the_same_methods() -> None:
    """Names, parameters, what comes back, documentation; resources, too."""
    sync, twin = make_client(lambda _: httpx.Response(200)), make_async_client(lambda _: httpx.Response(200))
    resources = {name for name, value in vars(sync).items() if isinstance(value, Blocking)} - {"_twin"}
    assert resources >= {"jobs", "files", "models", "verifiers", "recipes", "services"}
    for ours, theirs in [(sync, twin), *((getattr(sync, name), getattr(twin, name)) for name in resources)]:
        methods, twins = _public(type(ours)), _public(type(theirs))
        assert methods.keys() == twins.keys()
        for name, method in methods.items():
            signature, other = inspect.signature(method), inspect.signature(twins[name])
            assert signature.parameters == other.parameters, name
            assert signature.return_annotation == other.return_annotation.replace("AsyncIterator", "Iterator"), name
            assert method.__doc__ == twins[name].__doc__, name
            assert method.__doc__, name
            assert not inspect.iscoroutinefunction(method), name
    ours, theirs = inspect.signature(Client).parameters, inspect.signature(AsyncClient).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]

"""The REST calls as data, and how their answers are read: everything that the sync and the async client share."""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from stillhouse.client import answers
from stillhouse.core.errors import ConfigError, StillhouseError, UnavailableError
from stillhouse.core.schemas import Checkpoint, DeadLetter, Event, File, Job, MetricPoint, Page, Scores
from stillhouse.core.spec import JobSpec

RETRIES: Final = 5
"""Repeats of a call that did not get through: with the pauses below about 8 s, what a restart of the gateway takes."""
PAUSE_S: Final = 0.25
"""Pause before the first repeat; doubles each time, up to PAUSE_MAX_S, with jitter."""
PAUSE_MAX_S: Final = 4.0
TIMEOUT: Final = httpx.Timeout(connect=5.0, read=60.0, write=60.0, pool=10.0)
STREAM_TIMEOUT: Final = httpx.Timeout(connect=5.0, read=45.0, write=60.0, pool=10.0)
"""Of an event stream: the gateway sends a comment every 15 s, so three are missing before we reconnect."""
PAGE: Final = 100
SCORE_TIMEOUT: Final = httpx.Timeout(connect=5.0, read=120.0, write=60.0, pool=10.0)
"""Of scores: the gateway gives a teacher 85 s to load a model and to judge."""
RETRY_STATUS: Final = frozenset({429, 502, 503, 504})
TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})


class ApiError(StillhouseError):
    """The gateway refused a request."""

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, request_id: str = "", errors: Any = ()
    ) -> None:
        super().__init__(detail, param=param)
        self.status = status
        """HTTP status."""
        self.code = code
        """Stable name of the kind of error."""
        self.detail = detail
        """What is wrong and how to fix it."""
        self.request_id = request_id
        """Finds the request in the gateway's log."""
        self.errors = list(errors)
        """Every finding {param, message, fix}, where there were several."""

    def __reduce__(self):
        return (_rebuild, (self.status, self.code, self.detail, self.param, self.request_id, self.errors))


def _rebuild(status: int, code: str, detail: str, param: str | None, request_id: str, errors: list[Any]) -> ApiError:
    return ApiError(status, code, detail, param=param, request_id=request_id, errors=errors)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the gateway is and how to identify ourselves."""

    url: str
    api_key: str = ""

    def options(self) -> dict[str, Any]:
        """Arguments for an httpx client."""
        headers = {"User-Agent": f"stillhouse-python/{version('stillhouse')}"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        # a proxy of the environment has no business with our own machine
        is_local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        return {"base_url": self.url, "headers": headers, "timeout": TIMEOUT, "trust_env": not is_local}

    def unreachable(self, error: Exception) -> UnavailableError:
        """The error for a gateway that does not answer."""
        reason = str(error) or type(error).__name__
        return UnavailableError(f"the gateway at {self.url} does not answer: {reason}; is it running?")


def find_target(url: str | None, api_key: str | None, environ: Mapping[str, str] | None = None) -> Target:
    """From the arguments, else STILLHOUSE_URL and STILLHOUSE_API_KEY, else what `stillhouse up` wrote on this machine.

    The key of that file is only used with the address of that file: it must not travel to somebody else's server.

    Raises:
        ConfigError: no address is known.
    """
    env = os.environ if environ is None else environ
    file = Path(env.get("STILLHOUSE_HOME", "~/.stillhouse")).expanduser() / "client.json"
    try:
        local = json.loads(file.read_bytes())
    except FileNotFoundError:
        local = {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; delete it and run `stillhouse up`") from None
    local_url = str(local.get("url", "")).rstrip("/")
    chosen = (url or env.get("STILLHOUSE_URL") or local_url).rstrip("/")
    if not chosen:
        raise ConfigError("no gateway is known: start one with `stillhouse up`, or set STILLHOUSE_URL")
    if urlsplit(chosen).scheme not in ("http", "https"):
        raise ConfigError(f"the address '{chosen}' must start with http:// or https://")
    key = api_key if api_key is not None else env.get("STILLHOUSE_API_KEY")
    if key is None:
        key = str(local.get("api_key", "")) if chosen == local_url else ""
    return Target(chosen, key)


@dataclass(frozen=True, slots=True)
class Call:
    """A request."""

    method: str
    path: str
    params: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    file: Path | None = None
    """Body, streamed from disk."""
    may_repeat: bool = True
    """Doing it twice does what doing it once does, so it is repeated also when the answer got lost on the way."""
    retry_status: frozenset[int] = RETRY_STATUS
    """Answers after which it is sent again."""
    timeout: httpx.Timeout = field(default_factory=lambda: TIMEOUT)
    answer: Any = Any
    """What its JSON is: a class of core/schemas, a Page of them."""

    def options(self) -> dict[str, Any]:
        """Arguments for httpx, without the body of a file."""
        options: dict[str, Any] = {"params": self.params, "headers": self.headers, "timeout": self.timeout}
        if self.json is not None:
            options["json"] = self.json
        return options


def create_job(spec: Mapping[str, Any] | JobSpec, idempotency_key: str | None) -> Call:
    """The key makes repeating it safe; without one from the caller each create is a job of its own."""
    body = spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)
    headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    return Call("POST", "/v1/jobs", headers=headers, json=body, answer=Job)


def get_job(job_id: str) -> Call:
    return Call("GET", f"/v1/jobs/{job_id}", answer=Job)


def list_jobs(limit: int, after: str, status: str | None, order: str) -> Call:
    params: dict[str, Any] = {"limit": min(limit, PAGE), "order": order}
    if after:
        params["after"] = after
    if status:
        params["status"] = status
    return Call("GET", "/v1/jobs", params=params, answer=Page[Job])


def cancel_job(job_id: str) -> Call:
    # a repeat after a lost answer would be refused: the job may be finished by then
    return Call("POST", f"/v1/jobs/{job_id}/cancel", may_repeat=False, answer=Job)


def list_events(job_id: str, after: str) -> Call:
    return Call("GET", f"/v1/jobs/{job_id}/events", params={"after": after, "limit": PAGE}, answer=Page[Event])


def stream_events(job_id: str, after: str) -> Call:
    headers = {"Accept": "text/event-stream"}
    if after:
        headers["Last-Event-ID"] = after
    return Call("GET", f"/v1/jobs/{job_id}/events", headers=headers, timeout=STREAM_TIMEOUT)


def get_metrics(job_id: str, names: tuple[str, ...], step_from: int, step_to: int | None) -> Call:
    params: dict[str, Any] = {"step_from": step_from}
    if names:
        params["names"] = ",".join(names)
    if step_to is not None:
        params["step_to"] = step_to
    return Call("GET", f"/v1/jobs/{job_id}/metrics", params=params, answer=Page[MetricPoint])


def list_evaluations(job_id: str) -> Call:
    return Call("GET", f"/v1/jobs/{job_id}/evaluations", answer=Page[dict[str, Any]])


def list_checkpoints(job_id: str) -> Call:
    return Call("GET", f"/v1/jobs/{job_id}/checkpoints", answer=Page[Checkpoint])


def list_dead_letters(job_id: str, after: str) -> Call:
    params: dict[str, Any] = {"limit": 10 * PAGE}
    if after:
        params["after"] = after
    return Call("GET", f"/v1/jobs/{job_id}/dead_letters", params=params, answer=Page[DeadLetter])


def download_checkpoint(job_id: str, checkpoint: str | None) -> Call:
    return Call("GET", f"/v1/jobs/{job_id}/checkpoints/{checkpoint or 'ckpt_export'}/download")


def upload_file(path: Path) -> Call:
    headers = {"Content-Type": "application/jsonl", "Content-Length": str(path.stat().st_size)}
    return Call("POST", "/v1/files", headers=headers, file=path, answer=File)


def score(
    model: str, texts: Sequence[str | Mapping[str, Any]], prompt: str, top_k: int, temperature: float, dtype: str
) -> Call:
    """`texts` are texts, which all follow `prompt`, or items as /docs describes them."""
    items = [{"prompt": prompt, "text": text} if isinstance(text, str) else dict(text) for text in texts]
    body = {"model": model, "items": items, "top_k": top_k, "temperature": temperature, "dtype": dtype}
    # too much for the time that there is (504) is too much the next time
    retry_status = RETRY_STATUS - {504}
    return Call("POST", "/v1/score", json=body, retry_status=retry_status, timeout=SCORE_TIMEOUT, answer=Scores)


def get_path(path: str, answer: Any) -> Call:
    return Call("GET", path, answer=answer)


def read_answer(call: Call, response: httpx.Response) -> Any:
    """The good answer to a call.

    Raises:
        ApiError: it is not a good one.
    """
    if response.is_success:
        return answers.read(call.answer, response.json())
    raise read_error(response)


def read_error(response: httpx.Response) -> ApiError:
    """The error in an answer; also of a proxy that knows nothing of our problems."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict) or "code" not in body:
        body = {"code": "http", "detail": f"HTTP {response.status_code} from {response.url}: {response.text[:200]}"}
    return ApiError(
        response.status_code,
        body["code"],
        body.get("detail", ""),
        param=body.get("param"),
        request_id=body.get("request_id") or response.headers.get("x-request-id", ""),
        errors=body.get("errors", ()),
    )


def stream_error(response: httpx.Response) -> StillhouseError:
    """The error in the answer to a stream's request: UnavailableError where trying again may help."""
    error = read_error(response)
    return UnavailableError(error.detail) if error.status in RETRY_STATUS else error


def is_last(event: Event) -> bool:
    """The event that ends a job's history."""
    return event.data.get("status") in TERMINAL


def may_retry(call: Call, error: httpx.TransportError) -> bool:
    """Whether to send a call again after it did not get through."""
    return call.may_repeat or isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))


def pause_s(attempt: int, response: httpx.Response | None = None) -> float:
    """Pause before repeat number `attempt` (from 0): what the gateway asks for, else doubling with jitter."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    if asked.isdigit():
        return min(float(asked), 4 * PAUSE_MAX_S)
    return min(PAUSE_S * 2**attempt, PAUSE_MAX_S) * random.uniform(0.5, 1.0)


class EventReader:
    """Server-sent events from lines; remembers the last id."""

    def __init__(self, after: str) -> None:
        self.last_id = after
        self._data: list[str] = []

    def feed(self, line: str) -> Event | None:
        """Take a line; an event when it ends one."""
        if line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
        if line or not self._data:
            return None
        event = answers.read(Event, json.loads("\n".join(self._data)))
        self._data = []
        self.last_id = event.id
        return event

"""The Python client.

    with Client() as client:
        job = client.jobs.create(spec)
        job = client.jobs.wait(job.id, on_event=print)
        client.jobs.download(job.id, "student")

Answers are the models of core/schemas: `job.status`, or `job["status"]`. `AsyncClient` (aio.py) has the same methods.
Calls that do not get through are repeated; event streams reconnect where they broke.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from stillhouse.client import calls, unpack
from stillhouse.client.calls import ApiError, Call, Target
from stillhouse.core.errors import DeadlineError, UnavailableError
from stillhouse.core.schemas import (
    Checkpoint,
    DeadLetter,
    Event,
    File,
    Health,
    Job,
    MetricPoint,
    Model,
    Page,
    Recipe,
    Scores,
    Service,
    Verifier,
)
from stillhouse.core.spec import JobSpec

Json = dict[str, Any]
T = TypeVar("T")


class Client:
    """A gateway."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, retries: int = calls.RETRIES) -> None:
        target = calls.find_target(url, api_key)
        self._sender = _Sender(target, retries)
        self.url = target.url
        self.jobs = Jobs(self._sender)
        self.files = Files(self._sender)
        self.models = Listing(self._sender, "/v1/models", Model)
        self.verifiers = Listing(self._sender, "/v1/verifiers", Verifier)
        self.recipes = Recipes(self._sender, "/v1/recipes", Recipe)
        self.services = Listing(self._sender, "/v1/services", Service)

    def health(self) -> Health:
        """{status, version} of a gateway that can serve requests."""
        return self._sender.send(calls.get_path("/readyz", Health))

    def score(
        self,
        model: str,
        texts: Sequence[str | Mapping[str, Any]],
        *,
        prompt: str = "",
        top_k: int = 0,
        temperature: float = 1.0,
        dtype: str = "float32",
    ) -> Scores:
        """How likely a registered model finds every token of some texts, each read after `prompt`.

        A text may also be an item: {"prompt": ..., "text": ...} or {"prompt_ids": [...], "token_ids": [...]}.
        """
        return self._sender.send(calls.score(model, texts, prompt, top_k, temperature, dtype))

    def close(self) -> None:
        """Close the connections."""
        self._sender.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Sender:
    """Sends calls, and repeats those that did not get through."""

    def __init__(self, target: Target, retries: int) -> None:
        self.target = target
        self.retries = retries
        self.http = httpx.Client(**target.options())

    def send(self, call: Call) -> Any:
        """The answer's JSON.

        Raises:
            ApiError: the gateway refused.
            UnavailableError: it does not answer.
        """
        for attempt in range(self.retries + 1):
            is_last = attempt == self.retries
            try:
                response = self._once(call)
            except httpx.TransportError as error:
                if is_last or not calls.may_retry(call, error):
                    raise self.target.unreachable(error) from None
                time.sleep(calls.pause_s(attempt))
                continue
            if is_last or response.status_code not in call.retry_status:
                return calls.read_answer(call, response)
            time.sleep(calls.pause_s(attempt, response))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, call: Call) -> httpx.Response:
        if call.file is None:
            return self.http.request(call.method, call.path, **call.options())
        with call.file.open("rb") as body:
            return self.http.request(call.method, call.path, content=body, **call.options())


class Listing(Generic[T]):
    """A read-only list."""

    def __init__(self, sender: _Sender, path: str, kind: type[T]) -> None:
        self._sender = sender
        self._path = path
        self._kind = kind

    def list(self) -> list[T]:
        """All of them."""
        return self._sender.send(calls.get_path(self._path, Page[self._kind])).data


class Recipes(Listing[Recipe]):
    """Presets for stages."""

    def get(self, name: str) -> Recipe:
        """A recipe: what it is for, and its presets with every value and its source."""
        return self._sender.send(calls.get_path(f"{self._path}/{name}", Recipe))


class Files:
    """Uploaded prompts."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender

    def upload(self, path: str | Path) -> File:
        """Upload a JSONL file of rows; {id, num_rows, sha256, size_bytes}. The same content always has the same id."""
        return self._sender.send(calls.upload_file(Path(path)))

    def get(self, file_id: str) -> File:
        """Facts of an uploaded file."""
        return self._sender.send(calls.get_path(f"/v1/files/{file_id}", File))


class Jobs:
    """Distillation jobs."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender

    def create(self, spec: Mapping[str, Any] | JobSpec, *, idempotency_key: str | None = None) -> Job:
        """Submit a job. With a key of your own, submitting again gives the same job, also from another process."""
        return self._sender.send(calls.create_job(spec, idempotency_key))

    def get(self, job_id: str) -> Job:
        """A job."""
        return self._sender.send(calls.get_job(job_id))

    def list(self, *, limit: int = 20, after: str = "", status: str | None = None, order: str = "desc") -> list[Job]:
        """Up to `limit` jobs by creation time, newest first unless `order` is "asc"."""
        found: list[Job] = []
        while len(found) < limit:
            page = self._sender.send(calls.list_jobs(limit - len(found), after, status, order))
            found += page.data
            if not page.has_more:
                break
            after = found[-1].id
        return found

    def cancel(self, job_id: str) -> Job:
        """End a job; it may be `cancelling` for a while."""
        return self._sender.send(calls.cancel_job(job_id))

    def wait(
        self,
        job_id: str,
        *,
        on_event: Callable[[Event], object] | None = None,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
    ) -> Job:
        """Wait for a job's end, whatever it is, and give the job; `on_event` sees every event on the way.

        Raises:
            DeadlineError: it did not end within `timeout_s`; it goes on.
        """
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        after, is_over = "", on_event is None
        while True:
            job = self.get(job_id)
            if on_event is not None and not is_over:
                # a finished job may be a moment ahead of its last event: the stream waits for that one
                for event in self.events(job_id, after=after, follow=job.is_terminal):
                    after, is_over = event.id, calls.is_last(event)
                    on_event(event)
            if job.is_terminal:
                return job
            if deadline is not None and time.monotonic() + poll_s > deadline:
                raise DeadlineError(f"job {job_id} is still '{job['status']}' after {timeout_s:g} s; it goes on")
            time.sleep(poll_s)

    def events(self, job_id: str, after: str | None = None, follow: bool = True) -> Iterator[Event]:
        """Events after the one with id `after`, each once; with `follow` as they happen, until the job's last one."""
        last_id = after or ""
        attempt = 0
        while follow:
            try:
                for event in self._stream(job_id, last_id):
                    last_id, attempt = event.id, 0
                    yield event
                if self.get(job_id).is_terminal:
                    break  # the rest, if any, comes as pages
            except (httpx.TransportError, UnavailableError) as error:
                attempt += 1
                if attempt > self._sender.retries:
                    raise self._sender.target.unreachable(error) from None
            time.sleep(calls.pause_s(attempt))
        while True:
            page = self._sender.send(calls.list_events(job_id, last_id))
            yield from page.data
            if not page.has_more:
                return
            last_id = page.data[-1].id

    def _stream(self, job_id: str, after: str) -> Iterator[Event]:
        call = calls.stream_events(job_id, after)
        with self._sender.http.stream(call.method, call.path, **call.options()) as response:
            if not response.is_success:
                response.read()
                raise calls.stream_error(response)
            reader = calls.EventReader(after)
            for line in response.iter_lines():
                event = reader.feed(line)
                if event is not None:
                    yield event

    def metrics(
        self, job_id: str, *, names: tuple[str, ...] = (), step_from: int = 0, step_to: int | None = None
    ) -> list[MetricPoint]:
        """Points {epoch, step, created_at, values} by step."""
        return self._sender.send(calls.get_metrics(job_id, tuple(names), step_from, step_to)).data

    def evaluations(self, job_id: str) -> list[Json]:
        """Held-out measurements by step."""
        return self._sender.send(calls.list_evaluations(job_id)).data

    def dead_letters(self, job_id: str) -> list[DeadLetter]:
        """Samples that could not be sampled or scored, by step, with the reason."""
        found: list[DeadLetter] = []
        while True:
            page = self._sender.send(calls.list_dead_letters(job_id, found[-1].id if found else ""))
            found += page.data
            if not page.has_more:
                return found

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Checkpoints, oldest first; the finished student (`ckpt_export`) last."""
        return self._sender.send(calls.list_checkpoints(job_id)).data

    def download(self, job_id: str, target: str | Path, *, checkpoint: str | None = None) -> Path:
        """Fetch a checkpoint, by default the finished student, into the new folder `target` (or a file `*.tar`).

        Raises:
            SpecError: something is at `target` already.
        """
        place = Path(target)
        unpack.check_target(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        call = calls.download_checkpoint(job_id, checkpoint)
        for attempt in range(self._sender.retries + 1):
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".download.") as folder:
                tar = Path(folder) / "tar"
                try:
                    self._fetch(call, tar)
                except (httpx.TransportError, UnavailableError) as error:
                    if attempt == self._sender.retries:
                        raise self._sender.target.unreachable(error) from None
                    time.sleep(calls.pause_s(attempt))
                    continue
                return unpack.place(tar, place)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _fetch(self, call: Call, tar: Path) -> None:
        with self._sender.http.stream(call.method, call.path, **call.options()) as response, tar.open("wb") as sink:
            if not response.is_success:
                response.read()
                raise calls.stream_error(response)
            for block in response.iter_bytes():
                sink.write(block)


__all__ = ["ApiError", "Client"]

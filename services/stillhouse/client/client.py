"""The Python client.

    >>> with Client() as client:
    ...     job = client.jobs.create(spec)
    ...     job = client.jobs.wait(job.id, on_event=lambda event: None)
    ...     folder = client.jobs.download(job.id, "model")

Answers are the models of core/schemas: `job.status`, or `job["status"]`. `AsyncClient` (aio.py) has the same methods:
each is written once, there, and what stands here names it. Threads may share a client.
"""

from __future__ import annotations

from typing import Self

import httpx

from stillhouse.client import aio, catalog
from stillhouse.client.aio import AsyncClient, AsyncJobs
from stillhouse.client.files import AsyncFiles
from stillhouse.client.keys import AsyncKeys
from stillhouse.client.sender import RETRIES, TIMEOUT_S, Options, Sender
from stillhouse.client.target import find_target
from stillhouse.client.transport import Blocking, BlockingTransport, blocking, blocking_iterator


class Jobs(Blocking):
    """Distillation jobs."""

    create = blocking(AsyncJobs.create)
    validate = blocking(AsyncJobs.validate)
    preflight = blocking(AsyncJobs.preflight)
    get = blocking(AsyncJobs.get)
    list = blocking(AsyncJobs.list)
    iter = blocking_iterator(AsyncJobs.iter)
    cancel = blocking(AsyncJobs.cancel)
    pause = blocking(AsyncJobs.pause)
    resume = blocking(AsyncJobs.resume)
    retry = blocking(AsyncJobs.retry)
    delete = blocking(AsyncJobs.delete)
    wait = blocking(AsyncJobs.wait)
    events = blocking_iterator(AsyncJobs.events)
    stream_events = blocking_iterator(AsyncJobs.stream_events)
    logs = blocking_iterator(AsyncJobs.logs)
    metrics = blocking(AsyncJobs.metrics)
    evaluations = blocking(AsyncJobs.evaluations)
    report = blocking(AsyncJobs.report)
    report_html = blocking(AsyncJobs.report_html)
    samples = blocking(AsyncJobs.samples)
    dead_letters = blocking(AsyncJobs.dead_letters)
    retry_dead_letters = blocking(AsyncJobs.retry_dead_letters)
    checkpoints = blocking(AsyncJobs.checkpoints)
    checkpoint = blocking(AsyncJobs.checkpoint)
    download = blocking(AsyncJobs.download)
    mark_best = blocking(AsyncJobs.mark_best)
    unmark_best = blocking(AsyncJobs.unmark_best)
    delete_checkpoint = blocking(AsyncJobs.delete_checkpoint)


class Files(Blocking):
    """Files of prompts, which jobs name by id."""

    upload = blocking(AsyncFiles.upload)
    list = blocking(AsyncFiles.list)
    get = blocking(AsyncFiles.get)
    content = blocking(AsyncFiles.content)
    delete = blocking(AsyncFiles.delete)


class Models(Blocking):
    """Models that jobs may name."""

    list = blocking(catalog.AsyncModels.list)
    get = blocking(catalog.AsyncModels.get)


class Verifiers(Blocking):
    """What judges completions for outcome rewards."""

    list = blocking(catalog.AsyncVerifiers.list)


class Recipes(Blocking):
    """Presets for stages."""

    list = blocking(catalog.AsyncRecipes.list)
    get = blocking(catalog.AsyncRecipes.get)


class Services(Blocking):
    """The processes of the deployment."""

    list = blocking(catalog.AsyncServices.list)
    queues = blocking(catalog.AsyncServices.queues)


class Keys(Blocking):
    """API keys. All but `me` need the scope admin."""

    list = blocking(AsyncKeys.list)
    me = blocking(AsyncKeys.me)
    create = blocking(AsyncKeys.create)
    delete = blocking(AsyncKeys.delete)


class Client(Blocking):
    """A gateway."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        deadline_s: float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connects when it is first used.

        Args:
            url: else STILLHOUSE_URL, else the deployment that `stillhouse up` runs on this machine (client.json).
            api_key: else STILLHOUSE_API_KEY, else the one of client.json for the gateway of client.json.
            timeout_s: longest silence of the gateway.
            retries: how often a call that did not get through is sent again, with growing pauses.
            deadline_s: for one call with all its repeats; None = what timeout and repeats come to.
            transport: for proxies and certificates of your own, `httpx.HTTPTransport(proxy=..., verify=...)`. Without
                one HTTPS_PROXY and the like hold, but not for this machine.
        """
        target = find_target(url, api_key)
        self._use(Sender(BlockingTransport(target, transport), target, Options(timeout_s, retries, deadline_s)))

    def _use(self, sender: Sender) -> Self:
        self._twin = twin = aio.AsyncClient.__new__(AsyncClient)._use(sender)
        self.url = twin.url
        self.jobs = Jobs(twin.jobs)
        self.files = Files(twin.files)
        self.models = Models(twin.models)
        self.verifiers = Verifiers(twin.verifiers)
        self.recipes = Recipes(twin.recipes)
        self.services = Services(twin.services)
        self.keys = Keys(twin.keys)
        return self

    def with_options(
        self, *, timeout_s: float | None = None, retries: int | None = None, deadline_s: float | None = None
    ) -> Self:
        """The same gateway over the same connections, with other patience: `client.with_options(retries=0)`."""
        changed = self._twin.with_options(timeout_s=timeout_s, retries=retries, deadline_s=deadline_s)
        return type(self).__new__(type(self))._use(changed._sender)

    health = blocking(AsyncClient.health)
    score = blocking(AsyncClient.score)
    generate = blocking(AsyncClient.generate)
    close = blocking(AsyncClient.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

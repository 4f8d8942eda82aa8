"""One trace from a request to the commit, over real services on loopback: parents, links, a takeover, no secrets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stillhouse.core import tracing
from stillhouse.core.keys import create_key
from stillhouse.gateway.app import create_app
from tests.cluster import TOKEN, Cluster, job_spec
from tests.waiting import wait_until

CALLER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Spans:
    """What was recorded so far."""

    def __init__(self) -> None:
        self.memory = InMemorySpanExporter()
        self.provider = tracing.make_provider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.memory))

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self.memory.get_finished_spans())

    def named(self, name: str, **attributes: Any) -> list[ReadableSpan]:
        """Those of a name, with these attributes `stillhouse.*`."""
        wanted = {f"stillhouse.{key}": value for key, value in attributes.items()}
        return [s for s in self.all if s.name == name and wanted.items() <= dict(s.attributes or {}).items()]

    def by_id(self) -> dict[int, ReadableSpan]:
        return {span.context.span_id: span for span in self.all if span.context}


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    tracing.use(made.provider)
    yield made
    tracing.use(None)
    made.provider.shutdown()


@asynccontextmanager
async def gateway(deployment: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """Its REST interface, beside the other services."""
    key = create_key(deployment.settings.keys_path(), "tester")
    transport = httpx.ASGITransport(app=create_app(deployment.ctx, deployment.settings))
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as http:
        yield http


def ancestors(span: ReadableSpan, spans: dict[int, ReadableSpan]) -> list[str]:
    """Names from the span up; fails where a parent is missing."""
    names = [span.name]
    while span.parent is not None and f"{span.parent.span_id:016x}" not in CALLER:
        assert span.parent.span_id in spans, f"the parent of {names} is missing"
        span = spans[span.parent.span_id]
        names.append(span.name)
        assert len(names) < 20, "a circle: two spans have one id"
    return names


async def test_a_job_is_one_trace_from_its_request_to_its_commit(deployment: Cluster, spans: Spans) -> None:
    secret_words = [{"prompt": f"say the-private-word {number}"} for number in range(4)]
    async with gateway(deployment) as http:
        spec = job_spec(stages__0__schedule__steps=2, stages__0__data={"rows": secret_words})
        answer = await http.post("/v1/jobs", json=spec, headers={"traceparent": CALLER})
        job_id = answer.json()["id"]
        await deployment.succeeded(job_id)
        key = http.headers["authorization"].removeprefix("Bearer ")

    post, by_id = spans.named("POST /v1/jobs")[0], spans.by_id()
    assert post.context
    assert post.attributes
    assert post.parent
    assert f"{post.context.trace_id:032x}" == CALLER[3:35], "the caller's trace goes on"
    assert f"{post.parent.span_id:016x}" == CALLER[36:52]
    assert answer.headers["traceparent"].split("-")[1:3] == [CALLER[3:35], f"{post.context.span_id:016x}"]
    about = ("http.request.method", "http.route", "http.response.status_code", "stillhouse.request_id")
    assert [post.attributes[name] for name in about] == ["POST", "/v1/jobs", 201, answer.headers["x-request-id"]]

    assert {span.context.trace_id for span in spans.all if span.context} == {int(CALLER[3:35], 16)}
    up = {span.name: ancestors(span, by_id) for span in spans.all}
    assert up["commit"] == ["commit", "step", "claim", "POST /v1/jobs"]
    assert up["score"][-5:] == ["sample", "plan", "step", "claim", "POST /v1/jobs"]
    for phase in ("wait", "journal", "train", "publish", "commit"):
        steps: list[Any] = [by_id[span.parent.span_id].attributes or {} for span in spans.named(phase) if span.parent]
        wanted = {0, 1} if phase != "commit" else {1}
        assert {step.get("stillhouse.step") for step in steps} - {None} == wanted, phase
    jobs = {str((span.attributes or {}).get("stillhouse.job_id")) for span in spans.all if span is not post}
    assert jobs == {job_id}

    plans = {span.context.span_id for span in spans.named("plan") if span.context}
    samples = {span.context.span_id for span in spans.named("sample") if span.context}
    assert len(plans) == len(samples) == 6, "2 steps of 3 groups"
    assert {link.context.span_id for span in spans.named("sample") for link in span.links} == plans
    assert {link.context.span_id for span in spans.named("score") for link in span.links} == samples
    asked = [span for span in spans.all if span.name == "stillhouse.v1.TrainerService/FetchWeights"]
    kinds = {span.kind.name: by_id[span.parent.span_id].kind.name for span in asked if span.parent}
    assert kinds["SERVER"] == "CLIENT", "the call is there from both sides"

    recorded = "\n".join(span.to_json() for span in spans.all)
    for private in ("the-private-word", key, TOKEN, deployment.settings.redis_url):
        assert private not in recorded


async def test_a_direct_score_is_a_span_under_its_request(deployment: Cluster, spans: Spans) -> None:
    async with gateway(deployment) as http:
        body = {"model": "teacher", "items": [{"prompt": "one", "text": "two"}]}
        answer = await http.post("/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    names = ancestors(spans.named("score")[0], spans.by_id())
    call = "stillhouse.v1.TeacherService/Score"
    assert names == ["score", call, call, "POST /v1/score"]
    request_id = answer.headers["x-request-id"]
    assert len(spans.named(call, request_id=request_id)) == 2, "caller and callee know the request"


async def test_another_trainer_goes_on_in_the_same_trace(deployment: Cluster, spans: Spans) -> None:
    async with gateway(deployment) as http:
        job_id = (
            await http.post("/v1/jobs", json=job_spec(stages__0__schedule={"steps": 8, "prompts_per_step": 3}))
        ).json()["id"]
    await deployment.at_step(job_id, 4)
    await deployment.crash("trainer-0")
    await deployment.start("trainer", "trainer-1")
    await deployment.succeeded(job_id)
    assert len(spans.by_id()) == len(spans.all), "each has an id of its own, although both trainers seed alike"
    first, second = sorted(spans.named("claim"), key=lambda span: span.start_time or 0)
    assert first.context
    assert second.context
    assert first.context.trace_id == second.context.trace_id
    assert [link.context.span_id for link in second.links] == [first.context.span_id]
    assert [event.name for event in second.events] == ["job.taken_over"]
    steps = spans.named("step", epoch=2)
    assert steps
    assert all(ancestors(span, spans.by_id()) == ["step", "claim", "claim", "POST /v1/jobs"] for span in steps)


async def test_a_failed_request_says_so_without_its_text(deployment: Cluster, spans: Spans) -> None:
    async with gateway(deployment) as http:
        await http.get("/v1/jobs/job_00000000000000000000", headers={"traceparent": "00-nonsense"})
        assert (await http.get("/healthz")).status_code == 200
    (span,) = spans.all
    assert span.parent is None
    assert span.attributes
    assert span.attributes["http.response.status_code"] == 404
    assert span.name == "GET /v1/jobs/{job_id}"


async def test_off_nothing_is_recorded_and_what_comes_from_outside_goes_on(deployment: Cluster) -> None:
    async with gateway(deployment) as http:
        answer = await http.post("/v1/jobs", json=job_spec(), headers={"traceparent": CALLER})
    assert "traceparent" not in answer.headers
    record = await deployment.ctx.jobs.get(answer.json()["id"])
    assert record.traceparent == CALLER, "services whose traces are on go on with it"

    async def is_running() -> bool:
        return (await deployment.ctx.jobs.get(record.id)).status == "running"

    await wait_until(is_running, timeout_s=30, what="the job to run")
    assert (await deployment.ctx.jobs.get(record.id)).traceparent == CALLER

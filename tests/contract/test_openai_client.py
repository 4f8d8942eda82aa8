"""OpenAI's official client on the real application, over a real socket and a real queue server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI

from stillhouse.core.queue.streams import Scope
from stillhouse.core.spec import Row
from stillhouse.gateway.app import create_app
from tests.gateway_kit import Gateway, open_gateway
from tests.waiting import wait_until

PROMPTS = "".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(20)).encode()
METHOD: dict[str, Any] = {"type": "distillation", "distillation": {"teacher": "big", "sampling": {"max_tokens": 8}}}


@asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[str]:
    """The application on a port of its own."""
    config = uvicorn.Config(
        create_app(gateway.ctx, gateway.ctx.settings), port=0, log_config=None, lifespan="off", access_log=False
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    await wait_until(lambda: server.started, timeout_s=20, what="the server")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        gateway.ctx.stop.set()
        server.should_exit = True
        await asyncio.wait_for(task, 20)


class Desk:
    """Both sides: OpenAI's client, and the gateway for the trainer's part."""

    def __init__(self, gateway: Gateway, url: str) -> None:
        self.gateway = gateway
        self.ctx = gateway.ctx
        self.url = url
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key=gateway.key, max_retries=0)

    async def upload(self, content: bytes = PROMPTS, purpose: Any = "fine-tune") -> Any:
        return await self.client.files.create(file=("prompts.jsonl", content), purpose=purpose)

    async def create(self, **fields: Any) -> Any:
        body = {"model": "small", "training_file": (await self.upload()).id, "method": METHOD, **fields}
        return await self.client.fine_tuning.jobs.create(**body)

    async def refused(self, **fields: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            await self.create(**fields)
        return caught.value

    async def led(self, job_id: str, status: str = "running") -> Scope:
        scope = Scope(job_id, await self.ctx.jobs.claim(job_id, "trainer-test", 60.0, 0))
        await self.ctx.jobs.update(scope, status=status)
        return scope


@pytest.fixture
async def desk(redis_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_gateway(redis_url, tmp_path) as gateway, served(gateway) as url:
        desk = Desk(gateway, url)
        async with desk.client:
            yield desk


async def test_files_come_and_go(desk: Desk) -> None:
    file = await desk.upload()
    assert (file.object, file.purpose, file.status, file.filename) == (
        "file",
        "fine-tune",
        "processed",
        "prompts.jsonl",
    )
    assert file.bytes == len(PROMPTS)
    assert isinstance(file.created_at, int)
    assert [item.id async for item in desk.client.files.list(purpose="fine-tune", order="asc")] == [file.id]
    assert await desk.client.files.retrieve(file.id) == file
    assert (await desk.client.files.content(file.id)).content == PROMPTS
    assert (await desk.client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await desk.client.files.retrieve(file.id)


async def test_a_file_is_the_same_however_it_comes(desk: Desk) -> None:
    """Our own client sends the bare rows; both name them by their content."""
    answer = await desk.gateway.http.post("/v1/files", content=PROMPTS, headers={"Content-Type": "application/jsonl"})
    assert answer.json()["id"] == (await desk.upload()).id
    assert answer.json()["uploaded_at"].endswith("Z")


async def test_wrong_uploads_are_refused_with_the_line(desk: Desk) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await desk.upload(b'{"prompt": "fine"}\n{"prompt": 1}\n')
    assert caught.value.param == "line 2"
    assert "line 2" in str(caught.value.body["message"])  # type: ignore[index]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await desk.upload(purpose="batch")
    assert caught.value.param == "purpose"
    assert list((desk.gateway.home / "artifacts" / "files").glob("*")) == [], "nothing refused is kept"


async def test_broken_forms_are_refused(desk: Desk) -> None:
    cases = {
        "multipart/form-data": (b"", 400),
        "multipart/form-data; boundary=x": (b"--x\r\nContent-Dispo", 400),
        "multipart/form-data; boundary=y": (b"no form at all", 400),
        "multipart/form-data; boundary=z": (
            b'--z\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--z--\r\n',
            422,
        ),
    }
    for kind, (body, status) in cases.items():
        answer = await desk.gateway.http.post("/v1/files", content=body, headers={"Content-Type": kind})
        assert answer.status_code == status, (kind, answer.text)


async def test_chats_with_and_without_an_answer_are_rows(desk: Desk) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    answered = [*turns, {"role": "assistant", "content": "Because."}]
    file = await desk.upload("".join(json.dumps({"messages": chat}) + "\n" for chat in (turns, answered)).encode())
    assert file.num_rows == 2
    row = Row.model_validate({"messages": answered})
    assert row.completion == "Because."
    assert row.conversation() == turns
    with pytest.raises(openai.UnprocessableEntityError):
        await desk.upload(json.dumps({"messages": [*answered, answered[-1]]}).encode())


async def test_a_job_is_what_the_request_says(desk: Desk) -> None:
    held_out = await desk.upload(b'{"prompt": "held out"}\n')
    job = await desk.create(
        validation_file=held_out.id,
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "distillation",
            "distillation": {
                "teacher": "big",
                "loss": {"objective": "top_k", "k": 4},
                "sampling": {"max_tokens": 8},
                "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 3},
                "evaluation": {"max_tokens": 9},
            },
        },
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "queued", "small", 7)
    assert job.hyperparameters.model_dump() == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 3}
    assert job.fine_tuned_model is None
    assert job.validation_file == held_out.id
    spec = (await desk.gateway.http.get(f"/v1/jobs/{job.id}")).json()["spec"]
    stage = spec["stages"][0]
    assert (spec["name"], spec["seed"], spec["metadata"]) == ("mine", 7, {"team": "a"})
    assert stage["schedule"]["steps"] == 10, "2 passes over 20 rows, 4 a step"
    assert stage["optimizer"]["lr"] == pytest.approx(3e-5)
    assert stage["loss"]["objective"] == "top_k"
    assert spec["evaluation"]["max_tokens"] == 9
    assert await desk.client.fine_tuning.jobs.retrieve(job.id) == job


async def test_defaults_are_three_passes(desk: Desk) -> None:
    job = await desk.create()
    assert job.hyperparameters.batch_size == 16
    spec = (await desk.gateway.http.get(f"/v1/jobs/{job.id}")).json()["spec"]
    assert spec["stages"][0]["schedule"]["steps"] == 4, "3 * 20 / 16, rounded up"
    assert spec["stages"][0]["loss"]["objective"] == "full_vocabulary"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"model": "huge"}, "model", "unknown model 'huge'"),
        ({"training_file": "file_0000000000"}, "training_file", "there is no file"),
        ({"validation_file": "file_0000000000"}, "validation_file", "there is no file"),
        ({"method": {"type": "supervised"}}, "method.type", "distillation"),
        ({"method": {"type": "distillation", "distillation": {}}}, "method.distillation.teachers", "teacher"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", ""),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown key"),
    ],
)
async def test_what_is_refused_names_the_field_of_the_request(
    desk: Desk, fields: dict[str, Any], param: str, said: str
) -> None:
    error = await desk.refused(**fields)
    assert error.param == param
    assert error.code == "invalid_request"
    assert said in str(error)


@pytest.mark.parametrize(
    ("distillation", "param"),
    [
        ({"teacher": "huge"}, "method.distillation.teacher"),
        ({"teacher": "big", "teachers": {"a": {"model": "big"}}}, "method.distillation.teacher"),
        ({"teacher": "big", "tempo": 1}, "method.distillation.tempo"),
        ({"teacher": "big", "loss": {"objective": "nonsense"}}, "method.distillation.loss.objective"),
        ({"teacher": "big", "student": "x"}, "method.distillation.student"),
        (
            {"teacher": "big", "schedule": {"steps": 3}, "hyperparameters": {"n_epochs": 2}},
            "hyperparameters.n_epochs",
        ),
    ],
)
async def test_a_wrong_method_is_refused(desk: Desk, distillation: dict[str, Any], param: str) -> None:
    error = await desk.refused(method={"type": "distillation", "distillation": distillation})
    assert error.param == param, str(error)


async def test_errors_carry_what_our_problems_say(desk: Desk) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await desk.client.fine_tuning.jobs.retrieve("job_0123456789")
    assert caught.value.code == "not_found"
    assert "no job 'job_0123456789'" in str(caught.value)
    wrong = desk.client.with_options(api_key="stillhouse_wrong")
    with pytest.raises(openai.AuthenticationError):
        await wrong.fine_tuning.jobs.list()


async def test_a_job_from_its_creation_to_its_end(desk: Desk) -> None:
    job = await desk.create(metadata={"team": "a"})
    jobs = desk.client.fine_tuning.jobs
    scope = await desk.led(job.id, "validating")
    assert (await jobs.retrieve(job.id)).status == "validating_files"
    await desk.ctx.jobs.update(scope, status="running", usage={"trained_tokens": 12.0})
    await desk.ctx.jobs.event(job.id, "log", "watch out", level="warning")
    assert (await jobs.retrieve(job.id)).status == "running"
    await desk.ctx.jobs.update(scope, status="succeeded", release=True)
    await desk.ctx.jobs.event(job.id, "job.status", "succeeded", status="succeeded")
    done = await jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", job.id, 12)
    events = [event async for event in jobs.list_events(job.id, limit=1)]
    assert [event.message for event in events] == ["succeeded", "watch out", "queued"]
    assert [event.level for event in events] == ["info", "warn", "info"]
    first = await jobs.list_events(job.id, after=events[-1].id, extra_query={"order": "asc"})
    assert [event.message for event in first.data] == ["watch out", "succeeded"]
    other = await desk.create()
    assert [item.id async for item in jobs.list(limit=1)] == [other.id, job.id]
    assert [item.id async for item in jobs.list(metadata={"team": "a"})] == [job.id]


async def test_a_job_is_cancelled(desk: Desk) -> None:
    jobs = desk.client.fine_tuning.jobs
    assert (await jobs.cancel((await desk.create()).id)).status == "cancelled"
    led = await desk.create()
    await desk.led(led.id)
    assert (await jobs.cancel(led.id)).status == "running", "until its trainer has stopped"


async def test_a_job_is_paused_and_resumed(desk: Desk) -> None:
    jobs = desk.client.fine_tuning.jobs
    job = await desk.create()
    assert str((await jobs.pause(job.id)).status) == "paused"
    assert (await jobs.resume(job.id)).status == "queued"
    await jobs.cancel((other := await desk.create()).id)
    with pytest.raises(openai.ConflictError):
        await jobs.resume(other.id)


async def test_a_repeated_create_makes_one_job(desk: Desk) -> None:
    headers = {"Idempotency-Key": "mine"}
    first, second = await desk.create(extra_headers=headers), await desk.create(extra_headers=headers)
    assert first == second


async def test_health_is_quick_while_a_file_comes_and_another_goes(desk: Desk) -> None:
    big = await desk.upload(PROMPTS * 9000)
    slow = 0.0
    async with httpx.AsyncClient(base_url=desk.url, trust_env=False) as http:
        transfers = asyncio.gather(desk.client.files.content(big.id), desk.upload(PROMPTS * 9001))
        while not transfers.done():
            answer = await asyncio.wait_for(http.get("/healthz"), 5)
            slow = max(slow, answer.elapsed.total_seconds())
        await transfers
    assert slow < 2.0, "a block at a time, never a whole file"

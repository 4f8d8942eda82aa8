"""What services log about a job can be read beside its artifacts: bounded, without secrets, never in anybody's way."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from stillhouse.core import job_logs, telemetry
from stillhouse.core.blobs import Artifacts
from stillhouse.core.config import Settings
from stillhouse.core.job_logs import JobLogs, LogReader
from stillhouse.gateway import logs
from tests.gateway_kit import Gateway, open_gateway, problem

JOB = "job_00000000000000000001"
SECRET = 'a-very-"secret"-token'


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    made = Artifacts(tmp_path / "artifacts")
    made.job(JOB).root.mkdir(parents=True)
    return made


def keep(kept: JobLogs, message: str, job_id: str = JOB, **data: Any) -> None:
    kept(None, "info", {"event": message, "level": "info", "timestamp": "now", "job_id": job_id, **data})


def messages(artifacts: Artifacts, service: str = "") -> list[str]:
    return [line["message"] for line in LogReader(artifacts.job(JOB).logs, service).read()]


def test_lines_of_a_job_are_kept_in_their_order(artifacts: Artifacts) -> None:
    sampler, teacher = (JobLogs(artifacts, role, f"{role}-0") for role in ("sampler", "teacher"))
    for number in range(3):
        keep(sampler, f"sampled {number}", sample_id="1/0")
        keep(teacher, f"scored {number}")
    sampler.flush()
    teacher.flush()
    assert messages(artifacts) == [f"{verb} {number}" for number in range(3) for verb in ("sampled", "scored")]
    assert messages(artifacts, "teacher") == messages(artifacts, "teacher-0") == [f"scored {n}" for n in range(3)]
    line = LogReader(artifacts.job(JOB).logs).read()[0]
    assert (line["service"], line["instance"], line["level"]) == ("sampler", "sampler-0", "info")
    assert line["data"] == {"sample_id": "1/0"}


def test_what_concerns_no_job_is_not_kept(artifacts: Artifacts) -> None:
    kept = JobLogs(artifacts, "teacher", "teacher-0")
    kept(None, "info", {"event": "ready", "level": "info"})
    for name in ("../../etc", "job_1", "", JOB + "/..", "job_00000000000000000002"):  # the last one has no folder
        keep(kept, "no", name)
    kept.flush()
    assert list(artifacts.root.rglob("*.jsonl")) == []
    assert [path.name for path in artifacts.root.rglob("*")] == ["jobs", JOB]


def test_secrets_are_not_kept(artifacts: Artifacts) -> None:
    kept = JobLogs(artifacts, "trainer", "trainer-0", [SECRET, ""])
    keep(kept, f"connecting with {SECRET}", error=f"refused: {SECRET}")
    kept.flush()
    text = next(artifacts.job(JOB).logs.iterdir()).read_text()
    assert "secret" not in text
    assert json.loads(text)["message"] == "connecting with ***"


def test_files_stay_small_and_readers_lose_nothing(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "MAX_FILE_BYTES", 1000)
    kept, reader = JobLogs(artifacts, "sampler", "sampler-0"), LogReader(artifacts.job(JOB).logs)
    read: list[str] = []
    for number in range(50):
        keep(kept, str(number))
        kept.flush()
        if number % 3 == 0:
            read += [line["message"] for line in reader.read()]
    read += [line["message"] for line in reader.read()]
    assert read == [str(number) for number in range(50)], "each once, over many changes of the file"
    files = sorted(artifacts.job(JOB).logs.iterdir())
    assert [path.name for path in files] == ["sampler-sampler-0.jsonl", "sampler-sampler-0.old.jsonl"]
    assert all(path.stat().st_size <= 1000 for path in files)
    assert messages(artifacts)[-1] == "49"


def test_a_disk_that_takes_nothing_stops_nobody(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = JobLogs(artifacts, "sampler", "sampler-0")
    with monkeypatch.context() as full:

        def no_space(path: Path, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        full.setattr(job_logs, "append_lines", no_space)
        keep(kept, "lost")
        kept.flush()
    keep(kept, "kept")
    kept.flush()
    assert messages(artifacts) == ["kept"]


def test_a_disk_that_hangs_costs_lines_and_no_time(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(job_logs, "append_lines", lambda path, data: released.wait(10))
    kept = JobLogs(artifacts, "sampler", "sampler-0")
    for number in range(job_logs.MAX_WAITING + 100):
        keep(kept, str(number))
    assert kept._waiting.qsize() <= job_logs.MAX_WAITING
    released.set()
    kept.flush()


def test_torn_lines_are_passed_over(artifacts: Artifacts) -> None:
    kept = JobLogs(artifacts, "sampler", "sampler-0")
    keep(kept, "first")
    kept.flush()
    path = next(artifacts.job(JOB).logs.iterdir())
    path.write_bytes(path.read_bytes() + b'{"id": "12')
    keep(kept, "second")
    kept.flush()
    path.write_bytes(path.read_bytes() + b'{"id": 5}\n[]\n\xff\n')
    assert messages(artifacts) == ["first", "second"]


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, before = root.handlers, root.level, structlog.get_config()
    yield
    root.handlers, root.level = handlers, level
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("restored_logging")
def test_a_crash_is_told_to_the_job_that_was_worked_for(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, internal_token=SECRET, redis_url="redis://:hunter22@queue:6379/0").resolved()
    artifacts = Artifacts(settings.artifacts_dir())
    artifacts.job(JOB).root.mkdir(parents=True)
    log = telemetry.setup_logging(settings, "teacher", "teacher-0")
    assert telemetry.job_logs is not None
    telemetry.job_logs.current = lambda: JOB
    try:
        raise RuntimeError(f"no answer from {settings.redis_url} with {SECRET}")
    except RuntimeError:
        log.exception("service crashed")
    log.info("of no job")
    log.bind(job_id=JOB).warning("of a job", samples=3)
    telemetry.flush_logs()
    crash, line = LogReader(artifacts.job(JOB).logs).read()
    assert (crash["message"], crash["level"]) == ("service crashed", "error")
    assert "Traceback" in crash["data"]["exception"]
    assert "RuntimeError" in crash["data"]["exception"]
    assert "hunter22" not in str(crash)
    assert "secret" not in str(crash)
    assert (line["message"], line["data"], line["instance"]) == ("of a job", {"samples": 3}, "teacher-0")


# -- over REST ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def ask(gateway: Gateway, job_id: str, **query: Any) -> httpx.Response:
    return await gateway.http.get(f"/v1/jobs/{job_id}/logs", params=query)


async def test_the_last_lines_and_those_after_them(gateway: Gateway) -> None:
    job_id = (await gateway.submit()).json()["id"]
    assert (await ask(gateway, job_id)).json() == {"object": "list", "data": [], "has_more": False}
    kept = JobLogs(gateway.ctx.artifacts, "sampler", "sampler-0")
    for number in range(5):
        keep(kept, str(number), job_id)
    kept.flush()
    last = (await ask(gateway, job_id, tail=2)).json()["data"]
    assert [line["message"] for line in last] == ["3", "4"]
    assert last[0]["object"] == "log"
    first = LogReader(gateway.ctx.artifacts.job(job_id).logs).read()[0]["id"]
    page = (await ask(gateway, job_id, after=first, tail=2)).json()
    assert ([line["message"] for line in page["data"]], page["has_more"]) == (["1", "2"], True)
    assert (await ask(gateway, job_id, service="teacher")).json()["data"] == []
    assert problem(await ask(gateway, job_id, after="../x"), 422)["param"] == "after"


async def test_a_stream_is_cut_and_resumed_without_loss(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL_S", 0.01), ("HOLD_S", 0.02), ("LAST_WORDS_S", 0.3)):
        monkeypatch.setattr(logs, name, value)
    job_id = (await gateway.submit()).json()["id"]
    kept = JobLogs(gateway.ctx.artifacts, "sampler", "sampler-0")
    keep(kept, "0", job_id)
    kept.flush()
    seen: list[str] = []
    last_id = ""

    async def follow(until: int) -> None:
        nonlocal last_id
        stream = logs.follow_logs(gateway.ctx, job_id, service="", after=last_id, tail=100)
        async for event in stream:
            fields = dict(part.split(": ", 1) for part in event.decode().strip().splitlines() if ": " in part)
            seen.append(json.loads(fields["data"])["message"])
            last_id = fields["id"]
            keep(kept, str(len(seen)), job_id)
            if len(seen) == until:
                await stream.aclose()  # type: ignore[attr-defined]
                return

    await asyncio.wait_for(follow(3), 10)
    await asyncio.wait_for(follow(6), 10)
    assert seen == [str(number) for number in range(6)]
    await gateway.http.post(f"/v1/jobs/{job_id}/cancel")
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/logs", params={"follow": True, "tail": 4})
    assert answer.headers["content-type"].startswith("text/event-stream")
    ids = [line.removeprefix("id: ") for line in answer.text.splitlines() if line.startswith("id: ")]
    assert len(ids) == 4
    assert ids[-2] == last_id, "and one that came meanwhile"
    resumed = await gateway.http.get(
        f"/v1/jobs/{job_id}/logs", params={"follow": True}, headers={"Last-Event-ID": ids[0]}
    )
    assert [line.removeprefix("id: ") for line in resumed.text.splitlines() if line.startswith("id: ")] == ids[1:]


def test_pages_read_of_a_long_file_what_they_show(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "NEAR_BYTES", 512)
    folder = artifacts.job(JOB).logs
    folder.mkdir()
    for service in ("sampler", "teacher"):  # ids 100, 101, ...; those of the teacher between the sampler's
        lines = [_line(f"{100 + number}-{service[0]}", service, "x" * (number % 50)) for number in range(2000)]
        (folder / f"{service}-0.jsonl").write_text("".join(lines) + '{"id": "99')
    every = LogReader(folder).read()
    assert len(every) == 4000
    parsed: list[bytes] = []
    parse = job_logs._parsed
    monkeypatch.setattr(job_logs, "_parsed", lambda text: parsed.append(text) or parse(text))
    for place in (0, 1, 17, 1999, 2500, 3990, 3999):
        parsed.clear()
        page = LogReader(folder).read(after=every[place]["id"], most=20)
        assert page[:20] == every[place + 1 : place + 21]
        assert len(parsed) < 200, "of 4000"
        assert LogReader(folder).read(after=every[place]["id"]) == every[place + 1 :]
    assert len(LogReader(folder, "teacher").read(after=every[0]["id"], most=20)) == 20


def _line(line_id: str, service: str, message: str) -> str:
    line = {"id": line_id, "created_at": 1.0, "service": service, "instance": f"{service}-0", "level": "info"}
    return json.dumps({**line, "message": message, "data": {}}) + "\n"


def test_a_reader_that_began_behind_an_id_goes_on_with_what_comes(artifacts: Artifacts) -> None:
    kept = JobLogs(artifacts, "sampler", "sampler-0")
    for number in range(3):
        keep(kept, str(number))
    kept.flush()
    reader = LogReader(artifacts.job(JOB).logs)
    first = LogReader(artifacts.job(JOB).logs).read()[0]["id"]
    assert [line["message"] for line in reader.read(after=first)] == ["1", "2"]
    assert reader.read() == []
    keep(kept, "3")
    kept.flush()
    assert [line["message"] for line in reader.read()] == ["3"]

"""Jobs whose verifiers do not work, or are killed: real services, real worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.trainer.verify.judges import TRIES
from tests.cluster import Cluster, cluster, job_spec
from tests.waiting import wait_until


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, redis_url, "sampler", "trainer") as made:
        made.add_model("student", seed=1)
        yield made


def job(answer: str, steps: int, verifier: str = "regex") -> dict[str, Any]:
    return job_spec(
        teachers={},
        stages__0__data={"rows": [{"prompt": f"say {word}", "answer": answer} for word in ("one", "two")]},
        stages__0__sampling__max_tokens=4,
        stages__0__loss={"objective": "policy_gradient", "teacher_weight": 0, "reward": {"verifier": verifier}},
        stages__0__schedule={"steps": steps, "prompts_per_step": 2, "group_size": 2, "max_staleness": 0},
    )


def workers() -> list[int]:
    """Worker processes that this process has."""
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"verify.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def test_a_verifier_that_only_fails_ends_the_job_with_its_name(deployment: Cluster) -> None:
    """Steps of four completions to all rows there are: the eighth makes it 32."""
    record = await deployment.ended(await deployment.submit(job("(", steps=12)))
    assert record.status == "failed"
    assert "verifier 'regex' failed 32 times in a row, on 2 rows, at last with: ValueError" in str(record.error)
    assert record.step == 7
    await wait_until(lambda: not workers(), timeout_s=10, what="its processes to be gone")


async def test_a_verifier_that_is_not_there_is_known_before_a_model_is_loaded(deployment: Cluster) -> None:
    job_id = await deployment.submit(job("x", steps=1, verifier="haiku"))
    record = await deployment.ended(job_id)
    assert record.status == "failed"
    for words in ("preflight", "verifier 'haiku' cannot be loaded", "`stillhouse verifiers`, where the trainer"):
        assert words in str(record.error)
    types = [event["type"] for event in await deployment.ctx.jobs.events(job_id)]
    assert "student.loaded" not in types
    await wait_until(lambda: not workers(), timeout_s=10, what="its processes to be gone")


async def test_killed_workers_cost_no_reward(deployment: Cluster) -> None:
    job_id = await deployment.submit(job(".|^$", steps=8))
    killed: set[int] = set()
    while len(killed) < TRIES - 1:  # one more of the same verdict, and it has failed
        found = await wait_until(lambda: set(workers()) - killed, timeout_s=30, what="a worker process")
        os.kill(pid := found.pop(), signal.SIGKILL)
        killed.add(pid)
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    assert [point["values"]["reward/mean"] for point in await deployment.ctx.jobs.metrics(job_id)] == [1.0] * 8
    await wait_until(lambda: not workers(), timeout_s=10, what="its processes to be gone")

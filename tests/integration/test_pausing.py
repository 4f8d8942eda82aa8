"""A job that is paused and resumed: equal to one that never was, and its services are free in between."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue import keys
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.gateway import jobs, pausing
from tests.chaos.equality import assert_same, everything
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until

STEPS = 12
"""More than a trainer takes between two looks at its job's record."""


def spec(**changes: Any) -> dict[str, Any]:
    schedule = {"steps": STEPS, "prompts_per_step": 3, "group_size": 2, "max_staleness": 1}
    return job_spec(
        deterministic=True,
        stages__0__schedule=schedule,
        stages__0__optimizer__lr=1e-2,
        checkpoint={"every_steps": 4},
        **changes,
    )


async def is_status(deployment: Cluster, job_id: str, status: str) -> JobRecord:
    async def has_it() -> JobRecord | None:
        record = await deployment.ctx.jobs.get(job_id)
        assert not record.is_terminal, f"it is {record.status}: {record.error}"
        return record if record.status == status else None

    return await wait_until(has_it, timeout_s=60, what=f"{job_id} to be {status}")


async def succeeded(deployment: Cluster, job_id: str) -> dict[str, Any]:
    """What it left."""
    return everything((await deployment.succeeded(job_id))[1])


@pytest.mark.parametrize(
    "at_step", [pytest.param(0, marks=pytest.mark.full), 1, pytest.param(3, marks=pytest.mark.full)]
)
async def test_a_pause_changes_nothing(deployment: Cluster, at_step: int) -> None:
    """At step 0 it is paused as soon as a trainer has it: while it is claimed, validates or starts."""
    ctx = deployment.ctx
    job_id = await deployment.submit(spec())
    if at_step:
        await deployment.at_step(job_id, at_step)
    else:
        await wait_until(lambda: ctx.redis.get(keys.lease(job_id)), timeout_s=60, what="a trainer to claim it")
    assert (await pausing.pause(ctx, job_id)).status == "pausing"
    record = await is_status(deployment, job_id, "paused")
    assert record.committed_step == record.step, "what was trained is committed"
    assert record.step >= at_step
    assert await ctx.redis.get(keys.lease(job_id)) is None
    assert await ctx.redis.get(keys.sampler("sampler-0")) is None
    other = await deployment.submit(spec())
    expected = await succeeded(deployment, other)
    assert (await ctx.jobs.get(job_id)).status == "paused", "nobody takes it meanwhile"
    await pausing.resume(ctx, job_id)
    assert_same(await succeeded(deployment, job_id), expected)


@pytest.mark.full
async def test_a_drain_in_the_middle_of_a_pause_ends_paused(deployment: Cluster) -> None:
    ctx = deployment.ctx
    job_id = await deployment.submit(spec())
    await deployment.at_step(job_id, 1)
    await pausing.pause(ctx, job_id)
    await deployment.stop("trainer-0")
    record = await is_status(deployment, job_id, "paused")
    assert await ctx.redis.get(keys.lease(job_id)) is None
    await deployment.start("trainer", "trainer-0")
    assert (await jobs.cancel(ctx, job_id)).status == "cancelled"
    report = verify_job(ctx.artifacts.job(job_id), await ctx.jobs.get(job_id))
    assert report.ok, report.violations
    assert record.epoch == 1

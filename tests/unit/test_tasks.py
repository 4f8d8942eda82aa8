"""Work that a cancellation must not stop half-way."""

from __future__ import annotations

import asyncio

import pytest

from stillhouse.core import tasks
from stillhouse.core.tasks import cancel_all, to_its_end


async def test_a_cancellation_waits_for_the_end_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    may_end, steps = asyncio.Event(), []

    async def work() -> None:
        steps.append("start")
        await may_end.wait()
        steps.append("finish")

    outer = asyncio.create_task(to_its_end(work()))
    await asyncio.sleep(0)
    ending = asyncio.create_task(cancel_all([outer]))
    _, pending = await asyncio.wait([ending], timeout=0.1)  # some ten cancellations
    assert pending
    assert steps == ["start"]
    may_end.set()
    await ending
    assert outer.cancelled()
    assert steps == ["start", "finish"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_what_the_work_gives_is_handed_on(is_cancelled: bool) -> None:
    async def work(error: Exception | None) -> int:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return 3

    good, bad = (asyncio.create_task(to_its_end(work(error))) for error in (None, ValueError("broken")))
    await asyncio.sleep(0)
    if is_cancelled:
        good.cancel()
        bad.cancel()
    await asyncio.wait([good, bad])
    assert good.cancelled() == is_cancelled
    assert is_cancelled or good.result() == 3
    assert str(bad.exception()) == "broken"

"""Pages of jobs by creation time, stable while jobs come and go: a page goes on behind a place, not at a number.

A place is (creation time, id) of the last job of the page before. It is known for deleted jobs, too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from redis.asyncio import Redis

from stillhouse.core.errors import NotFoundError
from stillhouse.core.queue import keys
from stillhouse.core.queue.client import text

SCAN: Final = 200
"""Jobs looked at in one go while some of them are asked for."""

Place = tuple[float, str]


async def listed(
    redis: Redis, after: str, number: int, newest_first: bool, status: str, owner: str | None
) -> AsyncIterator[str]:
    """Ids of jobs behind `after`, `number` of them in one go; '' and None ask for no status and no owner.

    Raises:
        NotFoundError: no job has or had the id `after`.
    """
    is_filtered = status != "" or owner is not None
    place = await _place(redis, after) if after else None
    while batch := await _behind(redis, place, SCAN if is_filtered else number, newest_first):
        ids = [job_id for _, job_id in batch]
        for job_id in await _filtered(redis, ids, status, owner) if is_filtered else ids:
            yield job_id
        place = batch[-1]


async def _place(redis: Redis, job_id: str) -> Place:
    for key in (keys.JOBS, keys.JOBS_DELETED):
        score = await redis.zscore(key, job_id)
        if score is not None:
            return float(score), job_id
    raise NotFoundError(f"no job '{job_id}'", param="after")


async def _behind(redis: Redis, place: Place | None, number: int, newest_first: bool) -> list[Place]:
    """The next places; none = there are no more."""
    start, end = ("+inf", "-inf") if newest_first else ("-inf", "+inf")
    start, skipped = repr(place[0]) if place else start, 0
    while True:
        raw: Any = await redis.zrange(
            keys.JOBS,
            start,  # type: ignore[arg-type]  # a bound of scores
            end,  # type: ignore[arg-type]
            desc=newest_first,
            byscore=True,
            withscores=True,
            offset=skipped,
            num=number + 1,
        )
        batch = [(float(score), text(job_id)) for job_id, score in raw]
        behind = [each for each in batch if place is None or (each < place if newest_first else each > place)]
        if behind or not batch:
            return behind[:number]
        skipped += len(batch)  # so many jobs were made at the very time of `place`


async def _filtered(redis: Redis, ids: list[str], status: str, owner: str | None) -> list[str]:
    async with redis.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hmget(keys.job(job_id), ["status", "owner"])
        rows: Any = await pipe.execute()
    facts = [(job_id, text(row[0] or b""), text(row[1] or b"")) for job_id, row in zip(ids, rows, strict=True)]
    return [job_id for job_id, its, whose in facts if its and status in ("", its) and owner in (None, whose)]

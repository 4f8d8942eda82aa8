"""Taking away what the epochs of a job left in Redis: streams, marks, and the teachers' index entries."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import QueueBackend, Scope


async def close_epochs(redis: Redis, queue: QueueBackend, job_id: str, through: int) -> None:
    """Close the epochs 1..`through` of a job: late work finds no stream, teachers see none, nothing stays behind.

    A claim does this for all epochs before its own: a trainer that was killed could not do it itself.
    """
    models: Any = await redis.smembers(keys.TEACHERS)  # type: ignore[misc]
    for model in models:
        index = keys.teacher(model.decode())
        fields: Any = await redis.hkeys(index)  # type: ignore[misc]
        gone = [field for field in fields if _epoch(field.decode(), job_id) in range(1, through + 1)]
        if gone:
            await redis.hdel(index, *gone)  # type: ignore[misc]
    for epoch in range(1, through + 1):
        await queue.close_epoch(Scope(job_id, epoch))


def _epoch(stream: str, job_id: str) -> int:
    """Epoch of a stream of rollouts, 0 if it is of another job."""
    prefix = f"{keys.job(job_id)}:"
    return int(stream.removeprefix(prefix).partition(":")[0]) if stream.startswith(prefix) else 0

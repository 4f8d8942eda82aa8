"""What a caller may use: requests, jobs, tokens, bytes. The counters are in Redis and on disk (core/queue/quotas.py).

Which limits hold: the key's own; else, for keys without the scope `admin`, the deployment's (settings `limit_...`).

Where Redis is away: requests pass uncounted, since whatever needs Redis is refused anyway and reading files from disk
should go on; jobs are not accepted without it, counted or not.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

from redis.exceptions import RedisError

from stillhouse.core.config import Settings
from stillhouse.core.errors import QuotaError, RateError
from stillhouse.core.estimate import stage_tokens
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.queue.quotas import Quotas, seconds_of_day_left
from stillhouse.core.schemas import KeyLimits
from stillhouse.core.service import Context
from stillhouse.core.spec import JobSpec
from stillhouse.gateway.auth import Caller

COUNT_TIMEOUT_S: Final = 1.0
"""A queue server that takes longer to count is in trouble, and the request does not wait for it."""
UNCOUNTED_S: Final = 2.0
"""After that: no request is counted for so long, so that not each of them waits."""
MOST_TOKENS: Final = 2 * 10**15
"""Counted of one job: over every limit there can be, and far from where a counter overflows."""
MIB: Final = 1 << 20


def in_force(settings: Settings, caller: Caller) -> KeyLimits:
    """The limits of a caller; None = no limit."""
    limits = {name: caller.limits.get(name) for name in KeyLimits.model_fields}
    if "admin" not in caller.scopes:
        limits = {name: getattr(settings, f"limit_{name}") if own is None else own for name, own in limits.items()}
    return KeyLimits.model_validate(limits)


class RateLimiter:
    """Counts requests before anything is done for them."""

    def __init__(self, ctx: Context) -> None:
        self._quotas = Quotas(ctx.redis)
        self._settings = ctx.settings
        self._log = ctx.log
        self._counts_again_at = 0.0

    async def count(self, caller: Caller, *, is_write: bool) -> None:
        """Count a request.

        Raises:
            RateError: the key sends too many; says how many it may, and when to go on.
        """
        limits = in_force(self._settings, caller)
        rates = {"requests": limits.requests_per_minute, "writes": limits.writes_per_minute if is_write else None}
        given = {name: rate for name, rate in rates.items() if rate is not None}
        if not given or time.monotonic() < self._counts_again_at:
            return
        try:
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                broken, wait_s = await self._quotas.take(caller.key, given)
        except (RedisError, OSError, TimeoutError) as failure:
            self._counts_again_at = time.monotonic() + UNCOUNTED_S
            self._log.warning("requests are not counted: the queue server does not answer", error=str(failure))
            return
        if broken:
            error = RateError(
                f"key '{caller.key}' sent more than its {given[broken]:g} {broken} per minute; go on in {wait_s:.3g} "
                f"s, or ask an administrator for a higher {broken}_per_minute"
            )
            error.retry_after_s = wait_s
            raise error


async def admit(ctx: Context, caller: Caller, record: JobRecord, spec: JobSpec) -> None:
    """Count a job that is about to be created.

    Raises:
        QuotaError: it is more than its owner may ask for; names the limit, what is used and what is asked for.
    """
    limits = in_force(ctx.settings, caller)
    tokens = job_tokens(record, spec)
    if limits.job_tokens is not None and tokens > limits.job_tokens:
        raise QuotaError(
            f"this job asks for {tokens:.4g} completion tokens (steps x prompts_per_step x group_size x max_tokens), "
            f"a job of '{caller.owner}' may ask for {limits.job_tokens:.4g}; make it smaller, or ask an administrator "
            "for a higher job_tokens",
            param="stages",
        )
    if limits.active_jobs is None and limits.daily_tokens is None:
        return
    quotas = Quotas(ctx.redis)
    broken, used = await quotas.admit(
        caller.owner, record.id, tokens, active_jobs=limits.active_jobs, daily_tokens=limits.daily_tokens
    )
    if broken == "active_jobs":
        raise QuotaError(
            f"'{caller.owner}' has {used} jobs that have not ended, and may have {limits.active_jobs}; wait for one, "
            "cancel one, or ask an administrator for more active_jobs"
        )
    if broken:
        raise QuotaError(
            f"this job asks for {tokens:.4g} completion tokens; '{caller.owner}' has asked for {used:.4g} today and "
            f"may ask for {limits.daily_tokens:.4g} a day; the next day begins in {seconds_of_day_left()} s (UTC)"
        )


async def take_back(ctx: Context, record: JobRecord, spec: JobSpec) -> None:
    """A job that was admitted was not created after all."""
    with suppress(RedisError):  # whoever called has an error of its own to tell; the place is free after a minute
        await Quotas(ctx.redis).take_back(record.owner, record.id, job_tokens(record, spec))


def job_tokens(record: JobRecord, spec: JobSpec) -> int:
    """Completion tokens that a job asks for, at most; a pre-flight asks for none worth counting."""
    return min(sum(map(stage_tokens, spec.stages)), MOST_TOKENS) if record.kind == "distillation" else 0


def check_room(settings: Settings, caller: Caller, used: int, size: int) -> None:
    """Refuse a file that its owner, who has `used` bytes of others, has no room for.

    Uploads that end at the same moment may pass together; the next one does not.

    Raises:
        QuotaError: names both sides.
    """
    limit = in_force(settings, caller).file_mib
    if limit is not None and used + size > limit * MIB:
        raise QuotaError(
            f"this file has {size / MIB:.4g} MiB; '{caller.owner}' has {used / MIB:.4g} MiB of files and may have "
            f"{limit:g}; delete files (DELETE /v1/files/ID), or ask an administrator for a higher file_mib"
        )


async def usage(ctx: Context, caller: Caller) -> dict[str, float]:
    """What counts towards the limits of a caller, by their names, as far as the queue server counts it."""
    counted = await Quotas(ctx.redis).usage(caller.owner)
    return {"active_jobs": counted.active_jobs, "daily_tokens": counted.daily_tokens}

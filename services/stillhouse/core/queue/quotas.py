"""What callers use, counted on the queue server: replicas of the gateway share it and keep nothing themselves.

Rates are token buckets, one number each: the time at which the bucket is full again (GCRA). A bucket holds one minute's
worth, so a burst after a quiet minute passes, and what refills is the limit. It expires when it is full.

Jobs are counted by the set of those that were admitted: whoever ended leaves it at the next count. A job that was
admitted and has no record (yet) counts for PENDING_S, so that two requests at once cannot both take the last place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from stillhouse.core.queue import keys
from stillhouse.core.queue.client import text

WINDOW_MS: Final = 60_000
"""Rates are per minute."""
PENDING_S: Final = 60
"""Between admission and record lie a file and a script: milliseconds, seconds on a bad day."""
DAY_S: Final = 86_400

# KEYS buckets; ARGV requests per minute of each. Answers (0, 0), or (the bucket that is empty, ms until it is not).
_TAKE = f"""
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000
local full = {{}}
for i, bucket in ipairs(KEYS) do
  full[i] = math.max(now, tonumber(redis.call('GET', bucket) or '0')) + {WINDOW_MS} / ARGV[i]
  local wait = full[i] - now - {WINDOW_MS}
  if wait > 0 then return {{i, math.ceil(wait)}} end
end
for i, bucket in ipairs(KEYS) do
  redis.call('SET', bucket, string.format('%.3f', full[i]), 'PX', math.ceil(full[i] - now))
end
return {{0, 0}}
"""

# KEYS admitted, tokens of the day, active; ARGV prefix of records, ...
_COUNT = f"""
local now = tonumber(redis.call('TIME')[1])
local jobs = 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local is_pending = redis.call('ZSCORE', KEYS[1], id) + {PENDING_S} > now
  if redis.call('ZSCORE', KEYS[3], id) or is_pending and redis.call('EXISTS', ARGV[1] .. id) == 0 then
    jobs = jobs + 1
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
local tokens = redis.call('GET', KEYS[2]) or '0'
"""
_USAGE = _COUNT + "return {jobs, tokens}"

# ... ARGV job id, tokens, most jobs, most tokens a day ('' = no limit). May be repeated.
_ADMIT = (
    _COUNT
    + f"""
if redis.call('ZSCORE', KEYS[1], ARGV[2]) then return {{'', 0}} end
if ARGV[4] ~= '' and jobs + 1 > tonumber(ARGV[4]) then return {{'active_jobs', jobs}} end
if ARGV[5] ~= '' and tokens + ARGV[3] > tonumber(ARGV[5]) then return {{'daily_tokens', tokens}} end
redis.call('ZADD', KEYS[1], now, ARGV[2])
redis.call('INCRBY', KEYS[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], {2 * DAY_S})
return {{'', 0}}
"""
)

# KEYS admitted, tokens of the day; ARGV job id, tokens
_TAKE_BACK = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 1 then redis.call('DECRBY', KEYS[2], ARGV[2]) end
return ''
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of an owner, now."""

    active_jobs: int
    daily_tokens: int


class Quotas:
    """Counters of callers. Every method is one script, hence one step."""

    def __init__(self, redis: Redis) -> None:
        self._take = redis.register_script(_TAKE)
        self._admit = redis.register_script(_ADMIT)
        self._take_back = redis.register_script(_TAKE_BACK)
        self._usage = redis.register_script(_USAGE)

    async def take(self, key: str, rates: Mapping[str, float]) -> tuple[str, float]:
        """Count one request of a key against `rates` {name: per minute}: ('', 0), or (the rate that it would break,
        seconds until it does not). A refused request does not count.
        """
        names = list(rates)
        buckets = [keys.rate(key, name) for name in names]
        index, wait_ms = await self._take(keys=buckets, args=[rates[name] for name in names])
        return (names[int(index) - 1], int(wait_ms) / 1000) if int(index) else ("", 0.0)

    async def admit(
        self, owner: str, job_id: str, tokens: int, *, active_jobs: int | None, daily_tokens: float | None
    ) -> tuple[str, int]:
        """Count a job: ('', 0), or (the limit that it would break, what is used of it)."""
        limits = ["" if limit is None else limit for limit in (active_jobs, daily_tokens)]
        answer: Any = await self._admit(keys=_keys(owner), args=[keys.job(""), job_id, tokens, *limits])
        return text(answer[0]), int(answer[1])

    async def take_back(self, owner: str, job_id: str, tokens: int) -> None:
        """A job that was admitted did not come to be."""
        await self._take_back(keys=_keys(owner)[:2], args=[job_id, tokens])

    async def usage(self, owner: str) -> Usage:
        """What an owner uses."""
        jobs, tokens = await self._usage(keys=_keys(owner), args=[keys.job("")])
        return Usage(int(jobs), int(tokens))


def seconds_of_day_left() -> int:
    """Until daily limits begin anew, at midnight UTC."""
    return DAY_S - int(time.time()) % DAY_S


def _keys(owner: str) -> list[str]:
    return [keys.admitted(owner), keys.daily_tokens(owner, int(time.time()) // DAY_S), keys.JOBS_ACTIVE]

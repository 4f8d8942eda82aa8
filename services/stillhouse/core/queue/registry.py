"""Who is there: services announce themselves by heartbeats, trainers lease samplers.

Addresses come from here and never from a message, so a forged message cannot send a service somewhere else.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Final

from redis.asyncio import Redis

from stillhouse.core.errors import UnavailableError
from stillhouse.core.queue import keys
from stillhouse.core.queue.client import BEYOND_MAXMEMORY, text
from stillhouse.core.queue.shares import Want
from stillhouse.core.queue.streams import Scope

HEARTBEAT_S: Final = 2.0
"""Time between heartbeats."""
EXPIRY_S: Final = 8.0
"""A service without a heartbeat for so long is gone: three missed ones and some slack for a busy machine."""

# KEYS sampler; ARGV job id, epoch, lease_ms. Free, or leased by an older claim of the same job.
_LEASE_SAMPLER = f"""{BEYOND_MAXMEMORY}
local holder = redis.call('GET', KEYS[1])
if holder then
  local job, epoch = string.match(holder, '^(.*):(%d+)$')
  if job ~= ARGV[1] or tonumber(epoch) > tonumber(ARGV[2]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. ARGV[2], 'PX', ARGV[3])
return 1
"""

# KEYS service, services; ARGV expiry_ms, "role:instance", now, field, value, ...
_BEAT = f"""{BEYOND_MAXMEMORY}
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
return 1
"""

# KEYS want, wants; ARGV job id, want, ttl_ms, the beginning of a want's key. Of each job that asks: id and want.
_WANT = f"""{BEYOND_MAXMEMORY}
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
local found = {{}}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local want = redis.call('GET', ARGV[4] .. id)
  if want then
    table.insert(found, id)
    table.insert(found, want)
  else
    redis.call('SREM', KEYS[2], id)
  end
end
return found
"""

# KEYS want; ARGV epoch. Not what a newer claim asks for.
_WANT_NO_MORE = """
local want = redis.call('GET', KEYS[1])
if want and string.match(want, '^%[(%d+),') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

_RELEASE_SAMPLER = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A live service."""

    role: str
    instance: str
    address: str
    """host:port of its gRPC or REST server."""
    pid: int
    started_at: float
    seen_at: float
    version: str = ""
    metrics_address: str = ""
    state: str = ""
    """What it is doing, in a word: "ready", "sampling", "training" ..."""
    job_id: str = ""
    extra: dict[str, str] = field(default_factory=dict)


class Registry:
    """Heartbeats and sampler leases."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._beat = redis.register_script(_BEAT)
        self._lease_sampler = redis.register_script(_LEASE_SAMPLER)
        self._want = redis.register_script(_WANT)
        self._want_no_more = redis.register_script(_WANT_NO_MORE)
        self._release_sampler = redis.register_script(_RELEASE_SAMPLER)

    async def beat(self, info: ServiceInfo) -> None:
        """Announce a service for the next EXPIRY_S seconds."""
        key = keys.service(info.role, info.instance)
        fields: Any = {
            "role": info.role,
            "instance": info.instance,
            "address": info.address,
            "pid": info.pid,
            "started_at": info.started_at,
            "version": info.version,
            "metrics_address": info.metrics_address,
            "state": info.state,
            "job_id": info.job_id,
            **{f"x_{name}": value for name, value in info.extra.items()},
        }
        flat = [part for pair in fields.items() for part in pair]
        name = f"{info.role}:{info.instance}"
        await self._beat(keys=[key, keys.SERVICES], args=[int(EXPIRY_S * 1000), name, time.time(), *flat])

    async def leave(self, role: str, instance: str) -> None:
        """Take a service off the list at once."""
        await self._redis.delete(keys.service(role, instance))
        await self._redis.zrem(keys.SERVICES, f"{role}:{instance}")

    async def services(self, role: str = "") -> list[ServiceInfo]:
        """Live services, by role and name."""
        found = []
        listed: Any = await self._redis.zrange(keys.SERVICES, 0, -1, withscores=True)
        for member, seen_at in listed:
            name = text(member)
            member_role, _, instance = name.partition(":")
            if role and member_role != role:
                continue
            raw: Any = await self._redis.hgetall(keys.service(member_role, instance))
            if not raw:
                if time.time() - seen_at > 10 * EXPIRY_S:
                    await self._redis.zrem(keys.SERVICES, name)
                continue
            found.append(_info({text(key): text(value) for key, value in raw.items()}, seen_at))
        return sorted(found, key=lambda info: (info.role, info.instance))

    async def find(self, role: str, instance: str) -> ServiceInfo:
        """A live service by name.

        Raises:
            UnavailableError: it is gone.
        """
        raw: Any = await self._redis.hgetall(keys.service(role, instance))
        if not raw:
            raise UnavailableError(f"{role} '{instance}' is gone: no heartbeat for {EXPIRY_S:g} s")
        return _info({text(key): text(value) for key, value in raw.items()}, time.time())

    async def ask_for_samplers(self, scope: Scope, want: Want, ttl_s: float) -> list[Want]:
        """Say what a job asks for, for the next `ttl_s` seconds; returns what all jobs ask for."""
        value = [scope.epoch, want.at_least, want.at_most, want.priority, want.has_begun, want.since]
        found: Any = await self._want(
            keys=[keys.want(scope.job_id), keys.WANTS],
            args=[scope.job_id, json.dumps(value), int(ttl_s * 1000), keys.want("")],
        )
        pairs = zip(found[::2], found[1::2], strict=True)
        return [Want(text(job_id), *json.loads(asked)[1:]) for job_id, asked in pairs]

    async def ask_no_more(self, scope: Scope) -> None:
        """The job needs no samplers any more."""
        await self._want_no_more(keys=[keys.want(scope.job_id)], args=[scope.epoch])

    async def lease_sampler(self, instance: str, scope: Scope, lease_s: float) -> bool:
        """Take or renew a sampler for a job; False if another job has it."""
        answer = await self._lease_sampler(
            keys=[keys.sampler(instance)], args=[scope.job_id, scope.epoch, int(lease_s * 1000)]
        )
        return int(answer) == 1

    async def release_sampler(self, instance: str, scope: Scope) -> None:
        """Give a sampler back."""
        await self._release_sampler(keys=[keys.sampler(instance)], args=[f"{scope.job_id}:{scope.epoch}"])

    async def assignment(self, instance: str) -> Scope | None:
        """The job that leased this sampler."""
        holder = await self._redis.get(keys.sampler(instance))
        if holder is None:
            return None
        job_id, _, epoch = text(holder).rpartition(":")
        return Scope(job_id, int(epoch))


def _info(raw: dict[str, str], seen_at: float) -> ServiceInfo:
    return ServiceInfo(
        role=raw["role"],
        instance=raw["instance"],
        address=raw["address"],
        pid=int(raw["pid"]),
        started_at=float(raw["started_at"]),
        seen_at=seen_at,
        version=raw.get("version", ""),
        metrics_address=raw.get("metrics_address", ""),
        state=raw.get("state", ""),
        job_id=raw.get("job_id", ""),
        extra={key.removeprefix("x_"): value for key, value in raw.items() if key.startswith("x_")},
    )

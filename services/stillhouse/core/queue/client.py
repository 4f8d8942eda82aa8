"""Connections to Redis or Valkey.

Two clients: one for commands, which retries through a restart of the server, and one for blocking reads, which does
not. redis-py 8 would otherwise turn a blocking read on an empty stream into ten time-outs of 5 s.

A server that is out of memory or read-only refuses writes. Services wait for it: the work they hold goes nowhere else.
The gateway does not: it tells its caller what is wrong. What steers jobs (records, leases, heartbeats, history) is
small and bounded, and is written beyond `maxmemory` too: a job can say what it waits for, and can be cancelled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import BusyLoadingError, MasterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from stillhouse.core.metrics import REDIS_ERRORS

BLOCK_MS = 1000
"""Longest blocking read: short, so that a worker notices SIGTERM, a new lease or a new stream within a second."""
COMMAND_TIMEOUT_S = 5.0
"""A command that takes longer means a dead server or network: all of ours take milliseconds."""
CONNECTIONS = 64
"""Commands of one process under way at once; more wait their turn, where the library's own pool would refuse them."""
RETRIES = 12
"""Retries of a command, with back-off up to 1 s: about 10 s, long enough for a restart. All our scripts may repeat."""
PASSING: Final = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, MasterDownError, TryAgainError)
"""What a server that is restarting or failing over answers."""
_KINDS: Final[dict[str, type[Exception]]] = {
    "loading": BusyLoadingError,
    "timeout": RedisTimeoutError,
    "connection": RedisConnectionError,
    "full": OutOfMemoryError,
    "readonly": ReadOnlyError,
}
"""Label of the metric -> error; the first that fits, since the server's busy answer is a connection error, too."""
_COUNTED: Final = (
    RedisConnectionError,
    RedisTimeoutError,
    MasterDownError,
    TryAgainError,
    OutOfMemoryError,
    ReadOnlyError,
)
"""What says that the server is in trouble; other answers are about our commands (a stream that is gone)."""
REFUSALS: Final = (OutOfMemoryError, ReadOnlyError)
"""Nothing was written, and somebody may have to change the server's settings."""
BEYOND_MAXMEMORY: Final = "redis.call('UNLINK', 'sh:none')\n"
"""First line of scripts that a full server must not refuse: it refuses only the first write, and never one that frees
(what the flag `allow-oom` of Redis 7 does, for servers in tests that do not know the flag)."""


class _CountingRetry(Retry):
    """Counts every failed attempt, also those that the next one makes good."""

    async def call_with_retry(self, do: Callable[[], Awaitable[Any]], *args: Any, **options: Any) -> Any:
        async def counted() -> Any:
            try:
                return await do()
            except _COUNTED as error:
                REDIS_ERRORS.labels(_kind(error)).inc()
                raise

        return await super().call_with_retry(counted, *args, **options)


def _kind(error: Exception) -> str:
    return next((kind for kind, cls in _KINDS.items() if isinstance(error, cls)), "other")


def connect(url: str, *, waits_for_room: bool = True) -> Redis:
    """A client for commands; `waits_for_room`: what a full or read-only server refuses is tried again for a while."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=COMMAND_TIMEOUT_S,
        socket_timeout=COMMAND_TIMEOUT_S,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        retry=_CountingRetry(ExponentialBackoff(cap=1.0, base=0.05), RETRIES),
        retry_on_error=[*PASSING, *(REFUSALS if waits_for_room else ())],
        health_check_interval=30,
    )
    return Redis.from_pool(pool)


def connect_blocking(url: str) -> Redis:
    """A client for blocking reads of at most BLOCK_MS."""
    return Redis.from_url(
        url,
        socket_timeout=BLOCK_MS / 1000 + 10,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        retry=_CountingRetry(NoBackoff(), 0),
    )


def text(value: Any) -> str:
    """What the server answers, as text."""
    return value.decode() if isinstance(value, bytes) else str(value)

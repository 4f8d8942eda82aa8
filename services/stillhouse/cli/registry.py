"""A look into the service registry of a local deployment, without patience: a dead queue server means an empty list."""

from __future__ import annotations

import os

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from stillhouse.cli.deployment import Deployment
from stillhouse.core.config import load_settings
from stillhouse.core.queue.registry import Registry, ServiceInfo

LOOK_TIMEOUT_S = 2.0
"""A local server answers in a millisecond."""


async def live_services(deployment: Deployment) -> list[ServiceInfo]:
    """Services that announced themselves in the last seconds; [] if the queue server does not answer."""
    port = deployment.read_state().get("valkey_port")
    if port is None:
        return []
    settings = load_settings({**os.environ, **deployment.environment(port)})
    redis = Redis.from_url(
        settings.redis_url,
        socket_timeout=LOOK_TIMEOUT_S,
        socket_connect_timeout=LOOK_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        return await Registry(redis).services()
    except (RedisError, OSError):
        return []
    finally:
        await redis.aclose()

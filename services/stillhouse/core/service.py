"""The frame that sampler, teacher and trainer share: connections, heartbeat, signals, exit codes.

A service is a gRPC server plus one worker loop in one event loop. SIGTERM or SIGINT sets `stop`; the worker hands work
back and returns; the process exits 0. Anything else that ends the worker is a crash: logged with traceback, exit 1.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from stillhouse.core import metrics, telemetry, tracing
from stillhouse.core.blobs import Artifacts
from stillhouse.core.checkpoints import Models
from stillhouse.core.config import Settings, load_settings
from stillhouse.core.errors import DeadlineError, StillhouseError, UnavailableError
from stillhouse.core.failpoints import install_from_environment
from stillhouse.core.launch import Launch
from stillhouse.core.parent import die_with_parent
from stillhouse.core.pulse import Pulse
from stillhouse.core.queue.client import connect, connect_blocking
from stillhouse.core.queue.jobs import JobStore
from stillhouse.core.queue.registry import HEARTBEAT_S, Registry, ServiceInfo
from stillhouse.core.queue.streams import WorkQueue
from stillhouse.core.rpc import Peers, Server
from stillhouse.core.tasks import cancel_all

VERSION: Final = version("stillhouse")
SERVER_GRACE_S: Final = 2.0
"""Time that running calls have to end when a service stops."""
REDIS_WAIT_S: Final = 60.0
"""How long a starting service waits for the queue server: they are often started together."""


@dataclass
class Context:
    """What every service has at hand. Made once per process by `open_context`."""

    settings: Settings
    role: str
    instance: str
    redis: Redis
    blocking: Redis
    queue: WorkQueue
    jobs: JobStore
    registry: Registry
    peers: Peers
    models: Models
    artifacts: Artifacts
    log: Any
    pulse: Pulse = field(default_factory=Pulse)
    """Progress of the compute thread."""
    transfer: Pulse = field(default_factory=Pulse)
    """Progress of the weights that a sampler fetches."""
    problem: str = ""
    """Why it cannot do what it was asked for, for the heartbeat; empty if it can."""
    loaded: Callable[[], Iterable[str]] = lambda: ()
    """Names of the models in memory, for the heartbeat."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by SIGTERM: take no new work, hand back what is held."""

    async def close(self) -> None:
        """Close channels and connections."""
        await self.peers.close()
        await self.redis.aclose()
        await self.blocking.aclose()


class App(Protocol):
    """A service: what it serves and what it does."""

    def register(self, server: Server) -> None:
        """Add the gRPC service to the server."""
        ...

    async def run(self) -> None:
        """Work until `Context.stop` is set; hand back what is held, then return."""
        ...

    def state(self) -> tuple[str, str]:
        """(what it is doing in a word, job id) for the heartbeat."""
        ...


def open_context(settings: Settings, role: str, log: Any, *, instance: str = "") -> Context:
    """Connections of a process. Leaves first, no globals."""
    # a request must not wait for room on the queue server, a worker with results in its hands must
    redis = connect(settings.redis_url, waits_for_room=role != "gateway")
    blocking = connect_blocking(settings.redis_url)
    artifacts = Artifacts(settings.artifacts_dir())
    return Context(
        settings=settings,
        role=role,
        instance=instance or settings.instance or f"{role}-{secrets.token_hex(3)}",
        redis=redis,
        blocking=blocking,
        queue=WorkQueue(redis, blocking),
        jobs=JobStore(redis, artifacts),
        registry=Registry(redis),
        peers=Peers(settings),
        models=Models(settings.models_path(), artifacts),
        artifacts=artifacts,
        log=log,
    )


def main(role: str, build: Callable[[Context], App]) -> None:
    """Entry of a service process: settings, logging, run, exit code."""
    try:
        settings = load_settings()
        instance = settings.instance or f"{role}-{secrets.token_hex(3)}"
        log = telemetry.setup_logging(settings, role, instance)
    except StillhouseError as error:
        sys.exit(f"stillhouse {role}: {error.message}")
    if Launch.read().is_by_torchrun:  # it passes on every request to stop; only its sudden death leaves us behind
        die_with_parent(signal.SIGKILL)
    elif settings.supervised:
        die_with_parent()
    install_from_environment(role, log)
    tracing.start(role, instance, log)
    try:
        asyncio.run(_run_process(settings, role, instance, log, build))
        return
    except StillhouseError as error:
        log.error("service failed", error=error.message, code=error.code)
    except Exception:  # the one place of the process that catches everything
        log.exception("service crashed")
    tracing.stop()
    telemetry.flush_logs()
    os._exit(1)  # not sys.exit: that waits for the compute thread, which may never end


async def _run_process(settings: Settings, role: str, instance: str, log: Any, build: Callable[[Context], App]) -> None:
    ctx = open_context(settings, role, log, instance=instance)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ctx.stop.set)
    try:
        await serve(ctx, build)
    finally:
        await ctx.close()


async def serve(ctx: Context, build: Callable[[Context], App]) -> None:
    """Run a service until `ctx.stop` is set and its worker has handed everything back.

    Raises:
        DeadlineError: the worker did not end within `drain_s` of the stop, or its compute thread is hung.
    """
    await wait_for_redis(ctx.redis)
    app = build(ctx)
    server = Server(ctx.settings)
    app.register(server)
    address = await server.start()
    metrics_address = metrics.serve_metrics(ctx.settings, ctx.role)
    metrics.BUILD_INFO.labels(ctx.role, VERSION).set(1)
    await server.set_ready(True)
    if telemetry.job_logs is not None:
        telemetry.job_logs.current = lambda: app.state()[1]
    ctx.log.info("ready", address=address, metrics=metrics_address, pid=os.getpid())
    tasks = [
        asyncio.create_task(heartbeat_forever(ctx, app.state, address, metrics_address), name="heartbeat"),
        asyncio.create_task(app.run(), name="worker"),
        asyncio.create_task(_drain_guard(ctx), name="drain"),
        asyncio.create_task(ctx.pulse.watch(f"{ctx.role} '{ctx.instance}'", ctx.settings.hang_s), name="pulse"),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what ended it
    finally:
        await cancel_all(tasks)
        await server.stop(grace_s=SERVER_GRACE_S)
        await ctx.registry.leave(ctx.role, ctx.instance)
    ctx.log.info("stopped")


async def _drain_guard(ctx: Context) -> None:
    await ctx.stop.wait()
    await asyncio.sleep(ctx.settings.drain_s)
    raise DeadlineError(f"{ctx.role} did not hand its work back within drain_s {ctx.settings.drain_s:g} s of the stop")


async def wait_for_redis(redis: Redis, timeout_s: float = REDIS_WAIT_S) -> None:
    """Wait until the queue server answers.

    Raises:
        UnavailableError: it did not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await redis.ping()
            return
        except (RedisError, OSError) as error:
            if time.monotonic() > deadline:
                raise UnavailableError(f"the queue server did not answer within {timeout_s:g} s: {error}") from None
            await asyncio.sleep(0.2)


async def heartbeat_forever(
    ctx: Context, state_of: Callable[[], tuple[str, str]], address: str, metrics_address: str
) -> None:
    """Announce this process in the registry every HEARTBEAT_S; `state_of` gives (what it does in a word, job id)."""
    started_at = time.time()
    while True:
        state, job_id = state_of()
        info = ServiceInfo(
            role=ctx.role,
            instance=ctx.instance,
            address=address,
            pid=Launch.read().pid(),
            started_at=started_at,
            seen_at=0.0,
            version=VERSION,
            metrics_address=metrics_address,
            state=state,
            job_id=job_id,
            extra={
                "threads": str(ctx.settings.threads),
                "engine": ctx.settings.engine,
                "max_length": str(ctx.settings.vllm_max_length if ctx.settings.engine == "vllm" else 0),
                "silent_s": f"{ctx.pulse.silent_s():.1f}",
                "transfer_silent_s": f"{ctx.transfer.silent_s():.1f}",
                "problem": ctx.problem,
                "models": " ".join(sorted(set(ctx.loaded()))),
                "draining": "yes" if ctx.stop.is_set() else "",
            },
        )
        try:
            await ctx.registry.beat(info)
        except (RedisError, OSError) as error:
            # the queue server may restart; the worker decides whether it can go on
            ctx.log.warning("heartbeat failed", error=str(error))
        await asyncio.sleep(HEARTBEAT_S)

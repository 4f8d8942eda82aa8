"""The gateway process: `python -m stillhouse.gateway`. REST server, heartbeat and sweeper in one event loop.

SIGTERM: take no new connections, end event streams, finish what runs, leave the registry, exit 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from redis.exceptions import RedisError

from stillhouse.core import metrics, telemetry, tracing
from stillhouse.core.config import Settings, load_settings
from stillhouse.core.errors import ConfigError, StillhouseError
from stillhouse.core.failpoints import install_from_environment
from stillhouse.core.service import VERSION, Context, die_with_parent, heartbeat_forever, open_context
from stillhouse.gateway.app import create_app
from stillhouse.gateway.sweeper import Sweeper

DEFAULT_PORT: Final = 8470
ROLE: Final = "gateway"
BACKLOG: Final = 2048
"""Connections waiting to be accepted."""
LEAVE_TIMEOUT_S: Final = 2.0
"""Time to give back leases and to leave the registry; both expire by themselves."""
MAX_HEADER_BYTES: Final = 16 << 10
"""Request line and headers together."""


class Server(uvicorn.Server):
    """uvicorn with our signal handling: its own would end the process by the signal instead of with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


def main() -> None:
    """Settings, logging, run, exit code."""
    try:
        settings = load_settings()
        instance = settings.instance or f"{ROLE}-{secrets.token_hex(3)}"
        log = telemetry.setup_logging(settings, ROLE, instance)
        listener = listen(settings.host, settings.port or DEFAULT_PORT)
    except StillhouseError as error:
        sys.exit(f"stillhouse {ROLE}: {error.message}")
    if settings.supervised:
        die_with_parent()
    install_from_environment(ROLE, log)
    tracing.start(ROLE, instance, log)
    gc.freeze()  # what is loaded by now stays: going through it again and again would hold up requests for 0.1 s
    try:
        asyncio.run(serve(settings, instance, log, listener))
    except Exception:  # the one place of the process that catches everything
        log.exception("service crashed")
        sys.exit(1)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ConfigError: the address cannot be used; says why and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named; with it an answer in two writes comes 40 ms late
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use by another process; stop it or set STILLHOUSE_PORT to another port"
            ) from None
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; check STILLHOUSE_HOST") from None
    listener.setblocking(False)
    return listener


async def serve(settings: Settings, instance: str, log: Any, listener: socket.socket) -> None:
    """Run until a signal comes or a part of the process dies."""
    ctx = open_context(settings, ROLE, log, instance=instance)
    ctx.artifacts.root.mkdir(parents=True, exist_ok=True)
    server = build_server(ctx, settings)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        ctx.stop.set()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    address = f"{settings.advertise_host or settings.host}:{listener.getsockname()[1]}"
    metrics.BUILD_INFO.labels(ROLE, VERSION).set(1)
    if settings.auth == "none":
        log.warning("authentication is off: whoever reaches this port may use it")
    log.info("ready", address=address)
    tasks = [
        asyncio.create_task(server.serve(sockets=[listener]), name="server"),
        asyncio.create_task(heartbeat_forever(ctx, lambda: ("ready", ""), address, address), name="heartbeat"),
        asyncio.create_task(Sweeper(ctx).run(), name="sweeper"),
    ]
    try:
        await run_until_done(ctx, tasks)
    finally:
        with contextlib.suppress(RedisError, OSError):  # it expires by itself if the queue server is gone
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await ctx.registry.leave(ROLE, instance)
        await ctx.close()
    log.info("stopped")


def build_server(ctx: Context, settings: Settings) -> Server:
    """The REST server around the application."""
    return Server(
        uvicorn.Config(
            create_app(ctx, settings),
            log_config=None,  # structlog has the root logger
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, int(settings.drain_s)),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
    )


async def run_until_done(ctx: Context, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for the server to end; a background task that ends before it was asked to brings its error up."""
    server = tasks[0]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await server
    finally:
        ctx.stop.set()
        for task in tasks:
            if task.get_name() != "sweeper":  # it ends by itself, giving its lease back
                task.cancel()
        await asyncio.wait(tasks, timeout=LEAVE_TIMEOUT_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    main()

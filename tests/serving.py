"""The gateway's application on a socket of this process, for clients that block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from stillhouse.core.service import Context
from stillhouse.gateway.app import create_app
from tests.waiting import wait_until


@asynccontextmanager
async def serving(ctx: Context) -> AsyncIterator[str]:
    """Gives the address. At the end `ctx.stop` is set: streams end, as at a gateway's shutdown."""
    app = create_app(ctx, ctx.settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    try:
        await wait_until(lambda: server.started or task.done(), timeout_s=20, what="uvicorn")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        ctx.stop.set()
        server.should_exit = True
        await task

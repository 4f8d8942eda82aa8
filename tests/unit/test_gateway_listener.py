"""The gateway's listener."""

from __future__ import annotations

import asyncio
import socket

from stillhouse.gateway.__main__ import listen


async def test_answers_in_two_writes_do_not_wait_for_an_ack() -> None:
    """Nagle's delay is off on what the listener accepts."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            taken = transport.get_extra_info("socket")
            accepted.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    listener = listen("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(Server, sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        writer.close()
        assert await asyncio.wait_for(accepted, 5) != 0

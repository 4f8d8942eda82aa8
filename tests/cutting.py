"""A network that breaks: a TCP proxy that cuts connections after some bytes of the answers."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

Budget = Callable[[], float]
"""Bytes of answers that the next connection lives to see."""


class Proxy:
    """Forwards to a server on this machine."""

    def __init__(self, target: str, budget: Budget) -> None:
        place = urlsplit(target)
        self._target = (place.hostname or "", place.port or 0)
        self._budget = budget
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        """Connections that were cut."""
        self.bytes = 0
        """Bytes of answers that came through."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            left = self._budget()
            while block := _receive(server):
                piece = block[: int(min(left, len(block)))]
                left -= len(block)
                self.bytes += len(piece)
                try:
                    client.sendall(piece)
                except OSError:
                    break
                if left <= 0:
                    self.cuts += 1
                    # a reset in place of an end: what a died proxy or a pulled cable looks like
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
            for one in (client, server):
                _shut(one)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while block := _receive(source):
            sink.sendall(block)
    except OSError:
        pass
    _shut(sink)


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 14)
    except OSError:
        return b""


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


def at_random(seed: int, most: int) -> Budget:
    """Anything up to `most` bytes, evenly."""
    draw = random.Random(seed)
    return lambda: draw.randint(0, most)


@contextmanager
def cutting(target: str, budget: Budget) -> Iterator[Proxy]:
    """A proxy before `target`."""
    proxy = Proxy(target, budget)
    try:
        yield proxy
    finally:
        proxy.close()

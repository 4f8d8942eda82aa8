"""Machines for tests: network namespaces on a bridge, each with an address of its own. Needs root and iproute2.

    this machine  10.77.X.254  --- bridge ---  host 0  10.77.X.1
                                         \\---  host 1  10.77.X.2

A process in a namespace has no loopback and no other way out: what reaches another host does so by its address.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Host:
    """A machine."""

    address: str
    prefix: tuple[str, ...] = ()
    """Before a command that is to run there."""
    namespace: str = ""

    def cut(self, *, off: bool) -> None:
        """Pull its cable, or put it back: nothing is told to either side."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down" if off else "up")


@contextmanager
def hosts(number: int) -> Iterator[tuple[Host, list[Host]]]:
    """This machine as the others see it, and so many others."""
    net, tag = f"10.77.{os.getpid() % 250}", f"{os.getpid() % 10**6}"
    bridge, names = f"shb{tag}", [f"sh{tag}-{index}" for index in range(number)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        others = [Host(f"{net}.{n + 1}", ("ip", "netns", "exec", name), name) for n, name in enumerate(names)]
        for index, host in enumerate(others):
            outer = f"shv{tag}{index}"
            _ip("netns", "add", host.namespace)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield Host(f"{net}.254"), others
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)  # its end of the cable goes with it, and so the other end
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20, capture_output=True)

"""Machines for tests: network namespaces on a bridge, each with an address of its own. Needs root and iproute2.

    this machine  10.77.X.254  --- switch ---  host 0  10.77.X.1
                                         \\---  host 1  10.77.X.2

The switch is a namespace, too: in this machine's own, Docker's rules would drop what passes between the hosts.
A process in a namespace has a loopback of its own and no other way out: what reaches another host does so by address.
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
    net, tag = f"10.77.{os.getpid() % 250}", f"sh{os.getpid()}"
    switch, outer = f"{tag}-switch", f"{tag}here"
    others = [Host(f"{net}.{n + 1}", ("ip", "netns", "exec", f"{tag}-{n}"), f"{tag}-{n}") for n in range(number)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        _ip("link", "add", outer, "type", "veth", "peer", "name", "here", "netns", switch)
        _ip("-n", switch, "link", "set", "here", "master", "bridge", "up")
        _ip("addr", "add", f"{net}.254/24", "dev", outer)
        _ip("link", "set", outer, "up")
        for host in others:
            cable = ("link", "add", host.namespace, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("netns", "add", host.namespace)
            _ip("-n", switch, *cable)
            _ip("-n", switch, "link", "set", host.namespace, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield Host(f"{net}.254"), others
    finally:
        for name in (switch, *(host.namespace for host in others)):  # all cables go with the switch
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20, capture_output=True)

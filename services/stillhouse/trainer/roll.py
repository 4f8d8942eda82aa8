"""The nodes of one trainer find each other on the queue server: no node needs to know another's address.

    every node    writes its line once a second: its start (a random name), address, state, a count that goes up
    node 0        once all of them wait: writes the roll, the starts that belong together
    every node    starts its ranks when the roll has its own start, and ends when a start of the roll is over

Alive is what was seen to change: clocks of different machines are not compared, and what is left of an earlier start
does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

from stillhouse.core.queue import keys
from stillhouse.core.queue.client import BEYOND_MAXMEMORY, text

KEPT_MS: Final = 24 * 3600 * 1000
"""How long the lines of nodes that are gone are kept: they say where a missing one was seen last."""

# KEYS nodes; ARGV kept_ms, field, value, ... Gives all lines.
_SAY = f"""{BEYOND_MAXMEMORY}
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('HGETALL', KEYS[1])
"""

State = Literal["waiting", "running", "leaving", "left"]


class Node(BaseModel):
    """The line of a node."""

    model_config = ConfigDict(frozen=True)

    start: str
    """Random name of this start of the node's process."""
    address: str
    state: State = "waiting"
    """waiting = for the others; running = its ranks; leaving = was asked to stop; left = has ended."""
    beat: int = 0
    reason: str = ""
    """Why it left."""


class Roll(BaseModel):
    """Starts of all nodes that belong together, written by node 0."""

    model_config = ConfigDict(frozen=True)

    id: str
    starts: tuple[str, ...]
    address: str
    """Of node 0: the ranks meet there."""


class Board:
    """Where the nodes of a trainer write."""

    def __init__(self, redis: Redis, group: str) -> None:
        self._key = keys.nodes(group)
        self._say = redis.register_script(_SAY)

    async def say(self, number: int, node: Node, roll: Roll | None = None) -> tuple[dict[int, Node], Roll | None]:
        """Write the line of a node, and the roll if there is a new one; gives the lines of all nodes and the roll."""
        lines = {str(number): node, **({} if roll is None else {"roll": roll})}
        flat = [part for name, line in lines.items() for part in (name, line.model_dump_json())]
        answer: Any = await self._say(keys=[self._key], args=[KEPT_MS, *flat])
        found = {text(name): text(line) for name, line in zip(answer[::2], answer[1::2], strict=True)}
        written = found.pop("roll", None)
        nodes = {int(name): Node.model_validate_json(line) for name, line in found.items()}
        return nodes, None if written is None else Roll.model_validate_json(written)


class Others:
    """What one node knows of all nodes, from looks at the board."""

    def __init__(self, size: int, lost_s: float) -> None:
        self._size = size
        self._lost_s = lost_s
        self._seen: dict[int, Node] = {}
        self._changed_at: dict[int, float] = {}
        """When a node's line last changed; none before it was seen to."""
        self._looked_at = 0.0

    def look(self, found: Mapping[int, Node], now: float) -> None:
        """Take in what the board says; `now` in seconds of this node's own clock."""
        if now - self._looked_at > self._lost_s / 2:  # we saw nothing for a while: that says nothing about the others
            self._changed_at = dict.fromkeys(self._changed_at, now)
        self._looked_at = now
        for number, node in found.items():
            if (known := self._seen.get(number)) is not None and node != known:
                self._changed_at[number] = now
        self._seen = dict(found)

    def missing(self) -> list[str]:
        """The nodes that are not there or not ready, each with what is known of it."""
        return [f"node {number} ({why})" for number in range(self._size) if (why := self._why_missing(number))]

    def begin(self) -> None:
        """All nodes of a roll start now: each has until `lost_s` from here to be seen."""
        self._changed_at = dict.fromkeys(range(self._size), self._looked_at)

    def over(self, roll: Roll) -> str:
        """The first node whose start in the roll is over, with what is known of it; empty if there is none."""
        for number, start in enumerate(roll.starts):
            node = self._seen.get(number)
            if node is None:
                continue  # the queue server lost its data: all write again
            if node.start != start:
                return f"node {number} ({node.address}, it was started again)"
            if node.state == "left" or not self._is_alive(number):
                return f"node {number} ({self._why_missing(number)})"
        return ""

    def leaving(self) -> str:
        """A node that was asked to stop; empty if there is none."""
        return next((f"node {number}" for number, node in self._seen.items() if node.state == "leaving"), "")

    def roll(self, roll_id: str) -> Roll:
        """All nodes as they are now."""
        nodes = [self._seen[number] for number in range(self._size)]
        return Roll(id=roll_id, starts=tuple(node.start for node in nodes), address=nodes[0].address)

    def _is_alive(self, number: int) -> bool:
        changed_at = self._changed_at.get(number)
        return changed_at is not None and self._looked_at - changed_at <= self._lost_s

    def _why_missing(self, number: int) -> str:
        node = self._seen.get(number)
        if node is None:
            return "never seen"
        if node.state == "left":
            return f"{node.address}, left{': ' if node.reason else ''}{node.reason}"
        if not self._is_alive(number):
            changed_at = self._changed_at.get(number)
            silent = "" if changed_at is None else f" for {self._looked_at - changed_at:.0f} s"
            return f"{node.address}, no sign of life{silent}"
        return "" if node.state == "waiting" else f"{node.address}, its ranks of an earlier start have not ended"

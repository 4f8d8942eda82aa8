"""The process of a node, of a trainer on several: waits for the others, runs this node's ranks, ends with the others.

    waiting    all nodes are there and none runs yet     -> node 0 writes the roll (roll.py), each starts torchrun
    running    a rank dies, or another node is over      -> torchrun is ended, exit code 1: to be started again
               this node or another is asked to stop     -> rank 0 commits with the help of all, then all end

torchrun knows its own ranks only, and a connection to a machine that lost its power stays open for ever: so each node
looks at the others here. It starts nothing again: Kubernetes, systemd or a person does, and all meet anew.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import signal
import socket
import struct
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from redis.exceptions import RedisError

from stillhouse.core import telemetry
from stillhouse.core.blobs import read_json, write_json
from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError, DeadlineError, NotFoundError, StillhouseError, UnavailableError
from stillhouse.core.launch import node_number, ranks_per_node, torchrun
from stillhouse.core.parent import die_with_parent
from stillhouse.core.queue.client import connect_blocking
from stillhouse.core.worker import pause
from stillhouse.trainer.roll import Board, Node, Others, Roll

BEAT_S: Final = 1.0
"""Time between a node's lines."""
SAY_S: Final = 15.0
"""Time between messages about nodes that are missing."""
MEET_S: Final = 600.0
"""How long a node waits for the others before it ends, to be started again."""
SHARED_S: Final = 60.0
"""How long a file that another node wrote may take to be seen here: NFS remembers for so long that there was none."""
END_S: Final = 3.0
"""Time that ranks have to end by themselves when another node is over, for the sake of what they log."""
DRAIN_EXTRA_S: Final = 10.0
"""Beyond `drain_s`: torchrun's own end, and a beat of every node."""
_SIOCGIFADDR: Final = 0x8915


class NodeProcess:
    """One node."""

    def __init__(self, settings: Settings, number: int, board: Board, log: Any) -> None:
        self._settings = settings
        self._number = number
        self._board = board
        self._log = log
        self._ranks = ranks_per_node(settings)
        self._others = Others(settings.trainer_nodes, settings.lease_s)
        self._node = Node(start=secrets.token_hex(8), address=settings.advertise_host)
        self._file = settings.artifacts_dir() / f"nodes-{settings.trainer_group}.json"
        self.stop = asyncio.Event()
        """Set by SIGTERM."""

    async def run(self) -> None:
        """Wait for the others, run the ranks, and tell the others how it ended.

        consumes:     the lines of the other nodes
        waits for:    all of them, MEET_S at most; then its ranks
        produces:     a line per BEAT_S, and ranks
        unblocked by: the last node, the end of any node, or SIGTERM

        Raises:
            DeadlineError: nodes are missing.
            UnavailableError: the ranks or another node ended.
        """
        reason = ""
        try:
            if (roll := await self._meet()) is not None and (reason := await self._run_ranks(roll)):
                raise UnavailableError(f"this node ends, to be started again: {reason}")
        except StillhouseError as error:
            reason = reason or error.message
            raise
        finally:
            with suppress(RedisError, OSError):
                await self._say("left", reason=reason)

    async def _say(self, state: str, roll: Roll | None = None, reason: str = "") -> Roll | None:
        """Write this node's line and look at the others; gives the roll."""
        self._node = self._node.model_copy(update={"state": state, "beat": self._node.beat + 1, "reason": reason})
        self._show(state)
        found, written = await self._board.say(self._number, self._node, roll)
        self._others.look(found, time.monotonic())
        return written

    def _show(self, state: str) -> None:
        """A file for probes: its time says that this process lives, its content what it does."""
        path = self._settings.home / "run" / "node"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_text(f"{state}\n")
            path.with_suffix(".new").rename(path)
        except OSError as error:
            self._log.warning("cannot write the file for probes", path=str(path), error=str(error))

    async def _try_to_say(self, state: str) -> Roll | None:
        try:
            return await self._say(state)
        except (RedisError, OSError) as error:
            self._log.warning("queue server does not answer", error=str(error))
            return None

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def _meet(self) -> Roll | None:
        """The roll, once all nodes are there; none if this node is asked to stop before."""
        deadline, say_at = time.monotonic() + MEET_S, time.monotonic() + 3 * BEAT_S
        while True:
            roll = await self._try_to_say("waiting")
            if self._number == 0 and not (missing := self._others.missing()):
                return await self._call_the_roll()
            if self._number > 0 and roll is not None and self._node.start in roll.starts:
                return await self._join(roll)
            missing = ", ".join(self._others.missing()) or "node 0 to begin"
            now = time.monotonic()
            if now > deadline:
                raise DeadlineError(f"waited {MEET_S:g} s for {missing}; start these nodes, and all meet again")
            if now > say_at:
                self._log.warning("waiting for the other nodes", missing=missing)
                say_at = now + SAY_S
            if await pause(self.stop, BEAT_S):
                return None

    async def _call_the_roll(self) -> Roll:
        roll = self._others.roll(secrets.token_hex(8))
        write_json(self._file, {"roll": roll.id})
        await self._say("running", roll)
        return roll

    async def _join(self, roll: Roll) -> Roll:
        """Make sure that this node sees the files of node 0: checkpoints are written by all."""
        deadline = time.monotonic() + SHARED_S
        while self._seen_in_artifacts() != roll.id:
            if time.monotonic() > deadline or self.stop.is_set():
                raise ConfigError(
                    f"node {self._number} does not see in {self._file} what node 0 ({roll.address}) wrote there; all "
                    "nodes of a trainer need the same folder of artifacts, shared between them",
                    param="artifacts",
                )
            await self._try_to_say("running")
            await pause(self.stop, BEAT_S)
        return roll

    def _seen_in_artifacts(self) -> str:
        try:
            return read_json(self._file)["roll"]
        except NotFoundError:
            return ""

    # -- running ------------------------------------------------------------------------------------------------------

    async def _run_ranks(self, roll: Roll) -> str:
        """Gives why they ended; empty if this node was asked to stop."""
        self._others.begin()
        ranks = await self._start(roll)
        self._log.info("all nodes are there; ranks start", pid=ranks.pid, roll=roll.id, ranks=self._ranks)
        try:
            why = await self._watch(roll, ranks)
        finally:
            if ranks.returncode is None:
                ranks.kill()  # its ranks ask Linux to die with it
            code = await ranks.wait()
        return "" if self.stop.is_set() else why or f"its ranks ended with code {code}"

    async def _start(self, roll: Roll) -> Process:
        options = (
            f"--nnodes={len(roll.starts)}",
            f"--node-rank={self._number}",
            f"--master-addr={roll.address}",
            f"--master-port={self._settings.trainer_port}",
            f"--rdzv-id={roll.id}",
            f"--local-addr={self._node.address}",
        )
        command = torchrun(self._ranks, self._settings.drain_s, *options)
        environ = {**socket_interfaces(self._node.address), **os.environ}
        dies = partial(die_with_parent, signal.SIGKILL)
        return await asyncio.create_subprocess_exec(*command, env=environ, preexec_fn=dies)

    async def _watch(self, roll: Roll, ranks: Process) -> str:
        """Until the ranks have ended or have to be; gives why, if that is not their own doing."""
        state, why, deadline = "running", "", float("inf")
        ended = asyncio.ensure_future(ranks.wait())
        while not ended.done() and time.monotonic() < deadline:
            await self._try_to_say("leaving" if self.stop.is_set() else "running")
            leaving = self._others.leaving() or (f"node {self._number}" if self.stop.is_set() else "")
            if leaving and state == "running":
                state, why = "leaving", f"{leaving} was asked to stop"
                deadline = time.monotonic() + self._settings.drain_s + DRAIN_EXTRA_S
                self._log.info("the ranks drain", reason=why)
                if self._number == 0:
                    ranks.terminate()  # rank 0 commits with the help of the others, then lets them go
            if state != "over" and (over := self._others.over(roll)):
                state, why = "over", f"without {over}" if state == "running" else why
                deadline = min(deadline, time.monotonic() + END_S)
                self._log.warning("another node is over; the ranks of this one end", node=over)
            await asyncio.wait({ended}, timeout=BEAT_S)
        return why


def socket_interfaces(address: str) -> dict[str, str]:
    """What tells gloo and NCCL to take the network interface that has this address; nothing if none is found."""
    try:
        wanted = socket.gethostbyname(address)
    except OSError:
        return {}
    name = next((name for _, name in socket.if_nameindex() if _address_of(name) == wanted), "")
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def _address_of(interface: str) -> str:
    """Its IPv4 address; empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def main(settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
    """Entry of the process."""
    try:
        number = node_number(settings, environ, socket.gethostname())
        log = telemetry.setup_logging(settings, "trainer", f"{settings.instance or 'trainer'}/node-{number}")
        asyncio.run(_run(settings, number, log))
    except StillhouseError as error:
        telemetry.flush_logs()
        sys.exit(f"stillhouse trainer: {error.message}")


async def _run(settings: Settings, number: int, log: Any) -> None:
    redis = connect_blocking(settings.redis_url)  # no retries: the next line is one
    try:
        node = NodeProcess(settings, number, Board(redis, settings.trainer_group), log)
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, node.stop.set)
        log.info("node of a trainer", number=number, nodes=settings.trainer_nodes, address=settings.advertise_host)
        await node.run()
    finally:
        await redis.aclose()

"""A trainer on several nodes: how a node knows its number, how they find each other, what they say of each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog

from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError, StillhouseError
from stillhouse.core.launch import node_number, ranks_per_node
from stillhouse.core.queue.client import connect
from stillhouse.trainer import node as node_module
from stillhouse.trainer.node import NodeProcess, socket_interfaces
from stillhouse.trainer.roll import Board, Node, Others, Roll
from tests.waiting import wait_until

LOST_S = 10.0


@pytest.mark.parametrize(
    ("setting", "environ", "host", "number"),
    [
        (None, {"JOB_COMPLETION_INDEX": "1"}, "run-trainer-0-2-x7k9q", 1),
        (None, {}, "trainer-2", 2),
        (None, {}, "gpu01.example.org", 1),
        (0, {"JOB_COMPLETION_INDEX": "1"}, "trainer-2", 0),
    ],
)
def test_a_node_knows_its_number(setting: int | None, environ: dict[str, str], host: str, number: int) -> None:
    assert node_number(Settings(trainer_nodes=3, trainer_node=setting), environ, host) == number


@pytest.mark.parametrize(
    ("environ", "host", "said"),
    [
        ({}, "big-machine", "host name 'big-machine' does not end in a number; set STILLHOUSE_TRAINER_NODE"),
        ({"JOB_COMPLETION_INDEX": "3"}, "x", "JOB_COMPLETION_INDEX says that this is node 3.*nodes are 0 to 2"),
        ({}, "trainer-7", "host name 'trainer-7' says that this is node 7"),
    ],
)
def test_a_number_that_cannot_be_is_refused(environ: dict[str, str], host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        node_number(Settings(trainer_nodes=3), environ, host)


def test_ranks_are_shared_out_evenly() -> None:
    assert ranks_per_node(Settings(trainer_ranks=16, trainer_nodes=2)) == 8
    with pytest.raises(ConfigError, match="trainer_ranks is 3, and trainer_nodes 2"):
        ranks_per_node(Settings(trainer_ranks=3, trainer_nodes=2))


def test_the_interface_of_an_address_is_told_to_gloo_and_nccl() -> None:
    assert socket_interfaces("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert socket_interfaces("192.0.2.1") == {}, "not of this machine"


def seen(*nodes: Node, size: int = 2) -> Others:
    """After two looks, 1 s apart, between which every node wrote."""
    others = Others(size, LOST_S)
    others.look(dict(enumerate(nodes)), 100.0)
    others.look({n: node.model_copy(update={"beat": node.beat + 1}) for n, node in enumerate(nodes)}, 101.0)
    return others


A, B = Node(start="a", address="10.0.0.1"), Node(start="b", address="10.0.0.2")
ROLL = Roll(id="1", starts=("a", "b"), address="10.0.0.1")


def test_alive_is_what_was_seen_to_change() -> None:
    others = Others(3, LOST_S)
    others.look({0: A, 1: B}, 100.0)
    assert others.missing()[1:] == ["node 1 (10.0.0.2, no sign of life)", "node 2 (never seen)"], "may be an old line"
    others.look({0: A.model_copy(update={"beat": 1}), 1: B}, 101.0)
    assert [each.split()[1] for each in others.missing()] == ["1", "2"]
    assert seen(A, B).missing() == []
    assert seen(A, B).roll("1") == ROLL


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"state": "running"}, "node 1 (10.0.0.2, its ranks of an earlier start have not ended)"),
        ({"state": "left", "reason": "no disk"}, "node 1 (10.0.0.2, left: no disk)"),
    ],
)
def test_a_node_that_cannot_start_now_is_missing(update: dict[str, Any], said: str) -> None:
    assert seen(A, B.model_copy(update=update)).missing() == [said]


def test_a_start_of_the_roll_is_over_when_another_came_or_it_left_or_is_silent() -> None:
    others = seen(A, B)
    others.begin()
    assert others.over(ROLL) == ""
    again = B.model_copy(update={"start": "c"})
    assert seen(A, again).over(ROLL) == "node 1 (10.0.0.2, it was started again)"
    assert "left" in seen(A, B.model_copy(update={"state": "left"})).over(ROLL)
    for second in range(102, 120):
        others.look({0: A.model_copy(update={"beat": second}), 1: B}, float(second))
    assert others.over(ROLL) == "node 1 (10.0.0.2, no sign of life for 17 s)"


def test_who_saw_nothing_itself_says_nothing_about_the_others() -> None:
    """The queue server was away, or lost its data."""
    others = seen(A, B)
    others.look({0: A, 1: B}, 100.0 + 3 * LOST_S)
    assert others.over(ROLL) == ""
    others.look({0: A}, 101.0 + 3 * LOST_S)
    assert others.over(ROLL) == ""


# -- the process, with a script in place of torchrun -------------------------------------------------------------------

FOREVER = "while :; do sleep 0.05; done"
LEADS = "trap 'touch done; exit 0' TERM; " + FOREVER
"""Rank 0: asked to stop, it lets the others go."""
FOLLOWS = "trap '' TERM; while [ ! -e done ]; do sleep 0.05; done"


class Nodes:
    """Nodes in this process, with what they log."""

    def __init__(self, folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.logs = structlog.testing.LogCapture()
        monkeypatch.setattr(node_module, "BEAT_S", 0.05)
        monkeypatch.setattr(node_module, "END_S", 0.2)
        monkeypatch.setattr(node_module, "torchrun", self.torchrun)
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def torchrun(self, ranks: int, drain_s: float, *options: str) -> tuple[str, ...]:
        assert f"--master-addr={self.address(0)}" in options
        return ("/bin/sh", "-c", f"cd {self.folder}; {LEADS if '--node-rank=0' in options else FOLLOWS}")

    def address(self, number: int) -> str:
        return f"127.0.0.{number + 1}"

    def start(self, number: int, artifacts: str = "artifacts") -> NodeProcess:
        settings = Settings(
            home=self.folder / str(number),
            artifacts=self.folder / artifacts,
            trainer_nodes=2,
            trainer_ranks=2,
            lease_s=10,
            advertise_host=self.address(number),
        ).resolved()
        log = structlog.wrap_logger(None, processors=[self.logs])
        node = NodeProcess(settings, number, Board(connect(self.redis_url), "trainer"), log)
        self.tasks[number] = asyncio.create_task(node.run())
        return node

    def state(self, number: int) -> str:
        path = self.folder / str(number) / "run" / "node"
        return path.read_text().strip() if path.exists() else ""

    async def are(self, state: str) -> None:
        await wait_until(
            lambda: {self.state(number) for number in self.tasks} == {state}, timeout_s=40, what=f"nodes to be {state}"
        )

    async def ended(self, number: int) -> str:
        """Why a node ended; empty if it was asked to."""
        try:
            await asyncio.wait_for(self.tasks.pop(number), 40)
        except StillhouseError as error:
            return error.message
        return ""


@pytest.fixture
def nodes(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(tmp_path, redis_url, monkeypatch)


async def test_nodes_meet_in_any_order_and_drain_together(nodes: Nodes) -> None:
    follower = nodes.start(1)
    await nodes.are("waiting")
    nodes.start(0)
    await nodes.are("running")
    follower.stop.set()
    assert await nodes.ended(1) == ""
    assert await nodes.ended(0) == "this node ends, to be started again: node 1 was asked to stop"
    assert (nodes.folder / "done").exists(), "its rank was let go, not killed"


async def test_nodes_end_with_one_of_them_and_meet_again(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.start(1)
    await nodes.are("running")
    nodes.tasks.pop(1).cancel()
    nodes.start(1)  # maybe before node 0 has noticed anything
    assert "to be started again: without node 1 (127.0.0.2, " in await nodes.ended(0)
    await nodes.are("waiting")  # the roll of the earlier start is not taken for the new one
    nodes.start(0)
    await nodes.are("running")
    for task in nodes.tasks.values():
        task.cancel()
    await asyncio.gather(*nodes.tasks.values(), return_exceptions=True)


async def test_a_missing_node_is_named_and_the_wait_ends(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "MEET_S", 0.5)
    nodes.start(0)
    said = "waited 0.5 s for node 1 (never seen); start these nodes, and all meet again"
    assert await nodes.ended(0) == said


async def test_nodes_with_different_artifacts_are_refused(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "SHARED_S", 0.5)
    nodes.start(0)
    nodes.start(1, artifacts="elsewhere")
    said = "all nodes of a trainer need the same folder of artifacts"
    assert said in await nodes.ended(1)
    assert said in await nodes.ended(0), "node 0 says why node 1 left"

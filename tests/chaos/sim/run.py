"""One seed, from an empty folder to a verdict."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from stillhouse.core import blobs, failpoints, metrics, service
from stillhouse.gateway import gauges
from stillhouse.gateway import jobs as gateway_jobs
from stillhouse.trainer import app as trainer_app
from stillhouse.trainer import memory as trainer_memory
from stillhouse.trainer import preflight as trainer_preflight
from stillhouse.trainer import publish as trainer_publish
from stillhouse.trainer import retention
from stillhouse.trainer import tokens as trainer_tokens
from tests.chaos.sim.clock import Clock, SimLoop, virtual_time
from tests.chaos.sim.judge import judge
from tests.chaos.sim.process import PROCESS
from tests.chaos.sim.rpc import SimServer
from tests.chaos.sim.toys import ToyRenderer
from tests.chaos.sim.world import World

Plant = Callable[[World], AbstractContextManager[None]]
"""Puts a bug into the classes of a run."""


@dataclass
class Verdict:
    """What a run showed."""

    seed: int
    violations: list[str]
    trace: str
    """Hash of all events, in order."""
    facts: dict[str, Any] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def line(self) -> str:
        return json.dumps({"seed": self.seed, "trace": self.trace, **self.facts, "violations": self.violations})


def simulate(seed: int, plant: Plant | None = None, *, is_verbose: bool = False) -> Verdict:
    """Run one seed."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="stillhouse-sim-", dir=memory if memory.is_dir() else None)).resolve()
    clock, draw = Clock(), Random(f"run {seed}")
    started = time.perf_counter()
    was_collecting = gc.isenabled()
    gc.disable()  # async generators that a collection ends would end at another moment in every run
    try:
        with virtual_time(clock, draw) as loop, ExitStack() as stack:
            world = World(seed, root, clock, draw)
            world.is_verbose = is_verbose
            world.artifacts.root.mkdir()  # what the first gateway of a deployment does
            stack.enter_context(world.disk.installed())
            stack.enter_context(_in_place_of_heavy_parts(world))
            stack.enter_context(plant(world) if plant else nullcontext())
            _finish(loop, world)
            judge(world)
    finally:
        if was_collecting:
            gc.enable()
        shutil.rmtree(root, ignore_errors=True)
        blobs._unwritten.clear()
        retention._good.clear()
    facts = {
        "jobs": world.statuses,
        "faults": [str(fault) for fault in world.faults if fault.is_done],
        "virtual_s": round(clock.now, 1),
        "real_s": round(time.perf_counter() - started, 3),
        "commands": world.line.num_commands,
    }
    kills, visits = dict(world.kills), dict(world.visits)
    return Verdict(seed, world.violations, world.trace_hash(), facts, visits, kills, world.lines)


def _finish(loop: SimLoop, world: World) -> None:
    """Run the world, then let its processes die without another effect."""

    def note(task: Any, context: Any) -> None:
        process = context.get(PROCESS)
        if process is not None:
            process.tasks.add(task)
            task.add_done_callback(process.tasks.discard)

    loop.on_task = note
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(world.run())
    finally:
        world.stop()
        while left := {task for task in asyncio.all_tasks(loop) if not task.done()}:
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        asyncio.set_event_loop(None)


@contextmanager
def _in_place_of_heavy_parts(world: World) -> Iterator[None]:
    """Sockets, gauges, torch, tokenizers and the garbage collector are not simulated."""

    def hold(publisher: Any, policy_version: int, arrays: Any) -> Any:
        return _hold(world, real_hold, publisher, policy_version, arrays)

    real_hold = trainer_publish.Publisher.hold
    with (
        mock.patch.object(service, "Server", _server),
        mock.patch.object(metrics, "serve_metrics", _no_address),
        mock.patch.object(gauges, "measure", _no_gauges),
        mock.patch.object(trainer_preflight, "Renderer", ToyRenderer),
        mock.patch.object(trainer_tokens, "end_ids", _end_ids),
        mock.patch.object(trainer_app.gc, "collect", _nothing),
        mock.patch.object(gateway_jobs, "preflight", _no_references),
        mock.patch.object(trainer_publish.Publisher, "hold", hold),
        mock.patch.object(trainer_memory, "available", return_value=[trainer_memory.Room(1 << 40, "the simulation")]),
    ):
        failpoints.install(world.on_failpoint)
        try:
            yield
        finally:
            failpoints.install(None)


def _server(settings: Any) -> SimServer:
    process = PROCESS.get()
    assert process is not None, "a service runs in a process"
    return SimServer(process)


async def _no_gauges(*_: Any) -> None:
    return


def _no_address(settings: Any, role: str) -> str:
    return ""


def _end_ids(entry: Any) -> list[int]:
    return [0]


def _nothing(*_: Any) -> None:
    return


def _no_references(*_: Any) -> dict[str, Any]:
    return {}


async def _hold(world: World, real_hold: Any, publisher: Any, policy_version: int, arrays: Any) -> Any:
    ref = await real_hold(publisher, policy_version, arrays)
    world.published[(publisher._scope.job_id, ref.epoch, ref.policy_version)] = ref.sha256
    return ref

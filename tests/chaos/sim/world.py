"""A deployment in one thread: two trainers, two samplers, one or two teachers and a gateway, all of the real classes.

Real: queue, records, registry, claims, loop, exchange, journal, manifests, publisher, workers, sweeper, submit, the
frame of a service. Simulated: time, the queue server, the network, the disk's behaviour at a power loss, processes.
Toys: student, teachers, learner, tokenizer.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import random
import traceback
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from stillhouse.core import blobs
from stillhouse.core.blobs import Artifacts
from stillhouse.core.config import Settings
from stillhouse.core.errors import ConflictError, StillhouseError
from stillhouse.core.failpoints import InjectedError
from stillhouse.core.models import ModelEntry
from stillhouse.core.queue import job_scripts
from stillhouse.core.queue import jobs as queue_jobs
from stillhouse.core.queue.jobs import JobStore
from stillhouse.core.queue.registry import Registry
from stillhouse.core.queue.streams import WorkQueue
from stillhouse.core.service import Context, heartbeat_forever, serve
from stillhouse.core.worker import ComputeThread
from stillhouse.gateway import jobs as gateway_jobs
from stillhouse.gateway import pausing
from stillhouse.gateway.auth import Caller
from stillhouse.gateway.sweeper import Sweeper
from stillhouse.sampler.app import SamplerApp
from stillhouse.teacher.app import TeacherApp
from stillhouse.trainer import retention
from stillhouse.trainer.app import TrainerApp
from tests.chaos.sim.clock import Clock
from tests.chaos.sim.disk import Disk
from tests.chaos.sim.faults import LEASE_S, Fault, draw_faults, draw_job, draw_pauses
from tests.chaos.sim.log import SimLog, is_expected
from tests.chaos.sim.process import Process, current
from tests.chaos.sim.redis_client import Line, SimRedis
from tests.chaos.sim.redis_server import RedisServer
from tests.chaos.sim.rpc import Network, SimPeers
from tests.chaos.sim.toys import TOKEN_S, ToyLearnerThread, ToyModels, ToySampler, ToyTeacher

FAULTY_S: Final = 20.0
"""Virtual time in which faults may happen; then everything heals."""
HEALED_S: Final = 240.0
"""A job must end within so much virtual time after that."""
STAYS_PAUSED: Final = ("", *pausing.RESTING, "cancelling", *queue_jobs.TERMINAL)
"""What a job that was paused may be until it is resumed: it may have come to its end before it stopped."""
QUIET_S: Final = 16.0
"""Time after the end of the jobs: what is late comes now, zombies wake up, a gateway that died loses the sweeper's
lease (10 s) and its successor goes round twice."""


class World:
    """One run."""

    def __init__(self, seed: int, root: Path, clock: Clock, draw: random.Random) -> None:
        self.seed = seed
        self.clock = clock
        self._draw = draw
        plan = random.Random(f"plan {seed}")
        self.spec = draw_job(plan)
        self.num_jobs = plan.choice((1, 1, 1, 2))
        self.num_teachers = plan.choice((1, 2))
        self.faults = draw_faults(plan, cancels=plan.random() < 0.08) + draw_pauses(random.Random(f"pauses {seed}"))
        self.keeps_names = plan.random() < 0.5
        self.token_s = random.Random(f"tokens {seed}").choice((TOKEN_S, TOKEN_S, 0.1, 0.5))
        self._hash = hashlib.sha256()
        self.lines: list[str] = []
        """The log, for -v."""
        self.is_verbose = False
        self.violations: list[str] = []
        self.visits: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.settings = Settings(
            home=root,
            internal_token="of-the-simulation",
            lease_s=LEASE_S,
            threads=1,
            sampler_max_sequences=8,
            sampler_keep_s=0.2,
            teacher_batch_tokens=64,
        ).resolved()
        self.artifacts = Artifacts(self.settings.artifacts_dir())
        self.server = RedisServer()
        self.server.on_script = self._check_fence
        self.line = Line(self.server, draw, self.trace)
        self.network = Network(draw, self.trace)
        self.disk = Disk(root, draw, self.trace)
        self.models = ToyModels(self.artifacts)
        self.processes: dict[str, Process] = {}
        """The one that runs, by slot ("trainer-1")."""
        self.job_ids: list[str] = []
        self.published: dict[tuple[str, int, int], str] = {}
        """(job, epoch, version) -> sha256 of the weights that were held for it."""
        self.statuses: dict[str, str] = {}
        self._lives: Counter[str] = Counter()
        self._pauses: Counter[str] = Counter()
        self._is_over = False
        self.is_healed = False

    # -- what happened -----------------------------------------------------------------------------------------------

    def trace(self, *parts: Any) -> None:
        """Note an event: two runs of a seed have the same ones."""
        line = f"{self.clock.now:.6f} {' '.join(map(str, parts))}"
        self._hash.update(line.encode())
        if self.is_verbose:
            self.lines.append(line)

    def note(self, text: str) -> None:
        """A line of the log, for -v."""
        if self.is_verbose:
            self.lines.append(f"{self.clock.now:.6f} {text}")

    def trace_hash(self) -> str:
        return self._hash.hexdigest()[:16]

    def violate(self, message: str) -> None:
        self.violations.append(message)

    def _check_fence(self, text: str, keys: Any, args: Any, answer: Any) -> None:
        """No write of an older claim may be accepted."""
        if text == job_scripts.UPDATE and answer == b"DONE":
            epoch = self.server.call("HGET", keys[0], "epoch")
            if str(args[0]).encode() != epoch:
                self.violate(f"fence: a write of epoch {args[0]} was accepted, the claim is of epoch {epoch.decode()}")

    # -- processes ---------------------------------------------------------------------------------------------------

    def start(self, slot: str) -> None:
        """Start a process, and again whenever it ends."""
        role = slot.partition("-")[0]
        self._lives[slot] += 1
        name = slot if self.keeps_names else f"{slot}.{self._lives[slot]}"
        process = Process(name, role, self.trace)
        process.address = f"sim:{slot}.{self._lives[slot]}"
        process.log = SimLog(name, self.note, self.violate)
        self.processes[slot] = process
        self.network.processes[process.address] = process
        process.ctx = self._context(process)
        self.trace("start", process.address)
        process.main = process.run(_gateway(process.ctx) if role == "gateway" else serve(process.ctx, self._build))
        asyncio.get_running_loop().create_task(self._supervise(slot, process))

    def _context(self, process: Process) -> Context:
        redis: Any = SimRedis(self.line)
        blocking: Any = SimRedis(self.line, retries=0)
        peers: Any = SimPeers(self.network)
        models: Any = self.models
        return Context(
            settings=self.settings,
            role=process.role,
            instance=process.name,
            redis=redis,
            blocking=blocking,
            queue=WorkQueue(redis, blocking),
            jobs=JobStore(redis, self.artifacts),
            registry=Registry(redis),
            peers=peers,
            models=models,
            artifacts=self.artifacts,
            log=process.log,
        )

    def _build(self, ctx: Context) -> Any:
        if ctx.role == "trainer":
            return TrainerApp(ctx, lambda: ToyLearnerThread(ctx.pulse, ctx.settings.hang_s))
        if ctx.role == "teacher":
            load_teacher: Any = lambda entry, dtype: ToyTeacher(entry.name)  # noqa: E731
            return TeacherApp(ctx, load_teacher)

        async def load_sampler(entry: ModelEntry, dtype: str) -> ToySampler:
            return ToySampler(self.token_s)

        return SamplerApp(ctx, ComputeThread("sampler", ctx.pulse), load_sampler)

    async def _supervise(self, slot: str, process: Process) -> None:
        assert process.main is not None
        died = asyncio.ensure_future(process.died.wait())
        await asyncio.wait({process.main, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if process.is_dead:
            self.kills[process.role] += 1
        else:
            self._judge_exit(process)
            process.is_dead = True
            process.thaw()
        self.network.processes.pop(process.address, None)
        await asyncio.sleep(self._draw.uniform(0.2, 3.0))
        if not self._is_over:
            self.start(slot)

    def _judge_exit(self, process: Process) -> None:
        """A process may end by a fault, by SIGTERM, or because the queue server is gone for long."""
        main = process.main
        assert main is not None
        error = None if main.cancelled() else main.exception()
        self.trace("exit", process.name, type(error).__name__)
        if error is None and not process.ctx.stop.is_set() and not self._is_over:
            self.violate(f"exit: {process.name} ended by itself")
        if error is not None and not is_expected(error):
            text = "".join(traceback.format_exception(error)[-6:])
            self.violate(f"crash: {process.name}: {type(error).__name__}: {error}\n{text}")

    def alive(self, role: str) -> list[Process]:
        return [p for slot, p in sorted(self.processes.items()) if slot.startswith(role) and not p.is_dead]

    # -- faults ------------------------------------------------------------------------------------------------------

    def on_failpoint(self, name: str, detail: str) -> None:
        """The handler of every failpoint."""
        process = current()
        if process is None:
            return
        process.check()
        self.visits[name] += 1
        self.trace("point", process.name, name)
        for fault in self.faults:
            if fault.is_done or fault.point != name or fault.role not in ("", process.role) or self.is_healed:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            self._hurt(fault, process)

    def _hurt(self, fault: Fault, process: Process | None) -> None:
        """Make a fault happen."""
        fault.is_done = True
        self.trace("fault", fault)
        match fault.action:
            case "kill":
                if process is not None:
                    process.kill()
                    process.check() if process is current() else None
            case "freeze":
                if process is not None:
                    process.freeze(fault.seconds)
            case "term":
                if process is not None:
                    process.ctx.stop.set()
            case "raise":
                raise InjectedError(f"injected at {fault.point}")
            case "power":
                self._lose_power()
            case "full":
                self._for(fault.seconds, self.disk, "is_full", True)
                if fault.point.startswith("disk."):
                    raise OSError(28, "no space left on the simulated disk")
            case "down":
                self.line.go_down()
                self._for(fault.seconds, self.line, "is_down", True)
            case "flush":
                self.server.flush()
            case "lost":
                self._for(fault.seconds, self.line, "lost_answers", fault.amount / 2)
            case "refused":
                self._for(fault.seconds, self.line, "refused", fault.amount / 2)
            case "slow":
                self._for(fault.seconds, self.line, "slow_s", fault.amount / 5)
            case "rpc":
                self._for(fault.seconds, self.network, "lost", fault.amount)
            case "cancel":
                self._spawn(self._cancel())
            case "pause":
                self._spawn(self._pause(fault.seconds))

    def _for(self, seconds: float, target: Any, name: str, value: Any) -> None:
        before = type(value)()
        setattr(target, name, value)
        asyncio.get_running_loop().call_later(seconds, setattr, target, name, before)

    def _lose_power(self) -> None:
        """The machine that all processes and the artifacts are on; the queue server syncs every write."""
        for process in list(self.processes.values()):
            process.kill()
        self.disk.crash()
        blobs._unwritten.clear()  # memory of processes, which share it here
        retention._good.clear()
        process = current()
        if process is not None:
            process.check()

    async def _at_moments(self) -> None:
        for fault in sorted((f for f in self.faults if not f.point), key=lambda fault: fault.at_s):
            await asyncio.sleep(max(0.0, fault.at_s - self.clock.now))
            candidates = self.alive(fault.role) if fault.role else []
            self._hurt(fault, self._draw.choice(candidates) if candidates else None)

    async def _heal(self) -> None:
        """From now on nothing goes wrong any more."""
        await asyncio.sleep(FAULTY_S)
        self.is_healed = True
        self.trace("healed")
        self.line.is_down, self.line.lost_answers, self.line.refused, self.line.slow_s = False, 0.0, 0.0, 0.0
        self.disk.is_full, self.network.lost = False, 0.0
        for process in self.processes.values():
            process.thaw()

    # -- the user ----------------------------------------------------------------------------------------------------

    async def _user(self, call: Any) -> Any:
        """Call something of the gateway until it answers."""
        while True:
            for gateway in self.alive("gateway"):
                task = gateway.run(call(gateway.ctx))
                await asyncio.wait({task}, timeout=30)
                if task.done() and not task.cancelled() and task.exception() is None:
                    return task.result()
                task.cancel()
            await asyncio.sleep(0.5)

    async def _submit(self, number: int) -> None:
        submission = gateway_jobs.Submission(self.spec, Caller(""), f"key-{number}")
        record, _ = await self._user(lambda ctx: gateway_jobs.submit(ctx, submission))
        self.trace("submitted", record.id)
        self.job_ids.append(record.id)

    async def _cancel(self) -> None:
        if self.job_ids:

            async def cancel(ctx: Context) -> None:
                try:
                    await gateway_jobs.cancel(ctx, self.job_ids[0])
                except StillhouseError:
                    return  # it has ended

            await self._user(cancel)

    async def _pause(self, seconds: float) -> None:
        """Pause the newest job and resume it later; in between it must not run, whatever happens."""
        if not self.job_ids:
            return
        job_id = self.job_ids[-1]
        self._pauses[job_id] += 1
        paused = await self._user(lambda ctx: _wish(pausing.pause, ctx, job_id))
        self.trace("pause", paused)
        await asyncio.sleep(seconds)
        record = self.server.call("HGETALL", f"sh:job:{job_id}")  # {} = lost, and not rebuilt yet
        status = record.get(b"status", b"").decode()
        self.trace("paused", status)
        # of several users who pause it another one may have resumed it
        if paused in pausing.RESTING and self._pauses[job_id] == 1 and status not in STAYS_PAUSED:
            self.violate(f"pause: {job_id} was {paused}, and is {status} before it was resumed")
        await self._user(lambda ctx: _wish(pausing.resume, ctx, job_id))

    async def _ended(self) -> None:
        """Until every job has ended and its final.json is there."""
        while True:
            if len(self.job_ids) == self.num_jobs:
                roots = [self.artifacts.job(job_id).root for job_id in self.job_ids]
                if all((root / "final.json").is_file() for root in roots) and not self._is_running():
                    return
            await asyncio.sleep(0.25)

    def _is_running(self) -> bool:
        return bool(self.server.call("ZRANGE", "sh:jobs:active", 0, -1))

    def _spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coro, context=_empty())  # type: ignore[call-arg]

    async def run(self) -> None:
        """Everything from the first process to the last end."""
        slots = ["gateway-1", "trainer-1", "trainer-2", "sampler-1", "sampler-2"]
        for slot in slots + [f"teacher-{number}" for number in range(1, self.num_teachers + 1)]:
            self.start(slot)
        beside = [self._spawn(self._at_moments()), self._spawn(self._heal())]
        users = [self._spawn(self._submit(number)) for number in range(self.num_jobs)]
        try:
            async with asyncio.timeout(FAULTY_S + HEALED_S):
                await self._ended()
        except TimeoutError:
            states = {job_id: self.server.call("HGETALL", f"sh:job:{job_id}") for job_id in self.job_ids}
            facts = {k: {n: v[n] for n in (b"status", b"status_reason", b"step") if n in v} for k, v in states.items()}
            self.violate(f"hang: not ended {HEALED_S:g} s after everything was well: {facts}")
        self.trace("ended")
        for process in self.processes.values():
            process.thaw()
        await asyncio.sleep(QUIET_S)
        self._is_over = True
        for task in beside + users:
            task.cancel()

    def stop(self) -> None:
        """Nothing of any process happens from now on."""
        self._is_over = True
        for process in self.processes.values():
            process.is_dead = True
            process.thaw()


async def _wish(verb: Any, ctx: Context, job_id: str) -> str:
    """The status that pausing or resuming gives; what is refused has ended, or its record is lost and comes back."""
    try:
        return (await verb(ctx, job_id)).status
    except ConflictError:
        return "refused"


def _empty() -> contextvars.Context:
    """Of no process."""
    return contextvars.Context()


async def _gateway(ctx: Context) -> None:
    """What of a gateway runs without being asked."""
    beat = asyncio.create_task(heartbeat_forever(ctx, lambda: ("ready", ""), "", ""))
    try:
        await Sweeper(ctx).run()
    finally:
        beat.cancel()

"""Every wait has a deadline, read from the source: gRPC calls, Redis clients, events, queues, locks, futures.

What waits without one stands in UNBOUNDED with the reason why it cannot hang unseen. Left out: files (`to_thread`),
since nothing ends a read that the kernel does not end, and the client's HTTP, whose defaults tests/unit/test_client.py
checks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

SERVICES: Final = Path(__file__).resolve().parents[2] / "services" / "stillhouse"
FILES: Final = sorted(path for path in SERVICES.rglob("*.py") if "v1" not in path.relative_to(SERVICES).parts)

UNBOUNDED: Final = {
    "client/resource.py tell: found": "the caller's own callback",
    "core/job_logs.py JobLogs._write_forever: self._waiting.get()": "a daemon thread, as long as the process lives",
    "gateway/jobs.py _check_and_write: run_in_executor": "reads and syncs files; the route has a deadline",
    "gateway/jobs.py look_at: run_in_executor": "reads files and counts tokens; the route has a deadline",
    "gateway/jobs.py retry: run_in_executor": "reads files; the route has a deadline",
    "gateway/jobs.py submit: ctx.redis.get(keys.idempotency(token)) if token else ctx.redis.ping()": (
        "commands have deadlines in core/queue/client.py"
    ),
    "sampler/student.py Student.settled: self._changing": "a change of weights, whose pull and load are bounded",
    "trainer/evaluations.py Evaluations.finish: self._task": "raced against the wish to stop; its parts are bounded",
    "trainer/exchange.py Exchange.settled: trying[0].complete.wait()": "ends as samples do",
    "trainer/report.py Report.look: made": "a measurement of the pre-flight, each with a deadline",
    "trainer/trackers/base.py Feed._work: self._queue.get()": "a daemon thread, as long as the process lives",
    **{
        f"core/tracing.py {name}: _current.get()": "a ContextVar: nothing waits"
        for name in ("begin", "current", "traceparent")
    },
    # the life of a process: they end with it
    "cli/process.py Child.collect: self._popen.wait()": "the process is dead already; this reaps it",
    "cli/up.py _run_detached: process.wait()": "Ctrl-C twice ends it; the supervisor drains with a limit of its own",
    "core/service.py _drain_guard: ctx.stop.wait()": "waits for SIGTERM as long as the process lives",
    "core/service.py serve: asyncio.wait(tasks)": "heartbeat, worker and pulse; the pulse bounds the worker",
    "gateway/__main__.py run_until_done: asyncio.wait(tasks)": "the server's life",
    "gateway/__main__.py run_until_done: server": "uvicorn's timeout_graceful_shutdown bounds it",
    # helpers: the limit is the caller's or the other side of the race
    "core/worker.py unless: asyncio.wait({task, stop})": "the work has a limit (PULL_WAIT_S), the stop cuts it short",
    "core/worker.py unless: stopped.wait()": "the other side of that race",
    "core/tasks.py to_its_end: asyncio.wait([task])": "the work has a limit: the pulse, for weights on their way",
    "trainer/loop.py Interrupt.race: asyncio.wait({work, stop})": "stands still in sight of trainer/watch.py",
    "trainer/loop.py Interrupt.race: self._event.wait()": "the other side of that race",
    # ranks: torchrun ends the others when one does not come, and each connection has its timeout
    "trainer/app.py _join: Ranks.join()": "PASS_TIMEOUT",
    "trainer/follow.py _follow: Ranks.join()": "PASS_TIMEOUT",
    "trainer/node.py NodeProcess._run_ranks: ranks.wait()": "torchrun was killed; this reaps it",
    "trainer/node.py NodeProcess._watch: ranks.wait()": "looked at each BEAT_S",
    # compute threads: core/pulse.py ends the process when they make no progress for hang_s
    "core/worker.py ComputeThread.run: run_in_executor": "the pulse",
    "trainer/train.py LearnerThread.call: run_in_executor": "the pulse",
    # the transformers engine: its tokens are under the pulse, and an error of its driver is told to all who wait
    "sampler/engines/transformers.py TransformersEngine._drive: listener.is_read.wait()": "readers ask again or leave",
    "sampler/engines/transformers.py TransformersEngine._drive: self._goes_on.wait()": "who pauses resumes, or closes",
    "sampler/engines/transformers.py TransformersEngine._empty: self._one_left.wait()": "running calls end: the pulse",
    "sampler/engines/transformers.py TransformersEngine.close: asyncio.wait([self._driver])": "one token: the pulse",
    "sampler/engines/transformers.py _Listener.receive: self._arrived.wait()": "the pulse",
    # vLLM's engine process: the pulse ends ours when it owes tokens and gives none; if it dies, each of these is told
    "sampler/engines/vllm.py VllmEngine._outputs: reports.get()": "the pulse",
    "sampler/engines/vllm.py VllmEngine._enter: self._entering": "entering takes no time, loading has the pulse",
    "sampler/engines/vllm.py VllmEngine.generate: pieces.get()": "writers put an end, whatever becomes of them",
    "sampler/engines/vllm.py VllmEngine.load_weights: self._entering": "as above",
    "sampler/engines/vllm_start.py EngineProcess._run: run_in_executor": "the pulse",
    # trainer/watch.py says within seconds that nothing arrives, and why
    "trainer/samplers.py SamplerPool._wait_for: self._changed.wait()": "no_sampler; interrupted from outside",
    "trainer/texts.py Texts.run: self._ordered.get()": "the loop's plan; cancelled with the claim",
    "trainer/texts.py Texts.run: slots.acquire()": "a text ends: lost samplers are seen, hung ones end by the pulse",
    "trainer/run.py Run._scored_again: await self.exchange.rescore(header.step, hidden)": "no_teacher, teacher_silent",
    # locks: held only around calls that have limits
    "sampler/shift.py Shift.run: self.halted.wait()": "the shift's life: the worker watches lease and stop beside it",
    "sampler/student.py Student.ensure: self._changing": "a pull, PULL_TIMEOUT_S, and a load, bounded by the pulse",
    "sampler/student.py Student.follow: self._changing": "likewise; halting the shift cuts it short",
    "sampler/student.py Student.load_model: self._changing": "likewise",
    "sampler/student.py Student.guest: self._guest_lock": "a load, bounded by the pulse",
    "trainer/exchange.py Exchange._arrive: self._fetches": "fetches, FETCH_TIMEOUT_S each",
    "trainer/verify/judges.py Judges._run: self._slots": "verdicts and loads, which have deadlines",
    "trainer/verify/judges.py Judges.load: self._slots": "likewise",
}
CHANNEL_FILES: Final = {"core/rpc.py", "cli/healthcheck.py"}
"""The only files that open gRPC channels."""


class Calls(ast.NodeVisitor):
    """Waits without a deadline in one file, as `path qualname: expression`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: list[str] = []
        self._names: list[str] = []
        self._timeouts = 0

    def _scope(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _scope

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        contexts = [item.context_expr for item in node.items]
        bounded = any("timeout(" in ast.unparse(context) for context in contexts)
        for context in contexts:
            # `async with deadline:` after `deadline = asyncio.timeout(...)` is the one name that is no lock
            is_lock = isinstance(context, ast.Name | ast.Attribute) and ast.unparse(context) != "deadline"
            if is_lock and not self._timeouts:
                self._note(ast.unparse(context))
        self._timeouts += bounded
        self.generic_visit(node)
        self._timeouts -= bounded

    def visit_Await(self, node: ast.Await) -> None:
        if not isinstance(node.value, ast.Call) and not self._timeouts:
            self._note(ast.unparse(node.value))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "wait_for":  # what it waits for is bounded
            assert len(node.args) == 2 or any(keyword.arg == "timeout" for keyword in node.keywords)
            self._timeouts += 1
            self.generic_visit(node)
            self._timeouts -= 1
            return
        if not self._timeouts and self._is_unbounded(name, node):
            arguments = ", ".join(ast.unparse(argument) for argument in node.args)
            self._note(name if name == "run_in_executor" else f"{ast.unparse(node.func)}({arguments})")
        self.generic_visit(node)

    def _is_unbounded(self, name: str, node: ast.Call) -> bool:
        has_timeout = any(keyword.arg == "timeout" for keyword in node.keywords)
        if name == "wait" and ast.unparse(node.func) == "asyncio.wait":
            return not has_timeout
        if name in ("wait", "acquire", "communicate", "get", "join"):
            return not node.args and not has_timeout and isinstance(node.func, ast.Attribute)
        return name == "run_in_executor"

    def _note(self, what: str) -> None:
        self.found.append(f"{self.path} {'.'.join(self._names)}: {what}")


def relative(path: Path) -> str:
    return path.relative_to(SERVICES).as_posix()


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def keywords(call: ast.Call) -> set[str]:
    return {keyword.arg or "" for keyword in call.keywords}


def unbounded(source: str, path: str = "x.py") -> list[str]:
    visitor = Calls(path)
    visitor.visit(ast.parse(source))
    return visitor.found


def test_every_wait_is_bounded_or_says_why_not() -> None:
    found = {wait for path in FILES for wait in unbounded(path.read_text(), relative(path))}
    surprising = sorted(found - UNBOUNDED.keys())
    assert not surprising, "give these a deadline, or a reason in UNBOUNDED:\n" + "\n".join(surprising)
    assert UNBOUNDED.keys() <= found, f"no longer there: {sorted(UNBOUNDED.keys() - found)}"


def test_every_grpc_call_has_a_deadline() -> None:
    seen = 0
    for path in FILES:
        tree = ast.parse(path.read_text())
        for call in calls(tree):
            text = ast.unparse(call)
            if "_channel(" in ast.unparse(call.func) + "(" and "grpc" in text:
                assert relative(path) in CHANNEL_FILES, f"{path}: open channels in core/rpc.py: {text}"
            if isinstance(call.func, ast.Call) and ast.unparse(call.func).startswith("getattr(self._stub"):
                assert "timeout" in keywords(call), f"{path}:{call.lineno}: {text}"
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            method = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
            if name in ("unary", "stream") and isinstance(method, str) and method[:1].isupper():
                assert "timeout_s" in keywords(call), f"{path}:{call.lineno}: {text}"
                seen += 1
    assert seen >= 6, "the check looks past the calls"


def test_every_redis_client_has_deadlines_and_no_read_blocks_for_ever() -> None:
    clients = 0
    for path in FILES:
        for call in calls(ast.parse(path.read_text())):
            where = f"{path}:{call.lineno}: {ast.unparse(call)}"
            if ast.unparse(call.func) in (
                "Redis.from_url",
                "Redis",
                "BlockingConnectionPool.from_url",
                "ConnectionPool.from_url",
            ):
                assert {"socket_timeout", "socket_connect_timeout"} <= keywords(call), where
                clients += 1
            for keyword in call.keywords:
                if keyword.arg == "block":
                    assert not (isinstance(keyword.value, ast.Constant) and not keyword.value.value), where
    assert clients >= 3, "the check looks past the clients"


@pytest.mark.parametrize(
    ("source", "is_bounded"),
    [
        ("await event.wait()", False),
        ("await queue.get()", False),
        ("await lock.acquire()", False),
        ("await future", False),
        ("async with self._lock: pass", False),
        ("await asyncio.wait(tasks, return_when=FIRST)", False),
        ("await loop.run_in_executor(None, work)", False),
        ("process.communicate()", False),
        ("await asyncio.wait_for(event.wait(), 3)", True),
        ("async with asyncio.timeout(3):\n  await event.wait()\n  await future", True),
        ("await asyncio.wait(tasks, timeout=1)", True),
        ("await redis.get('key')", True),
        ("process.wait(3)", True),
        ("','.join(names)", True),
    ],
)
def test_the_check_sees_what_it_should(source: str, is_bounded: bool) -> None:
    body = "\n".join(f"  {line}" for line in source.splitlines())
    assert (unbounded(f"async def f():\n{body}") == []) is is_bounded

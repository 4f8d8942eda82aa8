"""Durable POST /v1/jobs per second and their latency, /healthz beside them, and what 200 followers of events cost.

A gateway process and a queue server that syncs every write, in a temporary folder; one process sends. A body has eight
inline rows, or names a file of 400 rows. Each job is on disk (job.json, its folder, the queue server's log) before its
answer. Closed loop: each of 32 connections posts again as soon as it has its answer, so that its time is 32 / rate
whatever the gateway does. Paced: so many posts a second arrive, and the time of each counts from when it was to be
sent, whether or not a connection was free then. Processor time is the gateway's own, user and system, from /proc: it
means the same on a busy machine, where rates and latencies do not.

    python benchmarks/bench_gateway.py                                # all of it, ten minutes
    python benchmarks/bench_gateway.py --out benchmarks/results/gateway_MACHINE_MONTH
    python benchmarks/bench_gateway.py --posts 200 --seconds 3 --rounds 1    # to see that it works
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import structlog

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "services"), str(ROOT / "benchmarks")]

from gateway_load import Followers, Target, post_jobs  # noqa: E402
from tests.conftest import free_port, start_valkey, stop_valkey  # noqa: E402
from tests.gateway_kit import add_model, make_spec  # noqa: E402

from stillhouse.core.config import Settings  # noqa: E402
from stillhouse.core.keys import create_key  # noqa: E402
from stillhouse.core.queue.streams import Scope  # noqa: E402
from stillhouse.core.service import open_context  # noqa: E402

CONNECTIONS = 32
PACES = (0.0, 100.0, 120.0, 150.0)
"""Arrivals a second; 0 = closed loop."""
WARM_UP = 64
"""Posts before those that count."""
FOLLOWERS = 200
EVENTS_PER_S = 2.0
WANTED = {"posts_per_s": 100.0, "post_p99_ms": 100.0, "healthz_p99_ms": 50.0, "followers_core": 0.25}


def make_rows(count: int, salt: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"Question {salt}/{n}: how does a still separate what it is fed with?"} for n in range(count)]


class Deployment:
    """Gateway and queue server."""

    def __init__(self, home: Path) -> None:
        self.home = home
        add_model(home, "small", max_length=4096)
        add_model(home, "big", size=8, max_length=4096)
        self.valkey, self.redis_url = start_valkey(home)
        self.target = Target(free_port(), create_key(home / "api-keys.json", "bench", scopes=("admin",)))
        env = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_")}
        env |= {"STILLHOUSE_HOME": str(home), "STILLHOUSE_REDIS_URL": self.redis_url, "STILLHOUSE_LOG_FORMAT": "json"}
        env |= {"STILLHOUSE_PORT": str(self.target.port), "PYTHONPATH": str(ROOT / "services")}
        self._log = (home / "gateway.log").open("wb")
        profiler = os.environ.get("BENCH_PROFILER", "").split()  # for example: py-spy record -o out.svg --
        command = [*(profiler or (sys.executable, "-m")), "stillhouse.gateway"]
        self.gateway = subprocess.Popen(command, env=env, stderr=self._log)
        self.url = f"http://127.0.0.1:{self.target.port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.target.key}"}, timeout=30)
        deadline = time.monotonic() + 30
        while not self._is_ready():
            if time.monotonic() > deadline or self.gateway.poll() is not None:
                raise SystemExit(f"the gateway did not start: {(home / 'gateway.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self.http.close()
        self.gateway.terminate()
        self.gateway.wait(timeout=30)
        stop_valkey(self.valkey)
        self._log.close()


@contextmanager
def deployed() -> Iterator[Deployment]:
    """A deployment of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        deployment = Deployment(Path(temporary))
        try:
            yield deployment
        finally:
            deployment.close()


def processor_s(pid: int) -> float:
    """Time of a process on a processor so far, seconds: the scheduler's own count in ns, as the ticks of /proc/PID/stat
    miss or double short turns. Threads that have ended are not in it; the gateway keeps its own."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9


@contextmanager
def spent(deployment: Deployment) -> Iterator[dict[str, float]]:
    """Processor seconds of gateway and queue server within the block."""
    pids = {"gateway": deployment.gateway.pid, "valkey": deployment.valkey.pid}
    before = {name: processor_s(pid) for name, pid in pids.items()}
    found: dict[str, float] = {}
    yield found
    found |= {name: processor_s(pid) - before[name] for name, pid in pids.items()}


def _post_inline(_: Deployment) -> Callable[[int], bytes]:
    def body(number: int) -> bytes:
        stage = {**make_spec()["stages"][0], "data": {"rows": make_rows(8, number)}}
        return json.dumps(make_spec(name=f"bench {number}", stages=[stage])).encode()

    return body


def _post_file(deployment: Deployment) -> Callable[[int], bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in make_rows(400)).encode()
    answer = deployment.http.post("/v1/files", content=lines, headers={"Content-Type": "application/jsonl"})
    file_id = answer.raise_for_status().json()["id"]

    def body(number: int) -> bytes:
        stage = {**make_spec()["stages"][0], "data": {"file": file_id}}
        return json.dumps(make_spec(name=f"bench {number}", stages=[stage])).encode()

    return body


BODIES = {"8 rows": _post_inline, "file of 400 rows": _post_file}
"""What is posted, by name."""


def measure_posts(deployment: Deployment, what: str, keyed: bool, posts: int, rate: float = 0.0) -> dict[str, Any]:
    """Jobs as fast as CONNECTIONS that wait for their answers post them, or `rate` a second."""
    make_body = BODIES[what](deployment)
    asyncio.run(post_jobs(deployment.target, make_body, WARM_UP, CONNECTIONS, keyed))
    with spent(deployment) as processor:
        load = post_jobs(deployment.target, make_body, posts, CONNECTIONS, keyed, rate)
        answers, probes, seconds = asyncio.run(load)
    assert answers.statuses == {201: posts}, answers.statuses
    return {
        "posts_per_s": posts / seconds,
        "post_p50_ms": 1e3 * answers.quantile(0.5),
        "post_p99_ms": 1e3 * answers.quantile(0.99),
        "healthz_p99_ms": 1e3 * probes.quantile(0.99),
        "gateway_ms_per_post": 1e3 * processor["gateway"] / posts,
        "valkey_ms_per_post": 1e3 * processor["valkey"] / posts,
    }


async def follow(deployment: Deployment, seconds: float, num_jobs: int) -> dict[str, Any]:
    """FOLLOWERS streams over `num_jobs` jobs, each of which tells EVENTS_PER_S events a second."""
    settings = Settings(home=deployment.home, redis_url=deployment.redis_url).resolved()
    ctx = open_context(settings, "trainer", structlog.get_logger(), instance="bench")
    created = [deployment.http.post("/v1/jobs", json=make_spec()).raise_for_status().json() for _ in range(num_jobs)]
    job_ids = [job["id"] for job in created]
    scopes = [Scope(job_id, await ctx.jobs.claim(job_id, "bench", 600.0, 0)) for job_id in job_ids]
    followers = Followers(deployment.target, [job_ids[n % num_jobs] for n in range(FOLLOWERS)])
    await asyncio.wait_for(followers.all_open.wait(), 60)
    count = int(seconds * EVENTS_PER_S)
    with spent(deployment) as processor:
        started = time.perf_counter()
        for number in range(count):
            for job_id in job_ids:
                await ctx.jobs.event(job_id, "log", "a step is trained", number=number, sent_at=time.time())
            await asyncio.sleep(max(0.0, started + (number + 1) / EVENTS_PER_S - time.perf_counter()))
        elapsed = time.perf_counter() - started
    for scope in scopes:
        await ctx.jobs.update(scope, status="succeeded", release=True)
        await ctx.jobs.event(scope.job_id, "job.status", "succeeded", status="succeeded")
    await followers.done()
    await ctx.close()
    delays = sorted(followers.delays)
    return {
        "followers_core": processor["gateway"] / elapsed,
        "valkey_core": processor["valkey"] / elapsed,
        "lost_or_doubled": sum(got != list(range(count)) for got in followers.got),
        "delivered_per_s": sum(map(len, followers.got)) / elapsed,
        "delay_p50_ms": 1e3 * delays[len(delays) // 2],
        "delay_p99_ms": 1e3 * delays[int(0.99 * len(delays))],
    }


def machine(args: argparse.Namespace) -> dict[str, str]:
    """For the reader of the results."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model.split(":", 1)[1].strip(),
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "python": platform.python_version(),
        "rounds": str(args.rounds),
        "posts": str(args.posts),
        "seconds": f"{args.seconds:g}",
    }


def table(result: dict[str, Any]) -> str:
    """Medians of the rounds, with lowest and highest."""
    lines = ["# The gateway\n", "Made by benchmarks/bench_gateway.py; what is measured stands there.\n"]
    lines += [", ".join(f"{key} {value}" for key, value in result["machine"].items()) + "\n"]
    for case, rounds in result["cases"].items():
        lines += [f"## {case}\n", "| figure | median | lowest to highest | wanted |", "|---|---|---|---|"]
        for name in rounds[0]:
            values = [one[name] for one in rounds]
            limit = f"{WANTED[name]:g}" if name in WANTED else ""
            spread = f"{min(values):.3g} to {max(values):.3g}"
            lines.append(f"| {name} | {statistics.median(values):.3g} | {spread} | {limit} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--posts", type=int, default=1000, help="per case and round")
    parser.add_argument("--paces", type=float, nargs="+", default=PACES, help="arrivals a second; 0 = closed loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="of following, per case and round")
    parser.add_argument("--only", choices=["posts", "followers"], default=None)
    parser.add_argument("--out", type=Path, default=None, help="results/NAME without ending")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(args), "cases": {}}
    for _ in range(args.rounds):
        for num_jobs in (1, 20) if args.only != "posts" else ():
            with deployed() as deployment:  # one of its own: the queued jobs of others are swept every 2 s
                figures = asyncio.run(follow(deployment, args.seconds, num_jobs))
            result["cases"].setdefault(f"{FOLLOWERS} followers of {num_jobs} jobs", []).append(figures)
        for what in BODIES if args.only != "followers" else ():
            for keyed, pace in itertools.product((False, True), args.paces):
                with deployed() as deployment:
                    figures = measure_posts(deployment, what, keyed, args.posts, pace)
                how = f"{pace:g} arrive a second" if pace else "closed loop"
                name = f"POST /v1/jobs, {what}{', with key' if keyed else ''}, {how}"
                result["cases"].setdefault(name, []).append(figures)
    result["machine"]["load at the end"] = f"{os.getloadavg()[0]:.1f}"
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()

"""All services of a deployment in this process, on loopback: real gRPC, real queue, tiny models.

For tests that look inside; tests/e2e runs the same as separate processes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

from stillhouse.core.blobs import JobArtifacts, new_id, sealed, write_json
from stillhouse.core.config import Settings
from stillhouse.core.models import ModelRegistry, inspect_model
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue.jobs import JobRecord
from stillhouse.core.service import Context, open_context, serve
from stillhouse.core.spec import JobSpec
from stillhouse.core.tasks import cancel_all
from tests.tiny import make_tiny_model
from tests.waiting import wait_until

TOKEN = "internal-token-of-the-tests"


class Cluster:
    """A deployment below `home`."""

    def __init__(self, home: Path, redis_url: str, **settings: Any) -> None:
        self.settings = Settings(
            home=home, redis_url=redis_url, internal_token=TOKEN, lease_s=2.0, threads=1, **settings
        ).resolved()
        self.models = ModelRegistry(self.settings.models_path())
        self.ctx = open_context(self.settings, "test", structlog.get_logger())
        self._running: dict[str, tuple[Context, asyncio.Task[None]]] = {}

    def add_model(self, name: str, **options: Any) -> None:
        """Register a tiny random model."""
        folder = self.settings.home / "models" / name
        self.models.add(inspect_model(name, make_tiny_model(folder, **options)))

    async def start(self, role: str, instance: str = "") -> Context:
        """Start a service and wait until it is announced."""
        ctx = open_context(self.settings, role, structlog.get_logger(), instance=instance or f"{role}-0")
        task = asyncio.create_task(serve(ctx, _builder(role)), name=ctx.instance)
        self._running[ctx.instance] = (ctx, task)

        async def announced() -> bool:
            if task.done():
                task.result()
            return any(info.instance == ctx.instance for info in await self.ctx.registry.services(role))

        await wait_until(announced, timeout_s=20, what=f"{ctx.instance} to announce itself")
        return ctx

    async def stop(self, instance: str) -> None:
        """Stop a service as SIGTERM does."""
        ctx, task = self._running.pop(instance)
        ctx.stop.set()
        try:
            await asyncio.wait_for(task, 30)
        finally:
            await ctx.close()

    async def crash(self, instance: str) -> None:
        """Stop a service as kill -9 does, as far as that is possible in one process: nothing is handed back."""
        ctx, task = self._running.pop(instance)
        await cancel_all([task])
        await ctx.close()

    async def submit(self, spec: dict[str, Any], kind: str = "distillation") -> str:
        """Store a job as the gateway does."""
        parsed = JobSpec.model_validate(spec)
        record = JobRecord(
            id=new_id("job"),
            status="queued",
            spec=parsed.model_dump(mode="json"),
            created_at=time.time(),
            stop_step=parsed.stop_step(),
            kind=kind,
        )
        document = {"id": record.id, "created_at": record.created_at, "owner": "", "spec": record.spec}
        document["kind"] = kind
        document |= {"stop_step": record.stop_step, "idempotency": ["", ""]}
        write_json(self.ctx.artifacts.job(record.id).job_json, sealed(document))
        await self.ctx.jobs.create(record)
        return record.id

    async def ended(self, job_id: str, timeout_s: float = 60) -> JobRecord:
        """Wait for a job's terminal state."""

        async def terminal() -> JobRecord | None:
            for _, task in self._running.values():
                if task.done():
                    task.result()
            record = await self.ctx.jobs.get(job_id)
            return record if record.is_terminal else None

        return await wait_until(terminal, timeout_s=timeout_s, what=f"{job_id} to end")

    async def succeeded(self, job_id: str) -> tuple[JobRecord, JobArtifacts]:
        """Wait for a job's end, which has to be a good one, by the oracle too; its record and what it left."""
        record = await self.ended(job_id)
        assert record.status == "succeeded", record.error
        artifacts = self.ctx.artifacts.job(job_id)
        report = verify_job(artifacts, record)
        assert report.ok, report.violations
        return record, artifacts

    async def at_step(self, job_id: str, step: int) -> None:
        """Wait until a job has trained so many steps."""

        async def reached() -> bool:
            record = await self.ctx.jobs.get(job_id)
            assert record.step >= step or not record.is_terminal, f"{record.status}: {record.error}"
            return record.step >= step

        await wait_until(reached, timeout_s=60, what=f"step {step}")

    async def metric(self, job_id: str, name: str) -> list[float]:
        """A metric of every step."""
        return [point["values"][name] for point in await self.ctx.jobs.metrics(job_id)]

    async def close(self) -> None:
        for instance in list(self._running):
            await self.stop(instance)
        await self.ctx.close()


_LOADING = threading.Lock()


def _one_load_at_a_time() -> None:
    """transformers patches globals while it loads a model, so three services in one process must take turns."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.from_pretrained.__func__
    if getattr(original, "takes_turns", False):
        return

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _LOADING:
            return original(cls, *args, **kwargs)

    from_pretrained.takes_turns = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment,method-assign]


def _builder(role: str) -> Any:
    _one_load_at_a_time()
    if role == "sampler":
        from stillhouse.sampler.app import build as build_sampler

        return build_sampler
    if role == "teacher":
        from stillhouse.teacher.app import build as build_teacher

        return build_teacher
    from stillhouse.trainer.app import build as build_trainer

    return build_trainer


@asynccontextmanager
async def cluster(home: Path, redis_url: str, *roles: str, **settings: Any) -> AsyncIterator[Cluster]:
    """A deployment with one service of each role."""
    made = Cluster(home, redis_url, **settings)
    try:
        for role in roles:
            await made.start(role)
        yield made
    finally:
        await made.close()


def job_spec(**changes: Any) -> dict[str, Any]:
    """A small job: student `student`, teacher `teacher`, a few steps; `changes` by dotted path with __ for dots."""
    spec: dict[str, Any] = {
        "name": "test",
        "student": {"model": "student"},
        "teachers": {"main": {"model": "teacher"}},
        "stages": [
            {
                "data": {"rows": [{"prompt": f"say {word}"} for word in ("one", "two", "three", "four", "five")]},
                "sampling": {"max_tokens": 8},
                "loss": {"objective": "full_vocabulary"},
                "optimizer": {"lr": 1e-3},
                "schedule": {"steps": 4, "prompts_per_step": 3, "max_staleness": 0},
            }
        ],
        "checkpoint": {"every_steps": 2},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        target: Any = spec
        for key in parents:
            target = target[int(key)] if key.isdigit() else target.setdefault(key, {})
        target[last] = value
    return spec

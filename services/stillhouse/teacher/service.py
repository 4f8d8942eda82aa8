"""`TeacherService`: models on demand, direct scores, payloads and heads."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from stillhouse.core.errors import EngineDeadError, SpecError, UnavailableError, UnimplementedError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rpc import chunks
from stillhouse.core.service import VERSION, Context
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.teacher.batching import plan_batches
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.teacher.engines.base import Abilities, Scored, ScoreItem, Unscored
from stillhouse.teacher.following import Follower, at_least
from stillhouse.teacher.messages import make_failure, make_score, score_bytes
from stillhouse.teacher.scoring import Batch, Scorer
from stillhouse.teacher.spans import Reader
from stillhouse.v1 import rollout_pb2, teacher_pb2_grpc, tensor_pb2
from stillhouse.v1 import teacher_pb2 as pb

DIRECT_BATCHES: Final = 8
"""Batches of a direct call before others have their turn: jobs wait no longer than that, and a model that has to leave
for the call is loaded again once in eight batches."""
CALLER_REASONS: Final = ("too_long", "bad_ids", "bad_request", "empty")
"""Failures that are the caller's: a direct call ends with INVALID_ARGUMENT."""


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """The gRPC face of a teacher."""

    def __init__(
        self, ctx: Context, scorer: Scorer, blobs: BlobStore, follower: Follower, abilities: Abilities
    ) -> None:
        self._ctx = ctx
        self._scorer = scorer
        self._blobs = blobs
        self._reader = Reader(ctx.models)
        self._follower = follower
        self._abilities = abilities

    async def GetInfo(self, request: pb.TeacherServiceGetInfoRequest, context: Any) -> pb.TeacherServiceGetInfoResponse:
        return pb.TeacherServiceGetInfoResponse(
            instance=self._ctx.instance,
            engine=self._abilities.engine,
            version=VERSION,
            models=[resident.message() for resident in self._scorer.pool.residents()],
            kinds=self._abilities.kinds,
            memory_budget_bytes=self._scorer.pool.budget_bytes,
            scored_tokens=self._scorer.scored_tokens,
            blob_bytes=self._blobs.total_bytes,
            accounts=self._scorer.accounts.messages(),
            loads=self._scorer.pool.loads(),
            cache_hits=self._scorer.cache.hits,
            cache_bytes=self._scorer.cache.size_bytes,
        )

    async def EnsureModel(self, request: pb.EnsureModelRequest, context: Any) -> pb.EnsureModelResponse:
        task = request.task if request.HasField("task") else _task(request)
        self._check_abilities(task)
        async with self._scorer.turn():
            resident, load_s = await self._scorer.model(task)
        if load_s:
            self._ctx.log.info("model loaded", job_id=task.job_id, model=task.model, seconds=round(load_s, 1))
        return pb.EnsureModelResponse(model=resident.message())

    def _check_abilities(self, task: rollout_pb2.TeacherTask) -> None:
        if refusal := self._abilities.refusal(task):
            raise UnimplementedError(refusal)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncGenerator[pb.ScoreResponse, None]:
        if not request.task.model:
            raise SpecError("task.model is empty; name a registered model", param="task.model")
        asked = rollout_pb2.TeacherTask()
        asked.CopyFrom(request.task)
        asked.asks.extend(rollout.score for rollout in request.rollouts)
        self._check_abilities(asked)
        items = [await self._reader.item(request.task, rollout) for rollout in request.rollouts]
        try:
            results = await self._scored(request, items)
        except EngineDeadError as error:  # this process ends; another one answers, or this one when it is back
            raise UnavailableError(str(error)) from error
        job_id = request.task.job_id
        scope = Scope(request.task.job_id, request.task.epoch)
        for index, rollout in enumerate(request.rollouts):
            result, batch = results[index]
            if isinstance(result, Scored):
                score = make_score(
                    rollout, items[index], result, batch, scope, self._blobs, self._ctx.instance, is_inline=True
                )
                self._scorer.accounts.sent(job_id, score_bytes(score))
            elif result.reason in CALLER_REASONS:
                raise WireError(f"sample {rollout.sample_id}: {result.message}")
            else:
                score = make_failure(rollout, self._ctx.instance, result.reason, result.message, 1)
            yield pb.ScoreResponse(score=score)

    async def _scored(
        self, request: pb.ScoreRequest, items: Sequence[ScoreItem]
    ) -> dict[int, tuple[Scored | Unscored, Batch]]:
        """Results by index, made in as many turns as it takes."""
        results: dict[int, tuple[Scored | Unscored, Batch]] = {}
        budget, job_id = self._ctx.settings.teacher_batch_tokens, request.task.job_id
        for portion in plan_batches([item.length for item in items], DIRECT_BATCHES * budget):
            async with self._scorer.turn():
                resident, _ = await self._scorer.model(request.task)
                if request.task.follows_student:
                    newest = at_least([request.rollouts[index] for index in portion], request.task.epoch)
                    await self._follower.follow(resident, request.task, newest)
                chosen = [items[index] for index in portion]
                async for batch in self._scorer.batches(
                    resident, chosen, budget=budget, job_id=job_id, is_fresh=request.is_fresh
                ):
                    for index, result in zip(batch.indices, batch.results, strict=True):
                        results[portion[index]] = (result, batch)
        return results

    async def FetchScore(
        self, request: pb.FetchScoreRequest, context: Any
    ) -> AsyncGenerator[pb.FetchScoreResponse, None]:
        for offset, data in self._blobs.read(request.blob):
            failpoint("teacher.serving")
            yield pb.FetchScoreResponse(chunk=tensor_pb2.Chunk(offset=offset, data=data))
        if request.release:
            self._blobs.release(request.blob.key)

    async def FetchHead(self, request: pb.FetchHeadRequest, context: Any) -> AsyncGenerator[pb.FetchHeadResponse, None]:
        async with self._scorer.turn():
            resident, _ = await self._scorer.model(_task(request))
            head = await self._scorer.head(resident)
        yield pb.FetchHeadResponse(
            info=pb.HeadInfo(
                sha256=head.sha256,
                dtype=DTYPE_NAMES[head.dtype],
                shape=head.shape,
                has_bias=head.has_bias,
                vocab_size=head.vocab_size,
                logit_scale=head.logit_scale,
                logit_soft_cap=head.logit_soft_cap,
                size_bytes=head.size_bytes,
            )
        )
        start = 0
        for part in head.parts:
            for offset, data in chunks(part):
                yield pb.FetchHeadResponse(chunk=tensor_pb2.Chunk(offset=start + offset, data=data))
            start += part.nbytes

    async def SyncWeights(
        self, request: pb.TeacherServiceSyncWeightsRequest, context: Any
    ) -> pb.TeacherServiceSyncWeightsResponse:
        self._follower.hint(request.job_id, request.weights)
        owned = [resident for resident in self._scorer.pool.residents() if resident.key[2] == request.job_id]
        return pb.TeacherServiceSyncWeightsResponse(weights=owned[-1].weights if owned else None)


def _task(request: pb.EnsureModelRequest | pb.FetchHeadRequest) -> rollout_pb2.TeacherTask:
    return rollout_pb2.TeacherTask(model=request.model, model_sha256=request.model_sha256, dtype=request.dtype)

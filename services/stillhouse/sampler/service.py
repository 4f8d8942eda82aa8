"""`SamplerService`: steers the worker and the engine, writes completions outside the queue."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stillhouse.core.errors import ConflictError, SpecError, UnimplementedError, WireError
from stillhouse.core.service import VERSION, Context
from stillhouse.core.tensors import dtype_name, floats_tensor, ids_list, ids_tensor
from stillhouse.core.weights import order
from stillhouse.sampler.engines.base import Engine, SampleRequest
from stillhouse.sampler.generation import Completion, Generator, NamesWeights
from stillhouse.sampler.messages import FINISH_REASONS, make_request
from stillhouse.sampler.student import Student
from stillhouse.sampler.worker import SamplerWorker
from stillhouse.v1 import sampler_pb2 as pb
from stillhouse.v1 import sampler_pb2_grpc


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """The gRPC face of a sampler."""

    def __init__(self, ctx: Context, student: Student, generator: Generator, worker: SamplerWorker) -> None:
        self._ctx = ctx
        self._student = student
        self._generator = generator
        self._worker = worker
        self._calls = itertools.count()

    async def GetInfo(self, request: pb.SamplerServiceGetInfoRequest, context: Any) -> pb.SamplerServiceGetInfoResponse:
        student, entry, engine = self._student, self._student.entry, self._student.engine
        return pb.SamplerServiceGetInfoResponse(
            instance=self._ctx.instance,
            engine=self._ctx.settings.engine,
            version=VERSION,
            job_id=self._worker.scope.job_id if self._worker.scope else "",
            weights=student.weights,
            model=entry.name if entry else "",
            tokenizer_sha256=entry.tokenizer_sha256 if entry else "",
            vocab_size=engine.vocab_size if engine else 0,
            max_sequence_length=engine.max_sequence_length if engine else 0,
            paused=self._worker.is_paused,
            sampled_tokens=self._generator.sampled_tokens,
        )

    async def SyncWeights(
        self, request: pb.SamplerServiceSyncWeightsRequest, context: Any
    ) -> pb.SamplerServiceSyncWeightsResponse:
        scope = self._worker.scope
        if scope is None or scope.job_id != request.job_id or scope.epoch > request.weights.epoch:
            serves = f"{scope.job_id} epoch {scope.epoch}" if scope else "no job"
            raise ConflictError(
                f"weights of {request.job_id} epoch {request.weights.epoch}, but this sampler serves {serves}"
            )
        hint = self._student.hint
        if hint is None or order(hint) < order(request.weights):
            self._student.hint = request.weights
        self._worker.wake.set()
        return pb.SamplerServiceSyncWeightsResponse(weights=self._student.weights)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        if request.sampling.record_top_k or request.sampling.record_entropies:
            raise UnimplementedError("likeliest tokens and entropies are recorded in rollouts only; leave out record_*")
        if not request.seeds:
            raise SpecError("no seeds: give one per completion", param="seeds")
        prompt_ids = ids_list(request.prompt_ids)
        call = f"rpc-{next(self._calls)}"
        requests = [
            make_request(f"{call}/{index}", prompt_ids, request.sampling, seed)
            for index, seed in enumerate(request.seeds)
        ]
        if request.model:
            dtype = dtype_name(request.dtype) if request.dtype else "float32"
            async with self._student.guest(request.model, dtype) as engine:
                async for response in self._responses(engine, requests, lambda tag: None):
                    yield response
            return
        await self._check_student()
        student = self._student.engine
        if student is None or self._student.weights is None:
            raise ConflictError("the student is being replaced; try again")
        async for response in self._responses(student, requests, self._student.name_of):
            yield response

    async def _responses(
        self, engine: Engine, requests: list[SampleRequest], weights_of: NamesWeights
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        written = self._generator.generate(engine, [Completion(request) for request in requests], weights_of)
        async with aclosing(written):
            async for completion in written:
                if completion.finish_reason == "failed":
                    raise WireError(f"{completion.reason}: {completion.message}")
                yield pb.GenerateResponse(
                    index=int(completion.key.rpartition("/")[2]),
                    completion_ids=ids_tensor(completion.completion_ids),
                    rollout_logprobs=floats_tensor(completion.rollout_logprobs),
                    finish_reason=FINISH_REASONS[completion.finish_reason],
                    weights=completion.spans[0][1] if completion.spans else None,
                )

    async def _check_student(self) -> None:
        """Have weights of the job that is served.

        Raises:
            ConflictError: there is no job.
        """
        scope = self._worker.scope
        if scope is None:
            raise ConflictError("this sampler serves no job; name a registered model")
        if self._student.version(scope) is None:
            await self._student.ensure(scope)

    async def Pause(self, request: pb.PauseRequest, context: Any) -> pb.PauseResponse:
        self._worker.is_paused = True
        return pb.PauseResponse()

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> pb.ResumeResponse:
        self._worker.is_paused = False
        self._worker.wake.set()
        return pb.ResumeResponse()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=self._generator.abort(request.sample_ids))

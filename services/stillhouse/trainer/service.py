"""TrainerService: what runs here, published weights, where a job stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from stillhouse.core.errors import ConflictError, NotFoundError
from stillhouse.core.service import VERSION
from stillhouse.trainer.lead import Lead
from stillhouse.v1 import trainer_pb2, trainer_pb2_grpc


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers for the job that is led at the moment, if any."""

    def __init__(self, instance: str, leading: Callable[[], Lead | None]) -> None:
        self._instance = instance
        self._leading = leading

    async def GetInfo(self, request: Any, context: Any) -> trainer_pb2.TrainerServiceGetInfoResponse:
        lead = self._leading()
        return trainer_pb2.TrainerServiceGetInfoResponse(
            instance=self._instance,
            version=VERSION,
            job_id=lead.scope.job_id if lead else "",
            epoch=lead.scope.epoch if lead else 0,
        )

    async def FetchWeights(
        self, request: trainer_pb2.FetchWeightsRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.FetchWeightsResponse]:
        lead = self._leading()
        if lead is None or lead.scope.job_id != request.job_id:
            raise ConflictError(f"this trainer does not lead job '{request.job_id}'")
        if lead.publisher is None:
            raise NotFoundError("no weights are published yet")
        followed = lead.run_.followed if lead.run_ else None
        shelf = followed if request.average else lead.publisher
        if shelf is None:
            raise ConflictError(f"job '{request.job_id}' has no teacher that follows its student")
        held = shelf.find(request)
        yield trainer_pb2.FetchWeightsResponse(index=held.index)
        for chunk in held.parts():
            yield trainer_pb2.FetchWeightsResponse(chunk=chunk)

    async def RetrySamples(
        self, request: trainer_pb2.RetrySamplesRequest, context: Any
    ) -> trainer_pb2.RetrySamplesResponse:
        lead = self._leading()
        if (
            lead is None
            or (lead.scope.job_id, lead.scope.epoch) != (request.job_id, request.epoch)
            or lead.run_ is None
        ):
            raise ConflictError(f"this trainer does not lead job '{request.job_id}' in epoch {request.epoch}")
        if lead.spec.deterministic:
            raise ConflictError("a deterministic job goes on as it would have without you: its samples are not retried")
        refusals = {name: await lead.run_.exchange.retry(name) for name in dict.fromkeys(request.sample_ids)}
        return trainer_pb2.RetrySamplesResponse(refusals=refusals)

    async def GetState(self, request: trainer_pb2.GetStateRequest, context: Any) -> trainer_pb2.GetStateResponse:
        lead = self._leading()
        if lead is None or lead.scope.job_id != request.job_id:
            raise NotFoundError(f"this trainer does not lead job '{request.job_id}'")
        run = lead.run_
        refs = run.publisher.refs if run else []
        return trainer_pb2.GetStateResponse(
            job_id=lead.scope.job_id,
            epoch=lead.scope.epoch,
            status=lead.status,
            step=run.step_done if run else 0,
            stop_step=lead.progress.stop_step,
            weights=refs[-1] if refs else None,
            held=refs,
            next_group=run.stage.span.first_group_of(run.step_done) if run else 0,
            groups_in_flight=run.exchange.groups_in_flight if run else 0,
        )

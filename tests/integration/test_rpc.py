"""gRPC between services: credential, typed errors, streams, health, reflection. Loopback, real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from stillhouse.core import errors, rpc
from stillhouse.core.config import Settings
from stillhouse.core.errors import AuthError, ConfigError, DeadlineError, StillhouseError, UnavailableError, WireError
from stillhouse.v1 import tensor_pb2, trainer_pb2, trainer_pb2_grpc

TOKEN = "the-token-of-this-test-deployment"
NAME = "stillhouse.v1.TrainerService"


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Raises what it is told to, streams what it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls = 0
        self.hangs = False

    async def GetInfo(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return trainer_pb2.TrainerServiceGetInfoResponse(instance="t")

    async def FetchWeights(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for offset, data in rpc.chunks(bytes(range(256)) * 20_000):
            yield trainer_pb2.FetchWeightsResponse(chunk=tensor_pb2.Chunk(offset=offset, data=data))
        if self.error is not None:
            raise self.error


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Trainer, rpc.Server, str, Settings]]:
    settings = Settings(home=tmp_path, internal_token=TOKEN).resolved()
    servicer, server = Trainer(), rpc.Server(settings)
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer, NAME)
    address = await server.start()
    yield servicer, server, address, settings
    await server.stop(0)


@pytest.fixture
async def peers(served: Any) -> AsyncIterator[rpc.Peers]:
    made = rpc.Peers(served[3])
    yield made
    await made.close()


def get(peers: rpc.Peers, address: str) -> rpc.Peer:
    return peers.get(address, trainer_pb2_grpc.TrainerServiceStub, "trainer t")


INFO = trainer_pb2.TrainerServiceGetInfoRequest()


async def test_a_call_with_the_credential_is_answered(served: Any, peers: rpc.Peers) -> None:
    assert (await get(peers, served[2]).unary("GetInfo", INFO, timeout_s=5)).instance == "t"


@pytest.mark.parametrize("token", ["", "wrong-token-of-the-same-length!!!", TOKEN + "x"])
async def test_calls_without_it_are_not_executed(served: Any, token: str) -> None:
    servicer, _, address, settings = served
    stranger = rpc.Peers(settings.model_copy(update={"internal_token": token}))
    with pytest.raises(AuthError):
        await get(stranger, address).unary("GetInfo", INFO, timeout_s=5)
    with pytest.raises(AuthError):
        async for _ in get(stranger, address).stream("FetchWeights", trainer_pb2.FetchWeightsRequest(), timeout_s=5):
            pass
    assert servicer.calls == 0
    await stranger.close()


@pytest.mark.parametrize(
    "cls", [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, StillhouseError)]
)
async def test_the_caller_gets_the_class_the_callee_raised(
    served: Any, peers: rpc.Peers, cls: type[StillhouseError]
) -> None:
    served[0].error = cls("got 3, expected 4")
    with pytest.raises(cls, match="got 3, expected 4") as caught:
        await get(peers, served[2]).unary("GetInfo", INFO, timeout_s=5)
    assert type(caught.value) is cls


async def test_an_unplanned_error_says_nothing_about_the_inside(served: Any, peers: rpc.Peers) -> None:
    served[0].error = ZeroDivisionError("secret path")
    with pytest.raises(StillhouseError) as caught:
        await get(peers, served[2]).unary("GetInfo", INFO, timeout_s=5)
    assert "secret path" not in caught.value.message
    assert "ZeroDivisionError" in caught.value.message


async def test_large_payloads_come_in_parts_and_in_order(served: Any, peers: rpc.Peers) -> None:
    parts = get(peers, served[2]).stream("FetchWeights", trainer_pb2.FetchWeightsRequest(), timeout_s=20)
    data = await rpc.collect((part.chunk async for part in parts), 256 * 20_000, "weights")
    assert bytes(data) == bytes(range(256)) * 20_000


@pytest.mark.parametrize("total", [256 * 20_000 - 1, 256 * 20_000 + 1])
async def test_a_payload_of_the_wrong_size_is_refused(served: Any, peers: rpc.Peers, total: int) -> None:
    parts = get(peers, served[2]).stream("FetchWeights", trainer_pb2.FetchWeightsRequest(), timeout_s=20)
    with pytest.raises(WireError, match=str(total)):
        await rpc.collect((part.chunk async for part in parts), total, "weights")


async def test_an_error_amid_a_stream_arrives_typed(served: Any, peers: rpc.Peers) -> None:
    served[0].error = errors.NotFoundError("dropped meanwhile")
    parts = get(peers, served[2]).stream("FetchWeights", trainer_pb2.FetchWeightsRequest(), timeout_s=20)
    with pytest.raises(errors.NotFoundError, match="dropped meanwhile"):
        await rpc.collect((part.chunk async for part in parts), 256 * 20_000, "weights")


async def test_a_service_that_is_gone_is_unavailable_and_comes_back(served: Any, peers: rpc.Peers) -> None:
    servicer, server, address, settings = served
    peer = get(peers, address)
    await server.stop(0)
    with pytest.raises(UnavailableError):
        await peer.unary("GetInfo", INFO, timeout_s=5)
    again = rpc.Server(settings.model_copy(update={"port": int(address.rpartition(":")[2])}))
    again.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer, NAME)
    await again.start()
    assert (await peer.unary("GetInfo", INFO, timeout_s=5, retry_s=10)).instance == "t"
    await again.stop(0)


async def test_what_is_not_implemented_says_so(served: Any, peers: rpc.Peers) -> None:
    with pytest.raises(errors.UnimplementedError):
        await get(peers, served[2]).unary("GetState", trainer_pb2.GetStateRequest(), timeout_s=5)


async def test_health_tells_liveness_from_readiness_without_a_credential(served: Any) -> None:
    _, server, address, _ = served
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> Any:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status

        assert await status("") == health_pb2.HealthCheckResponse.SERVING
        assert await status(NAME) == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_ready(True)
        assert await status(NAME) == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(served: Any) -> None:
    async with grpc.aio.insecure_channel(served[2]) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, channel))
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await anext(aiter(call))
        assert NAME in [service.name for service in answer.list_services_response.service]


async def test_a_taken_port_is_explained(served: Any) -> None:
    _, _, address, settings = served
    second = rpc.Server(settings.model_copy(update={"port": int(address.rpartition(":")[2])}))
    with pytest.raises(ConfigError, match="STILLHOUSE_PORT"):
        await second.start()


async def test_a_slow_answer_meets_its_deadline(served: Any, peers: rpc.Peers) -> None:
    served[0].hangs = True
    with pytest.raises(DeadlineError):
        await get(peers, served[2]).unary("GetInfo", INFO, timeout_s=0.3)

"""A sampler's other side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stillhouse.core.rpc import Server
from stillhouse.v1 import trainer_pb2_grpc
from tests.cluster import Cluster
from tests.desk import (
    Desk,
    FakeTrainer,
    announce,
    open_desk,
)


@pytest.fixture
async def desk(tmp_path: Path, redis_url: str) -> AsyncIterator[Desk]:
    made = Cluster(tmp_path, redis_url, sampler_max_sequences=8)
    made.add_model("student", seed=1, max_position_embeddings=64)
    made.add_model("teacher", seed=2)
    desk = await open_desk(made, tmp_path, FakeTrainer())
    server = Server(made.settings)
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, desk.trainer, "stillhouse.v1.TrainerService")
    address = await server.start()
    beat = asyncio.create_task(announce(made, address))
    try:
        yield desk
    finally:
        beat.cancel()
        await made.close()
        await server.stop(0)

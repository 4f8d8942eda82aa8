"""Mutual TLS between services: real certificates, a real server. Pods dial each other's addresses, which no certificate
names, so all certificates of a deployment carry one name (`tls_name`)."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from stillhouse.cli import healthcheck
from stillhouse.cli.console import CliError
from stillhouse.core.config import Settings
from stillhouse.core.errors import UnavailableError
from stillhouse.core.rpc import Peers, Server
from stillhouse.v1 import trainer_pb2, trainer_pb2_grpc

NAME: Final = "stillhouse.internal"
SERVICE: Final = "stillhouse.v1.TrainerService"
INFO: Final = trainer_pb2.TrainerServiceGetInfoRequest()


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Says its name."""

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return trainer_pb2.TrainerServiceGetInfoResponse(instance="t")


def make_certificates(folder: Path, name: str) -> Settings:
    """A CA and a certificate of it for `name`, and the settings that use them."""
    folder.mkdir()
    ca, key, certificate = folder / "ca.crt", folder / "tls.key", folder / "tls.crt"
    _openssl("-keyout", folder / "ca.key", "-out", ca, "-subj", "/CN=a CA")
    signed = ("-CA", ca, "-CAkey", folder / "ca.key", "-addext", f"subjectAltName=DNS:{name}")
    _openssl("-keyout", key, "-out", certificate, "-subj", "/CN=a service", *signed)
    return Settings(internal_token="t" * 16, tls_cert=certificate, tls_key=key, tls_ca=ca, tls_name=name).resolved()


def _openssl(*arguments: str | Path) -> None:
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run([*new, *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_certificates(tmp_path_factory.mktemp("ours") / "tls", NAME)


@pytest.fixture
async def address(ours: Settings) -> AsyncIterator[str]:
    server = Server(ours)
    server.add(trainer_pb2_grpc.add_TrainerServiceServicer_to_server, Trainer(), SERVICE)
    yield await server.start()
    await server.stop(0)


async def instance_at(address: str, settings: Settings) -> str:
    peers = Peers(settings)
    try:
        trainer = peers.get(address, trainer_pb2_grpc.TrainerServiceStub, "trainer t")
        return (await trainer.unary("GetInfo", INFO, timeout_s=2)).instance
    finally:
        await peers.close()


async def test_services_with_certificates_of_one_name_reach_each_other_by_address(ours: Settings, address: str) -> None:
    assert await instance_at(address, ours) == "t"


async def test_without_the_name_an_address_is_not_in_the_certificate(ours: Settings, address: str) -> None:
    with pytest.raises(UnavailableError):
        await instance_at(address, ours.model_copy(update={"tls_name": ""}))


async def test_another_name_is_refused(ours: Settings, address: str) -> None:
    with pytest.raises(UnavailableError):
        await instance_at(address, ours.model_copy(update={"tls_name": "other.internal"}))


async def test_a_certificate_of_another_ca_is_refused_at_both_ends(
    ours: Settings, address: str, tmp_path: Path
) -> None:
    others = make_certificates(tmp_path / "others", NAME)
    with pytest.raises(UnavailableError):  # it does not trust us
        await instance_at(address, others)
    with pytest.raises(UnavailableError):  # it trusts us, and we do not trust it
        await instance_at(address, others.model_copy(update={"tls_ca": ours.tls_ca}))


async def test_nobody_gets_in_without_a_certificate(ours: Settings, address: str) -> None:
    with pytest.raises(UnavailableError):
        await instance_at(address, Settings(internal_token=ours.internal_token).resolved())


async def test_the_healthcheck_of_a_container_speaks_it(
    ours: Settings, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the probes of k8s/components/mtls run it."""
    for name in ("tls_cert", "tls_key", "tls_ca", "tls_name"):
        monkeypatch.setenv(f"STILLHOUSE_{name.upper()}", str(getattr(ours, name)))
    assert await asyncio.to_thread(healthcheck.check, address, "", 5.0) == "SERVING"
    monkeypatch.delenv("STILLHOUSE_TLS_NAME")
    with pytest.raises(CliError, match="does not answer"):
        await asyncio.to_thread(healthcheck.check, address, "", 5.0)

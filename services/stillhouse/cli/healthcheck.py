"""`stillhouse healthcheck`: asks a service for its health, gRPC or REST, for containers without other tools."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Final

import grpc
from grpc_health.v1 import health_pb2

from stillhouse.cli.console import CliError
from stillhouse.core.config import load_settings
from stillhouse.core.errors import ConfigError

_OPTIONS: Final = [("grpc.enable_http_proxy", 0)]
"""Services are called directly, whatever http_proxy says."""


def check(address: str, service: str, timeout_s: float) -> str:
    """Status of a service ('' = the process as a whole); returns SERVING.

    Raises:
        CliError: it does not answer or does not serve.
    """
    if address.startswith(("http://", "https://")):
        return _ask_gateway(address, timeout_s)
    with _channel(address) as channel:
        ask = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = ask(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]  # grpc's stubs do not say that its errors are calls
            if code == grpc.StatusCode.NOT_FOUND:
                raise CliError(
                    f"{address} does not know the service '{service}'",
                    fix="use its full name: stillhouse.v1.SamplerService",
                ) from None
            raise CliError(f"{address} does not answer: {code.name}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if status != "SERVING":
        raise CliError(f"{service or address} is {status}")
    return status


def _ask_gateway(url: str, timeout_s: float) -> str:
    """A gateway that can serve requests is SERVING."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url.rstrip('/')}/readyz", timeout=timeout_s):
            return "SERVING"
    except urllib.error.HTTPError as error:
        raise CliError(f"{url} is not ready: {error.read(500).decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise CliError(f"{url} does not answer: {error}") from None


def _channel(address: str) -> grpc.Channel:
    settings = load_settings()
    files = (settings.tls_key, settings.tls_cert, settings.tls_ca)
    if not any(files):
        return grpc.insecure_channel(address, options=_OPTIONS)
    if settings.tls_key is None or settings.tls_cert is None or settings.tls_ca is None:
        raise ConfigError("mutual TLS needs all of STILLHOUSE_TLS_CERT, STILLHOUSE_TLS_KEY and STILLHOUSE_TLS_CA")
    return grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            root_certificates=settings.tls_ca.read_bytes(),
            private_key=settings.tls_key.read_bytes(),
            certificate_chain=settings.tls_cert.read_bytes(),
        ),
        options=[*_OPTIONS, *settings.tls_options()],
    )

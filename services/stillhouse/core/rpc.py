"""gRPC between the services: one server set-up, one way to call, one translation of errors.

Every call carries the deployment's internal credential and a deadline. Errors cross the wire as a status plus the
trailing metadata `stillhouse-code`, so that the caller raises the class the callee raised.
"""

from __future__ import annotations

import asyncio
import hmac
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from stillhouse.core import errors
from stillhouse.core.calls import calling, serving
from stillhouse.core.config import Settings
from stillhouse.core.errors import (
    GRPC_STATUS,
    AuthError,
    ConfigError,
    DeadlineError,
    NotFoundError,
    OverloadedError,
    StillhouseError,
    UnavailableError,
    UnimplementedError,
    WireError,
    lookup,
)
from stillhouse.core.metrics import RPC_SECONDS

CHUNK_BYTES: Final = 1 << 20
"""Part size of streamed payloads: Python gRPC is fastest at 256 KiB to 4 MiB, ten times slower in one big message."""
MAX_MESSAGE_BYTES: Final = 64 << 20
"""Largest single message: a bad peer must not be able to take the memory."""
CODE_KEY: Final = "stillhouse-code"
TOKEN_KEY: Final = "authorization"
_OPEN_METHODS: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Probes and reflection need no credential: kubelets cannot send one."""

_OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_OPTIONS: Final[list[tuple[str, Any]]] = [
    *_OPTIONS,
    # without this a zombie and its successor could share a port
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
]
_CLIENT_OPTIONS: Final[list[tuple[str, Any]]] = [
    *_OPTIONS,
    # services call each other directly, whatever http_proxy says
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # a restarted service should be reached within a second, not after gRPC's default of up to two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

_CLASSES: Final[dict[str, type[StillhouseError]]] = {
    cls.code: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, StillhouseError)
}
_BY_STATUS: Final[dict[grpc.StatusCode, type[StillhouseError]]] = {
    grpc.StatusCode.UNAUTHENTICATED: AuthError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: WireError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.CANCELLED: UnavailableError,
}


class _Edge(grpc.aio.ServerInterceptor):
    """Checks the credential, times the call, turns our exceptions into statuses."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN_METHODS):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        presented = str(metadata.get(TOKEN_KEY, "")).encode()
        is_known = hmac.compare_digest(presented, self._expected)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method, is_known, metadata),
                handler.request_deserializer,
                handler.response_serializer,
            )
        assert handler.unary_stream is not None, f"{method}: only unary and server-stream calls exist"
        return grpc.unary_stream_rpc_method_handler(
            _guard_stream(handler.unary_stream, method, is_known, metadata),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _guard_unary(behavior: Any, method: str, is_known: bool, metadata: Mapping[str, Any]) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        with _timed(method) as call:
            try:
                _require(is_known, method)
                with serving(method, metadata):
                    return await behavior(request, context)
            except Exception as error:
                call.code = _status(error).name
                await _abort(context, method, error)

    return guarded


def _guard_stream(behavior: Any, method: str, is_known: bool, metadata: Mapping[str, Any]) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        with _timed(method) as call:
            try:
                _require(is_known, method)
                with serving(method, metadata):
                    async for part in behavior(request, context):
                        yield part
            except Exception as error:
                call.code = _status(error).name
                await _abort(context, method, error)

    return guarded


def _require(is_known: bool, method: str) -> None:
    if not is_known:
        raise AuthError(
            f"{method}: the internal credential is missing or wrong; give all services the same "
            "STILLHOUSE_INTERNAL_TOKEN, or file that STILLHOUSE_INTERNAL_TOKEN_FILE names"
        )


def _status(error: Exception) -> grpc.StatusCode:
    if isinstance(error, NotImplementedError):
        return grpc.StatusCode.UNIMPLEMENTED
    return getattr(grpc.StatusCode, lookup(GRPC_STATUS, error, "INTERNAL"))


async def _abort(context: grpc.aio.ServicerContext, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError) and not isinstance(error, StillhouseError):
        # raised by the generated base class of a service
        error = UnimplementedError(f"{method} is part of the contract and not implemented yet")
    status = _status(error)
    if isinstance(error, StillhouseError):
        await context.abort(status, error.message, trailing_metadata=((CODE_KEY, error.code),))
    # an error nobody planned: details go to the log, the caller learns only that it happened
    structlog.get_logger().error("rpc failed", method=method, exc_info=error)
    await context.abort(status, f"{method} failed: {type(error).__name__}; see the service's log")


class _timed:
    """Observes the duration of a call, by method and status. A caller that leaves ends it in its middle: CANCELLED."""

    def __init__(self, method: str) -> None:
        self._method = method
        self.code = "OK"

    def __enter__(self) -> _timed:
        self._start = time.monotonic()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        code = "CANCELLED" if kind and self.code == "OK" else self.code
        RPC_SECONDS.labels(self._method, code).observe(time.monotonic() - self._start)


class Server:
    """A gRPC server with health, reflection, credential check and error translation."""

    def __init__(self, settings: Settings) -> None:
        settings.check_internal_token()
        self._settings = settings
        self.aio = grpc.aio.server(interceptors=[_Edge(settings.internal_token)], options=_SERVER_OPTIONS)
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.aio)
        self._names: list[str] = []

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: Any, full_name: str) -> None:
        """Serve a generated service (`add_XServicer_to_server`, servicer, "stillhouse.v1.X")."""
        register(servicer, self.aio)
        self._names.append(full_name)

    async def start(self) -> str:
        """Listen; returns host:port. Health is NOT_SERVING until `set_ready`."""
        if self._settings.reflection:
            reflection.enable_server_reflection(
                (*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
                self.aio,
            )
        address = f"{self._settings.host}:{self._settings.port}"
        try:
            credentials = _server_credentials(self._settings)
            port = (
                self.aio.add_secure_port(address, credentials) if credentials else self.aio.add_insecure_port(address)
            )
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {address}: the port is taken; choose another with STILLHOUSE_PORT"
            ) from None
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)
        await self.aio.start()
        return f"{self._settings.advertise_host}:{port}"

    async def set_ready(self, is_ready: bool) -> None:
        """Readiness = health of the full service name."""
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end for `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self.aio.stop(grace_s)


class Peer:
    """Another service: calls with credential, deadline and typed errors."""

    def __init__(self, channel: grpc.aio.Channel, stub: Any, token: str, what: str) -> None:
        self._channel = channel
        self._stub = stub
        self._metadata = ((TOKEN_KEY, f"Bearer {token}"),)
        self._service = f"/stillhouse.v1.{type(stub).__name__.removesuffix('Stub')}/"
        self.what = what

    async def unary(self, method: str, request: Any, *, timeout_s: float, retry_s: float = 0.0) -> Any:
        """One answer. With `retry_s`, an unreachable service is tried again for so long (idempotent calls only).

        Raises:
            StillhouseError: the class the callee raised; UnavailableError or DeadlineError if there was no answer.
        """
        give_up_at = time.monotonic() + retry_s
        pause_s = 0.1
        while True:
            try:
                with calling(self._service + method) as along:
                    metadata = self._metadata + along
                    return await getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                typed = _typed(error, f"{self.what} {method}")
                if not isinstance(typed, UnavailableError) or time.monotonic() + pause_s > give_up_at:
                    raise typed from None
            # jitter, so that many callers do not come back at the same moment
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, 2.0)

    async def stream(self, method: str, request: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        """Parts of the answer, in order. A broken stream is the caller's to start again."""
        try:
            with calling(self._service + method) as along:
                call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata + along)
                try:
                    async for part in call:
                        yield part
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            raise _typed(error, f"{self.what} {method}") from None

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class Peers:
    """Channels to other services, one per address."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peers: dict[tuple[str, type], Peer] = {}

    def get(self, address: str, stub_class: Callable[[Any], Any], what: str) -> Peer:
        """The peer at `address` (host:port, from the registry), speaking `stub_class`."""
        key = (address, stub_class)
        if key not in self._peers:  # type: ignore[comparison-overlap]
            credentials = _channel_credentials(self._settings)
            options = [*_CLIENT_OPTIONS, *self._settings.tls_options()]
            channel = (
                grpc.aio.secure_channel(address, credentials, options=options)
                if credentials
                else grpc.aio.insecure_channel(address, options=options)
            )
            self._peers[key] = Peer(channel, stub_class(channel), self._settings.internal_token, what)  # type: ignore[index]
        return self._peers[key]  # type: ignore[index]

    async def close(self) -> None:
        """Close all channels."""
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()


def chunks(payload: bytes | memoryview, size: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """(offset, part) pairs of a payload."""
    view = memoryview(payload).cast("B")
    for offset in range(0, len(view), size):
        yield offset, bytes(view[offset : offset + size])


async def collect(parts: AsyncIterable[Any], total_bytes: int, what: str) -> bytearray:
    """Join `Chunk` parts into one buffer; checks order and size.

    Raises:
        WireError: a part is missing, out of order or too long.
    """
    buffer = bytearray(total_bytes)
    filled = 0
    async for chunk in parts:
        if chunk.offset != filled or filled + len(chunk.data) > total_bytes:
            raise WireError(
                f"{what}: part at {chunk.offset} of {len(chunk.data)} bytes, expected offset {filled} of {total_bytes}"
            )
        buffer[filled : filled + len(chunk.data)] = chunk.data
        filled += len(chunk.data)
    if filled != total_bytes:
        raise WireError(f"{what}: got {filled} of {total_bytes} bytes")
    return buffer


def _typed(error: grpc.aio.AioRpcError, what: str) -> StillhouseError:
    metadata = dict(error.trailing_metadata() or ())
    code = str(metadata.get(CODE_KEY, ""))
    cls = _CLASSES.get(code) or _BY_STATUS.get(error.code(), StillhouseError)
    details = error.details() or error.code().name
    return cls(details if code else f"{what}: {details}")


def _server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    files = _tls_files(settings)
    if files is None:
        return None
    key, certificate, ca = files
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)


def _channel_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    files = _tls_files(settings)
    if files is None:
        return None
    key, certificate, ca = files
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=certificate)


def _tls_files(settings: Settings) -> tuple[bytes, bytes, bytes] | None:
    paths = [path for path in (settings.tls_key, settings.tls_cert, settings.tls_ca) if path is not None]
    if not paths:
        return None
    if len(paths) < 3:
        raise ConfigError("mutual TLS needs all of STILLHOUSE_TLS_CERT, STILLHOUSE_TLS_KEY and STILLHOUSE_TLS_CA")
    key, certificate, ca = (path.read_bytes() for path in paths)
    return key, certificate, ca

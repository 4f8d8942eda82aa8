"""The typed errors of Stillhouse and the two tables that translate them.

Handlers raise; the edges translate: one gRPC interceptor (core/rpc.py) and one FastAPI handler (gateway/problems.py)
walk the exception's MRO through `GRPC_STATUS` and `HTTP_STATUS`. Messages name both sides of a mismatch and the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")


class StillhouseError(Exception):
    """Base of every error that Stillhouse raises on purpose; `code` is its stable, machine-readable name."""

    code: str = "internal"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """Path of the offending field in the user's input (`stages.0.loss.objective`), where there is one."""

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __reduce__(self):  # keeps `param` through pickling by multiprocessing
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(cls: type[StillhouseError], message: str, param: str | None) -> StillhouseError:
    return cls(message, param=param)


class ConfigError(StillhouseError, ValueError):
    """A setting of the deployment is wrong or missing."""

    code = "bad_config"


class SpecError(StillhouseError, ValueError):
    """A job, file or model that a user sent cannot be accepted."""

    code = "invalid_request"


class MalformedError(SpecError):
    """The body is not what its content type says, for example broken JSON."""

    code = "malformed"


class MediaTypeError(SpecError):
    """The content type is not one that this endpoint takes."""

    code = "unsupported_media_type"


class NotFoundError(StillhouseError, LookupError):
    """The thing named does not exist (any more)."""

    code = "not_found"


class ConflictError(StillhouseError):
    """The request does not fit the present state, for example cancelling a finished job."""

    code = "conflict"


class AuthError(StillhouseError, PermissionError):
    """The credential is missing or wrong."""

    code = "unauthorized"


class ForbiddenError(AuthError):
    """The credential is right and not allowed to do this."""

    code = "forbidden"


class QuotaError(ForbiddenError):
    """The request is right and over what its caller may use: waiting a moment does not help."""

    code = "quota_exceeded"


class TooLargeError(StillhouseError, ValueError):
    """A body, file or message is over its limit."""

    code = "too_large"


class WireError(StillhouseError, ValueError):
    """A message from another service contradicts itself or its contract."""

    code = "bad_message"


class EpochClosedError(StillhouseError):
    """The work belongs to an epoch of the job that another claim has closed; drop it."""

    code = "epoch_closed"


class LeaseLostError(EpochClosedError):
    """The lease of the job went to another process; stop without touching anything."""

    code = "lease_lost"


class StaleWeightsError(StillhouseError):
    """The weights at hand are older than the work allows."""

    code = "stale_weights"


class WeightsError(StillhouseError):
    """Weights are torn, non-finite or do not match their name."""

    code = "bad_weights"


class CorruptError(StillhouseError):
    """A file on disk does not verify: a torn write or a flipped bit."""

    code = "corrupt"


class OverloadedError(StillhouseError):
    """A limit of queue, memory or disk is reached; try again later."""

    code = "overloaded"


class RateError(OverloadedError):
    """A caller sends more than its key may; the same request works after a while."""

    code = "rate_limited"
    retry_after_s: float = 1.0
    """When it may try again."""


class EngineStartError(StillhouseError):
    """An engine does not start with this model, these settings and this memory."""

    code = "engine_not_started"


class EngineDeadError(RuntimeError):
    """An engine is gone and will not come back: the process ends, to be started again. Not a StillhouseError, which
    workers wait out: it may be a sample that ends one engine after the other, and then its deliveries must count.
    """


ENGINE_ERRORS: Final = (RuntimeError, ValueError, IndexError, MemoryError, ArithmeticError)
"""What an engine raises about its input or its memory; anything else is a bug and ends the process."""


class UnavailableError(StillhouseError, ConnectionError):
    """A service that is needed does not answer (yet)."""

    code = "unavailable"


class DeadlineError(StillhouseError, TimeoutError):
    """Something that was waited for did not happen in time."""

    code = "deadline"


class NonFiniteError(StillhouseError, ArithmeticError):
    """A NaN or infinity where a number is needed."""

    code = "non_finite"

    def __init__(self, message: str, *, param: str | None = None, sample_ids: Sequence[str] = ()) -> None:
        super().__init__(message, param=param)
        self.sample_ids = tuple(sample_ids)
        """Samples that caused it, as far as they were looked for."""


class JobFailedError(StillhouseError):
    """The job cannot go on; the message is its `error` on REST."""

    code = "job_failed"


class PreflightError(JobFailedError):
    """A check before training refused the job."""

    code = "preflight"


class UnimplementedError(StillhouseError, NotImplementedError):
    """Part of the contract, not built yet."""

    code = "unimplemented"


# What the caller should do next: UNAVAILABLE retry the call, ABORTED start the step over, FAILED_PRECONDITION wait for
# the state to change, INVALID_ARGUMENT fix the request, RESOURCE_EXHAUSTED slow down.
GRPC_STATUS: Final[dict[type[BaseException], str]] = {
    AuthError: "UNAUTHENTICATED",
    ForbiddenError: "PERMISSION_DENIED",
    NotFoundError: "NOT_FOUND",
    ConflictError: "FAILED_PRECONDITION",
    EpochClosedError: "FAILED_PRECONDITION",
    StaleWeightsError: "FAILED_PRECONDITION",
    SpecError: "INVALID_ARGUMENT",
    ConfigError: "FAILED_PRECONDITION",
    TooLargeError: "INVALID_ARGUMENT",
    WireError: "INVALID_ARGUMENT",
    EngineStartError: "FAILED_PRECONDITION",
    WeightsError: "DATA_LOSS",
    CorruptError: "DATA_LOSS",
    NonFiniteError: "DATA_LOSS",
    OverloadedError: "RESOURCE_EXHAUSTED",
    UnavailableError: "UNAVAILABLE",
    DeadlineError: "DEADLINE_EXCEEDED",
    UnimplementedError: "UNIMPLEMENTED",
    StillhouseError: "INTERNAL",
}

HTTP_STATUS: Final[dict[type[BaseException], int]] = {
    AuthError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    ConflictError: 409,
    EpochClosedError: 409,
    TooLargeError: 413,
    MalformedError: 400,
    MediaTypeError: 415,
    SpecError: 422,
    WireError: 422,
    OverloadedError: 429,
    UnavailableError: 503,
    DeadlineError: 504,
    UnimplementedError: 501,
    StillhouseError: 500,
}


def lookup(table: dict[type[BaseException], T], error: BaseException, default: T) -> T:
    """The entry of the most specific class of `error` in `table`."""
    for cls in type(error).__mro__:
        if cls in table:
            return table[cls]
    return default

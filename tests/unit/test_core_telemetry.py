"""Logs: what a traceback shows and what it must not."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import structlog

from stillhouse.core.config import Settings
from stillhouse.core.telemetry import setup_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, hooks = root.handlers, root.level, (sys.excepthook, threading.excepthook)
    yield
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook = hooks
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def crash() -> None:
    prompt = "a-prompt-that-" + "is-private"
    raise RuntimeError(f"a crash with {len(prompt)} characters")


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("is_stdlib", [True, False], ids=["stdlib", "structlog"])
def test_a_logged_exception_has_a_traceback_and_no_local_values(
    capsys: pytest.CaptureFixture[str], log_format: str, is_stdlib: bool
) -> None:
    settings = Settings.model_validate({"log_format": log_format})
    own = setup_logging(settings, "gateway", "gateway-1")
    log = logging.getLogger("some.library") if is_stdlib else own
    try:
        crash()
    except RuntimeError:
        log.exception("request crashed")
    text = capsys.readouterr().err
    assert "request crashed" in text
    assert "Traceback" in text
    assert "a crash with 24 characters" in text
    assert "a-prompt-that-is-private" not in text


@pytest.mark.parametrize("is_stdlib", [True, False], ids=["stdlib", "structlog"])
def test_a_credential_that_an_error_quotes_is_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_stdlib: bool
) -> None:
    token, key, header = 'a-"very"-secret-token', "stillhouse_" + "k" * 43, "collector-credential"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={header}")
    settings = Settings.model_validate(
        {"log_format": "json", "internal_token": token, "redis_url": "redis://:hunter22@queue:6379/0"}
    )
    own = setup_logging(settings, "gateway", "gateway-1")
    log = logging.getLogger("some.library") if is_stdlib else own
    log.warning(f"refused: {token}, {settings.redis_url}, {key}, {header}")
    line = json.loads(capsys.readouterr().err)
    assert line["event"] == "refused: ***, redis://:***@queue:6379/0, stillhouse_***, ***"


def test_what_would_be_bare_text_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging(Settings.model_validate({"log_format": "json"}), "gateway", "gateway-1")
    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["event"] == "uncaught exception"
    assert "Traceback" in first["exception"]
    assert "DeprecationWarning: old" in second["event"]

"""Logs: what a traceback shows and what it must not."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from stillhouse.core.config import Settings
from stillhouse.core.telemetry import setup_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
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

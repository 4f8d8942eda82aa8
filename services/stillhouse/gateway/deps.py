"""What route functions get from the application."""

from __future__ import annotations

from fastapi import Request

from stillhouse.core.service import Context


def get_context(request: Request) -> Context:
    """The connections of this process."""
    return request.app.state.ctx

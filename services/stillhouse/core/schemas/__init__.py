"""What the REST interface answers, as pydantic models: the source of the OpenAPI document, and what the client gives.

Times are RFC 3339, UTC.
"""

from __future__ import annotations

from stillhouse.core.schemas.base import Answer, JobId, Page
from stillhouse.core.schemas.catalog import File, FileDeleted, Model, Recipe, RecipePreset, Verifier
from stillhouse.core.schemas.generation import GeneratedText, Generation, GenerationUsage
from stillhouse.core.schemas.history import Checkpoint, DeadLetter, Event, MetricPoint
from stillhouse.core.schemas.jobs import Job, Kind, Progress, Status
from stillhouse.core.schemas.keys import Key, KeyInfo, KeyLimits, KeyScope, NewKey
from stillhouse.core.schemas.preflight import Check, Estimate, Preflight, Tokens, Verdict
from stillhouse.core.schemas.report import Comparison, Curve, Report, Shown
from stillhouse.core.schemas.samples import (
    LetterRetries,
    LetterRetry,
    LogLine,
    Sample,
    SampleFailure,
    SampleSpan,
    SampleToken,
    TokenChoice,
)
from stillhouse.core.schemas.scores import ScoreError, Scores, ScoreUsage, TextScore
from stillhouse.core.schemas.system import Health, Queue, Service, Services

__all__ = [
    "Answer",
    "Check",
    "Checkpoint",
    "Comparison",
    "Curve",
    "DeadLetter",
    "Estimate",
    "Event",
    "File",
    "FileDeleted",
    "GeneratedText",
    "Generation",
    "GenerationUsage",
    "Health",
    "Job",
    "JobId",
    "Key",
    "KeyInfo",
    "KeyLimits",
    "KeyScope",
    "Kind",
    "LetterRetries",
    "LetterRetry",
    "LogLine",
    "MetricPoint",
    "Model",
    "NewKey",
    "Page",
    "Preflight",
    "Progress",
    "Queue",
    "Recipe",
    "RecipePreset",
    "Report",
    "Sample",
    "SampleFailure",
    "SampleSpan",
    "SampleToken",
    "ScoreError",
    "ScoreUsage",
    "Scores",
    "Service",
    "Services",
    "Shown",
    "Status",
    "TextScore",
    "TokenChoice",
    "Tokens",
    "Verdict",
    "Verifier",
]

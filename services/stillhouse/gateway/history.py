"""A job's metrics: from Redis, and what Redis no longer has from the file beside the job's artifacts."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Sequence
from typing import Any

from stillhouse.core.blobs import read_jsonl
from stillhouse.core.schemas import MetricPoint
from stillhouse.core.service import Context


async def read_metrics(ctx: Context, job_id: str, step_from: int, step_to: int | None) -> list[dict[str, Any]]:
    """Metric points by step; of steps that were trained again after a takeover the newest."""
    points = await ctx.jobs.metrics(job_id, step_from=step_from, step_to=step_to)
    if points and points[0]["step"] <= max(step_from, 1):
        return points
    older = await asyncio.to_thread(_metrics_on_disk, ctx, job_id, step_from, step_to)
    merged = {point["step"]: point for point in [*older, *points]}
    return [merged[step] for step in sorted(merged)]


def _metrics_on_disk(ctx: Context, job_id: str, step_from: int, step_to: int | None) -> list[dict[str, Any]]:
    return [
        point
        for point in read_jsonl(ctx.artifacts.job(job_id).metrics)
        if point["step"] >= step_from and (step_to is None or point["step"] <= step_to)
    ]


def metrics_csv(points: Sequence[MetricPoint]) -> str:
    """epoch, first and last step, stage, created_at and one column per metric; empty where a step lacks it."""
    names = sorted({name for point in points for name in point.values})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", "first_step", "step", "stage", "created_at", *names])
    for point in points:
        cells = [point.values.get(name) for name in names]
        row = [point.epoch, point.first_step, point.step, point.stage, point.created_at]
        writer.writerow([*row, *("" if cell is None else cell for cell in cells)])
    return text.getvalue()

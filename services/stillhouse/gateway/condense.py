"""Fewer points of the same curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def condensed(points: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` points, in order of their steps: neighbours become one, as many in each but the last.

    A value is the mean over the steps that have a finite one, NaN if none has; what else a point says is of its last
    step, and `first_step` is that of its first.
    """
    size = math.ceil(len(points) / most) if points else 1
    return [_mean(points[start : start + size]) for start in range(0, len(points), size)]


def _mean(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, float] = {}
    for name in dict.fromkeys(name for point in points for name in point["values"]):
        found = [point["values"][name] for point in points if name in point["values"]]
        finite = [value for value in found if value is not None and math.isfinite(value)]
        values[name] = math.fsum(finite) / len(finite) if finite else math.nan
    return {**points[-1], "first_step": points[0]["step"], "values": values}

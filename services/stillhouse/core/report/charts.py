"""Curves as inline SVG: no scripts, no fonts, nothing that is fetched. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from stillhouse.core.schemas.report import Curve

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
"""Margins, in units of the picture."""
COLOURS: Final = 6
"""Classes c0, c1 ... of the page's style."""
TICKS: Final = 4


def chart(title: str, unit: str, curves: Mapping[str, Curve]) -> str:
    """A figure with a line for each curve, by label; empty if none has a value."""
    known = {label: _known(curve) for label, curve in curves.items()}
    known = {label: points for label, points in known.items() if points}
    if not known:
        return ""
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in points]
    low, high, ticks = _axis(min(ys), max(ys))
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [_grid(place(first, y)[1], y) for y in ticks]
    parts += [
        f'<text class="t" x="{place(x, low)[0]}" y="{HEIGHT - 8}" text-anchor="middle">{x}</text>'
        for x in (first, last)
    ]
    parts += [_line([place(x, y) for x, y in points], number) for number, points in enumerate(known.values())]
    described = f"{title}, {unit}" if unit else title
    legend = _legend(list(known)) if len(known) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _known(curve: Curve) -> list[tuple[int, float]]:
    return [(x, y) for x, y in zip(curve.steps, curve.values, strict=True) if y is not None and math.isfinite(y)]


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds at round numbers, and the ticks between."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / size), math.ceil(high / size)
    return first * size, last * size, [number * size for number in range(first, last + 1)]


def _grid(y: float, value: float) -> str:
    label = f"{value:.4g}"
    return (
        f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="t" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>'
    )


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    colour = f"c{number % COLOURS}"
    dots = (
        "".join(f'<circle class="d {colour}" cx="{x}" cy="{y}" r="2.4"/>' for x, y in points)
        if len(points) < 25
        else ""
    )
    joined = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="l {colour}" points="{joined}"/>{dots}'


def _legend(labels: Sequence[str]) -> str:
    items = "".join(
        f'<span><i class="c{number % COLOURS}"></i>{escape(label)}</span>' for number, label in enumerate(labels)
    )
    return f'<div class="legend">{items}</div>'

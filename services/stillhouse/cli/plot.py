"""Curves of a job as a picture. matplotlib is imported here and nowhere else, without pyplot and its global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillhouse.cli.console import INSTALL_FIX, CliError
from stillhouse.cli.follow import Picture
from stillhouse.cli.views import KL

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    """(metric, label); a single curve needs no label."""
    is_smoothed: bool = False
    """Also draw a running mean: the raw curve is noisy."""
    is_from_zero: bool = False
    """Let the axis begin at 0: the size counts, not only the change."""
    is_sparse: bool = False
    """Measured now and then: points, joined over the steps between."""


PANELS: Final = (
    Panel("reverse KL(student || teacher)", "nats per token", (("loss/reverse_kl/mean", ""),), is_smoothed=True),
    Panel("loss", "", (("loss/total", ""),), is_smoothed=True),
    Panel("learning rate", "", (("lr", ""),), is_from_zero=True),
    Panel(
        "throughput",
        "tokens/s",
        (("sample/tokens_per_s", "sample"), ("score/tokens_per_s", "score"), ("train/tokens_per_s", "train")),
        is_from_zero=True,
    ),
    Panel(
        "sampler-trainer mismatch",
        "mean |difference|, nats",
        (("mismatch/logprob_abs_mean", ""),),
        is_from_zero=True,
    ),
    Panel(
        "time per step",
        "s",
        (("time/wait_s", "wait for rollouts"), ("time/train_s", "train"), ("time/publish_s", "publish")),
        is_from_zero=True,
    ),
)
"""Of every job."""
REWARD: Final = Panel("reward", "mean of the step", (("reward/mean", ""),), is_smoothed=True)
FAMILIES: Final = (
    Panel("reverse KL by teacher", "nats per token", (("loss/reverse_kl/", ""),), is_smoothed=True),
    Panel("reward by teacher", "mean of the step", (("reward/mean/", ""),), is_smoothed=True),
    Panel("share of the trained tokens", "", (("tokens/share/", ""),), is_from_zero=True),
    Panel("held-out reverse KL", "nats per token", (("held_out/reverse_kl/", ""),), is_sparse=True),
    Panel("held-out accuracy", "", (("held_out/accuracy/", ""),), is_from_zero=True, is_sparse=True),
)
"""Of jobs that have such metrics: a curve for each whose name begins so, labelled by the rest."""
COLUMNS: Final = 3
SMOOTHING_SHARE: Final = 20
"""The running mean covers 1/20 of the curve: the trend stays, the noise of single batches goes."""
_COLOURS: Final = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#475569")


def plot(job: Any, points: Sequence[Any], evaluations: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw a job's metrics and held-out measures into `target` (png, svg or pdf by its suffix).

    Raises:
        CliError: matplotlib is missing, there is nothing to draw yet, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CliError("`stillhouse plot` needs matplotlib", fix=INSTALL_FIX) from None
    if not points:
        raise CliError(f"job {job['id']} has no finished step yet", fix=f"stillhouse watch {job['id']}")
    picture = Picture(job=job, points={int(point["step"]): _numbers(point["values"]) for point in points})
    held_out = Picture(job=job, points={int(each["step"]): _held_out(each) for each in evaluations})
    panels = [*_panels(picture), *_families(picture, held_out)]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(12, 3.25 * rows), dpi=150, layout="constrained")
    places = list(figure.subplots(rows, COLUMNS).flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, held_out if panel.is_sparse else picture)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    name = f"{job.get('name') or ''}  {job['id']}".strip()
    figure.suptitle(f"{name}   {picture.status}, {len(picture.points)} steps", fontsize=12, parse_math=False)
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        raise CliError(f"cannot write {target}: {error}", fix="use a .png, .svg or .pdf file name") from None


def _panels(picture: Picture) -> list[Panel]:
    """Those of every job, and the reward's: in place of the first, where no teacher was asked."""
    if picture.last("reward/mean") is None:
        return [*PANELS]
    return [REWARD, *PANELS[1:]] if picture.last(KL) is None else [*PANELS, REWARD]


def _families(*pictures: Picture) -> list[Panel]:
    """Panels of the families that the job has more of than the mean."""
    names = sorted({name for picture in pictures for values in picture.points.values() for name in values})
    found = []
    for family in FAMILIES:
        ((prefix, _),) = family.curves
        curves = tuple((name, name.removeprefix(prefix)) for name in names if name.startswith(prefix))
        if any(name != KL for name, _ in curves):
            found.append(replace(family, curves=curves))
    return found


def _held_out(evaluation: dict[str, Any]) -> dict[str, float]:
    """Measures of an evaluation as metrics: of all prompts, and of each of several teachers."""
    by_teacher = evaluation.get("by_teacher") or {}
    parts = {**(by_teacher if len(by_teacher) > 1 else {}), "mean": evaluation}
    return {
        f"held_out/{measure}/{name}": float(part[measure])
        for name, part in parts.items()
        for measure in ("reverse_kl", "accuracy")
        if part.get(measure) is not None
    }


def _draw(axes: Axes, panel: Panel, picture: Picture) -> None:
    from matplotlib.ticker import MaxNLocator

    for (metric, label), colour in zip(panel.curves, cycle(_COLOURS), strict=False):
        _draw_curve(axes, panel, picture, metric, label=label, color=colour)
    if panel.is_from_zero and not all(math.isnan(v) for metric, _ in panel.curves for v in picture.curve(metric)):
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(panel.curves) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=1 + len(panel.curves) // 6)


def _draw_curve(axes: Axes, panel: Panel, picture: Picture, metric: str, **look: Any) -> None:
    steps, values = sorted(picture.points), picture.curve(metric)
    if panel.is_sparse:
        known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        axes.plot([step for step, _ in known], [value for _, value in known], "o-", linewidth=1.4, markersize=4, **look)
    elif panel.is_smoothed and len(steps) >= SMOOTHING_SHARE:
        axes.plot(steps, values, color=look["color"], linewidth=1.4, alpha=0.3)
        axes.plot(steps, running_mean(values, len(steps) // SMOOTHING_SHARE), linewidth=1.8, **look)
    else:  # a single point has no line: mark it
        axes.plot(steps, values, "o" if len(steps) == 1 else "-", linewidth=1.4, **look)


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the `window` values before and after each (fewer at the ends), gaps left out."""
    means = []
    for index in range(len(values)):
        part = [v for v in values[max(0, index - window) : index + window + 1] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}

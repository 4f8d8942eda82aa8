"""Curves of a job as a picture. matplotlib is imported here and nowhere else, without pyplot and its global state."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
REWARD: Final = Panel("reward", "mean of the step", (("reward/mean", ""),), is_smoothed=True)
"""In place of the first panel, where no teacher was asked."""
SMOOTHING_SHARE: Final = 20
"""The running mean covers 1/20 of the curve: the trend stays, the noise of single batches goes."""
_BLUE, _COLOURS = "#2563eb", ("#2563eb", "#d97706", "#059669")


def plot(job: dict[str, Any], points: list[dict[str, Any]], target: Path) -> None:
    """Draw the curves of a job into `target` (png, svg or pdf by its suffix).

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
    steps = sorted(picture.points)
    figure = Figure(figsize=(12, 6.5), dpi=150, layout="constrained")
    is_rewarded = picture.last("reward/mean") is not None
    panels = (REWARD, *PANELS[1:]) if is_rewarded and picture.last(KL) is None else PANELS
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        _draw(axes, panel, steps, picture)
    name = f"{job.get('name') or ''}  {job['id']}".strip()
    figure.suptitle(f"{name}   {picture.status}, {len(steps)} steps", fontsize=12, parse_math=False)
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        raise CliError(f"cannot write {target}: {error}", fix="use a .png, .svg or .pdf file name") from None


def _draw(axes: Axes, panel: Panel, steps: list[int], picture: Picture) -> None:
    from matplotlib.ticker import MaxNLocator

    for (metric, label), colour in zip(panel.curves, _COLOURS, strict=False):
        values = picture.curve(metric)
        is_faint = panel.is_smoothed and len(steps) >= SMOOTHING_SHARE
        # a single point has no line: mark it
        style = "o" if len(steps) == 1 else "-"
        axes.plot(steps, values, style, color=colour, label=label, linewidth=1.4, alpha=0.3 if is_faint else 1.0)
        if is_faint:
            axes.plot(steps, running_mean(values, len(steps) // SMOOTHING_SHARE), color=_BLUE, linewidth=1.8)
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
        axes.legend(fontsize=8, frameon=False)


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the `window` values before and after each (fewer at the ends), gaps left out."""
    means = []
    for index in range(len(values)):
        part = [v for v in values[max(0, index - window) : index + window + 1] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}

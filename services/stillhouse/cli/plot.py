"""Curves of jobs as a picture. matplotlib is imported here and nowhere else, without pyplot and its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillhouse.cli.console import EXIT_USAGE, INSTALL_FIX, CliError, done
from stillhouse.cli.follow import Picture
from stillhouse.cli.views import KL
from stillhouse.client.client import Client

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
_DASHES: Final = ("-", "--", ":", "-.")
_COLOURS: Final = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#475569")


@dataclass(frozen=True, slots=True)
class Run:
    """A job with what can be drawn of it."""

    picture: Picture
    held_out: Picture

    @property
    def name(self) -> str:
        """What its curves are called."""
        return f"{self.picture.job.get('name') or ''}  {self.picture.job['id']}".strip()


def make_run(job: Any, points: Sequence[Any], evaluations: Sequence[Mapping[str, Any]]) -> Run:
    """A job's metrics and held-out measures.

    Raises:
        CliError: there is nothing to draw yet.
    """
    if not points:
        raise CliError(f"job {job['id']} has no finished step yet", fix=f"stillhouse watch {job['id']}")
    return Run(
        Picture(job=job, points={int(point["step"]): _numbers(point["values"]) for point in points}),
        Picture(job=job, points={int(each["step"]): _held_out(each) for each in evaluations}),
    )


def draw(job_ids: Sequence[str], target: Path, names: Sequence[str], *, as_json: bool) -> None:
    """Fetch jobs and draw them."""
    with Client() as client:
        runs = [
            make_run(client.jobs.get(job_id), client.jobs.metrics(job_id), client.jobs.evaluations(job_id))
            for job_id in dict.fromkeys(job_ids)
        ]
    plot(runs, target, names)
    done(f"wrote {target}", as_json=as_json, path=str(target))


def plot(runs: Sequence[Run], target: Path, names: Sequence[str] = ()) -> None:
    """Draw jobs into `target` (png, svg or pdf by its suffix): the usual panels, or one for each named metric.

    Raises:
        CliError: matplotlib is missing, no job has a metric of this name, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CliError("`stillhouse plot` needs matplotlib", fix=INSTALL_FIX) from None
    panels = [_named(runs, name) for name in names] or _usual(runs)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3.25 * rows), dpi=150, layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, runs)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    _title(figure, runs)
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        raise CliError(f"cannot write {target}: {error}", fix="use a .png, .svg or .pdf file name") from None


def _title(figure: Figure, runs: Sequence[Run]) -> None:
    """One job: its name. Several: a legend of their colours."""
    if len(runs) == 1:
        (run,) = runs
        state = f"{run.picture.status}, {len(run.picture.points)} steps"
        figure.suptitle(f"{run.name}   {state}", fontsize=12, parse_math=False)
        return
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour) for _, colour in zip(runs, cycle(_COLOURS), strict=False)]
    legend = figure.legend(lines, [run.name for run in runs], loc="outside upper center", fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _named(runs: Sequence[Run], name: str) -> Panel:
    if not any(name in values for run in runs for values in run.picture.points.values()):
        job_id = runs[0].picture.job["id"]
        fix = f"stillhouse metrics {job_id} --names all"
        raise CliError(f"no step has the metric '{name}'", fix=fix, exit_code=EXIT_USAGE)
    return Panel(name, "", ((name, ""),), is_smoothed=True)


def _usual(runs: Sequence[Run]) -> list[Panel]:
    """All panels that one of the jobs has something for, each once, with the curves of all."""
    panels: dict[str, Panel] = {}
    for run in runs:
        for panel in (*_panels(run.picture), *_families(run.picture, run.held_out)):
            have = panels.get(panel.title, panel).curves
            panels[panel.title] = replace(panel, curves=tuple(dict.fromkeys((*have, *panel.curves))))
    return list(panels.values())


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


def _held_out(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Measures of an evaluation as metrics: of all prompts, and of each of several teachers."""
    by_teacher = evaluation.get("by_teacher") or {}
    parts = {**(by_teacher if len(by_teacher) > 1 else {}), "mean": evaluation}
    return {
        f"held_out/{measure}/{name}": float(part[measure])
        for name, part in parts.items()
        for measure in ("reverse_kl", "accuracy")
        if part.get(measure) is not None
    }


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """One job: a colour per curve. Several: a colour per job, a dash pattern per curve."""
    from matplotlib.ticker import MaxNLocator

    pictures = [run.held_out if panel.is_sparse else run.picture for run in runs]
    for (metric, label), colour, dashes in zip(panel.curves, cycle(_COLOURS), cycle(_DASHES), strict=False):
        for index, picture in enumerate(pictures):
            look = {"color": colour} if len(runs) == 1 else {"color": _COLOURS[index % len(_COLOURS)], "ls": dashes}
            _draw_curve(axes, panel, picture, metric, label=label if index == 0 else "_", **look)
    curves = [picture.curve(metric) for picture in pictures for metric, _ in panel.curves]
    if panel.is_from_zero and not all(math.isnan(value) for curve in curves for value in curve):
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
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not known:
        return
    if panel.is_sparse or len(known) == 1:  # a single point has no line: mark it
        axes.plot([step for step, _ in known], [value for _, value in known], marker="o", markersize=4, **look)
    elif panel.is_smoothed and len(steps) >= SMOOTHING_SHARE:
        axes.plot(steps, values, color=look["color"], linewidth=1.4, alpha=0.3)
        axes.plot(steps, running_mean(values, len(steps) // SMOOTHING_SHARE), linewidth=1.8, **look)
    else:
        axes.plot(steps, values, linewidth=1.4, **look)


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the `window` values before and after each (fewer at the ends), gaps left out."""
    means = []
    for index in range(len(values)):
        part = [v for v in values[max(0, index - window) : index + window + 1] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}

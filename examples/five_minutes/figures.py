"""The figures of docs/opd-in-five-minutes.md, from the study of divergences and examples' results.

    python examples/five_minutes/figures.py        # seconds; writes docs/figures/*.svg

Colours are those of Okabe and Ito, told apart by colour-blind readers. The ground is white, so that figures can be read
in dark pages, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
OUT: Final = ROOT / "docs" / "figures"
sys.path.insert(0, str(HERE.parent / "kl_study"))
import bimodal  # noqa: E402

BLUE, GREEN, RED = "#0072B2", "#009E73", "#D55E00"
STAGE_END: Final = 40
"""Step after which the job of examples/qwen3 trains on the student's own texts."""


def directions() -> Figure:
    """One Gaussian for a teacher with two modes, by either KL; minima that an optimiser finds now."""
    teacher = bimodal.MIXTURES[1]
    figure, axes = new(7, 3.2)
    some = slice(None, None, 50)  # of 20,001 points
    x = bimodal.GRID[some]
    axes.fill_between(x, teacher.log_density().exp()[some], color="#cccccc", label="teacher")
    fits = (("forward KL: covers", BLUE, bimodal.forward_fit(teacher)), *reverse(teacher))
    for label, colour, fit in fits:
        axes.plot(x, bimodal.log_normal(fit.mu, fit.sigma).exp()[some], color=colour, linewidth=2, label=label)
    axes.set(xlim=(-8, 8), ylim=(0, None), yticks=[], xlabel="what may be said")
    axes.legend(frameon=False, loc="upper right")
    return figure


def reverse(teacher: bimodal.Mixture) -> list[tuple[str, str, bimodal.Fit]]:
    """The better minimum of the reverse KL."""
    best = min(bimodal.reverse_fits(teacher), key=lambda fit: fit.reverse)
    return [("reverse KL: chooses", RED, best)]


def curves() -> Figure:
    """Held-out measures of two examples while they train: their results.json."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    sort, qwen3 = (curve(name) for name in ("thinking_machines", "qwen3"))
    axes[0].plot(*sort["accuracy"], "o-", color=GREEN, label="right answers, share")
    axes[0].set(
        ylim=(0, 1.02), xlabel="optimizer steps", ylabel="right answers, share", title="on-policy from the start"
    )
    axes[1].plot(*qwen3["reverse_kl"], "o-", color=RED)
    axes[1].axvspan(0, STAGE_END, color="#eeeeee", zorder=0)
    axes[1].text(1, 0.12, "the teacher's texts", fontsize=8)
    axes[1].text(STAGE_END + 1, 4, "its own texts", fontsize=8)
    axes[1].set(xlabel="optimizer steps", ylabel="KL(student || teacher), nats", yscale="log", title="in two stages")
    for panel in axes:
        panel.title.set_fontsize(9)
        tidy(panel)
    return figure


def curve(example: str) -> dict[str, tuple[list[int], list[float]]]:
    """(steps, values) of each held-out measure of an example's job."""
    [job] = json.loads((HERE.parent / example / "results.json").read_text())["jobs"]
    points = job["held_out"]
    steps = [point["step"] for point in points]
    return {key: (steps, [point[key] for point in points]) for key in ("accuracy", "reverse_kl")}


def new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    tidy(axes)
    return figure, axes


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


FIGURES: Final = {"directions": directions, "curves": curves}


def draw(folder: Path = OUT) -> list[Path]:
    """Write all figures; the same data gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": "stillhouse", "svg.fonttype": "path", "font.size": 9}):
        for name, figure in FIGURES.items():
            paths.append(folder / f"{name}.svg")
            figure().savefig(paths[-1], metadata={"Date": None}, facecolor="white")
    return paths


if __name__ == "__main__":
    for path in draw():
        print(path.relative_to(ROOT), path.stat().st_size, "bytes")

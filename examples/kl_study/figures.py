"""The figures of the study. Colours are those of Okabe and Ito, told apart by colour-blind readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import bimodal
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import BETAS, LENGTHS, WEIGHTS, GaussianResult, Study
from topk_bias import Course, Curve
from torch import Tensor

BLUE, ORANGE, GREEN, RED, PURPLE, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#222222"
DPI: Final = 90
"""Readable in a README; the files stay below 150 KB."""


def draw(study: Study, folder: Path) -> list[Path]:
    """Write all figures; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"bimodal": _bimodal(study), "topk_bias": _topk(study), "jsd_scale": _jsd(study)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], pil_kwargs={"optimize": True})
    return paths


def _bimodal(study: Study) -> Figure:
    figure = Figure(figsize=(10, 7), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 2)
    for panel, result in zip(axes.flat, study.gaussians, strict=False):
        _mixture(panel, result)
    _letters(axes.flat[3], study)
    figure.suptitle("A student too small for its teacher: forward KL covers, reverse KL seeks", fontsize=13)
    return figure


def _mixture(axes: Axes, result: GaussianResult) -> None:
    def curve(fit: bimodal.Fit) -> Tensor:
        return bimodal.log_normal(fit.mu, fit.sigma).exp()

    def label(name: str, fit: bimodal.Fit, kl: float) -> str:
        return f"{name} ({fit.mu:.2f}, {fit.sigma:.2f}), KL {kl:.3f}".replace("-0.00", "0.00")

    x, fit = bimodal.GRID, result.forward
    axes.fill_between(x, result.teacher.log_density().exp(), color="#cccccc", label="teacher")
    axes.plot(x, curve(fit), color=BLUE, label=label("forward", fit, fit.forward), linewidth=2)
    shown: list[float] = []
    for fit in sorted(result.reverse, key=lambda fit: fit.mu):
        if not any(abs(fit.mu - mu) < 0.01 for mu in shown):
            style = "--" if not shown else "-."
            axes.plot(x, curve(fit), style, color=RED, label=label("reverse", fit, fit.reverse), linewidth=2)
            shown.append(fit.mu)
    if not any(abs(result.resting.mu - mu) < 0.01 for mu in shown):
        fit = result.resting
        axes.plot(x, curve(fit), ":", color=GREEN, label=label("reverse, between", fit, fit.reverse), linewidth=2)
    axes.set(xlim=(-9, 9), ylim=(0, 0.98), xlabel="x", ylabel="density")
    axes.set_title(f"teacher {result.teacher}", fontsize=10, loc="left")
    _tidy(axes)
    axes.legend(
        fontsize=8, frameon=False, loc="upper right", title="fit (mean, std), nats", title_fontsize=8, handlelength=3.4
    )


def _letters(axes: Axes, study: Study) -> None:
    for weight, marker in zip(WEIGHTS, "os", strict=True):
        found = [study.letters[weight, length] for length in LENGTHS]
        shares = [letters.valid_forward for letters in found]
        axes.plot(LENGTHS, shares, marker, color=BLUE, label=f"forward KL, w = {weight:g}", markersize=5)
        axes.plot(LENGTHS, [weight**t + (1 - weight) ** t for t in LENGTHS], color=BLUE, linewidth=0.8)
    worst = [min(study.letters[weight, length].valid_reverse for weight in WEIGHTS) for length in LENGTHS]
    axes.plot(LENGTHS, worst, "--", color=RED, label="reverse KL, both w", linewidth=2)
    axes.set(yscale="log", ylim=(1e-3, 2), xlabel="letters T of a text", ylabel="share of AA..A and BB..B")
    axes.set_title("teacher writes AA..A (with probability w) or BB..B", fontsize=10, loc="left")
    _tidy(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower left", title="student writes letter by letter", title_fontsize=8)


_FORM_STYLE: Final = {
    "full vocabulary": (BLACK, "-"),
    "tail": (BLUE, "-"),
    "generalised": (GREEN, "--"),
    "naive: truncated": (RED, "-"),
    "naive: renormalised": (ORANGE, "-."),
    "naive: clamped at 0": (PURPLE, "-."),
}


def _topk(study: Study) -> Figure:
    figure = Figure(figsize=(12, 7), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 3)
    for row, is_reverse in enumerate((True, False)):
        courses = [course for course in study.courses if course.form.is_reverse == is_reverse]
        name = "reverse KL(student || teacher)" if is_reverse else "forward KL(teacher || student)"
        mass, kl, stay = axes[row]
        for course in courses:
            _curve(mass, course, course.from_student, course.from_student.masses)
            _curve(kl, course, course.from_student, course.from_student.kls)
            _curve(stay, course, course.from_teacher, course.from_teacher.masses)
        goal = courses[0].from_teacher.masses[0]
        for panel in (mass, stay):
            panel.axhline(goal, color="#999999", linewidth=6, alpha=0.35, zorder=0)
            panel.set(ylim=(0, 1.04), ylabel="student's mass on S")
        kl.set(ylim=(-0.05, 2.4), ylabel="KL over the vocabulary, nats")
        mass.set_title(f"{name}: mass on S", fontsize=10, loc="left")
        kl.set_title("distance to the teacher", fontsize=10, loc="left")
        stay.set_title("started at the teacher: mass on S", fontsize=10, loc="left")
        for panel in (mass, kl, stay):
            panel.set_xlabel("gradient steps")
            panel.set_xscale("symlog", linthresh=1)
            panel.set_xlim(0, courses[0].from_student.steps[-1])
            _tidy(panel)
    named = [panel.get_legend_handles_labels() for panel in axes.flat]
    handles = {label: line for lines, labels in named for line, label in zip(lines, labels, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("Top-k losses, S = the teacher's 8 likeliest of 50 tokens (grey: its mass on S)", fontsize=13)
    return figure


def _curve(axes: Axes, course: Course, curve: Curve, values: list[float]) -> None:
    colour, style = _FORM_STYLE[course.form.name]
    axes.plot(curve.steps, values, style, color=colour, label=course.form.name, linewidth=1.8)


def _jsd(study: Study) -> Figure:
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    logits = [math.log10(beta / (1 - beta)) for beta in BETAS]  # both ends of beta deserve room
    axes.plot(logits, [study.jsd[beta][0] for beta in BETAS], "o-", color=RED, label="jsd")
    axes.plot(logits, [study.jsd[beta][1] for beta in BETAS], "s-", color=BLUE, label="jsd, beta_rescale: true")
    forward, reverse = (study.course("full vocabulary", is_reverse).from_student.kls[0] for is_reverse in (False, True))
    axes.axhline(forward, color=BLACK, linestyle=":", label=f"forward_kl, {forward:.2f}")
    axes.axhline(reverse, color=BLACK, linestyle="--", label=f"reverse_kl, {reverse:.2f}")
    ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
    axes.set_xticks([math.log10(beta / (1 - beta)) for beta in ticks], [f"{beta:g}" for beta in ticks])
    axes.set(yscale="log", ylim=(1e-3, 4), xlabel="beta", ylabel="value of the same pair of models, nats")
    axes.set_title("The size of JSD follows beta, not the distance of the models", fontsize=11, loc="left")
    _tidy(axes)
    axes.legend(fontsize=9, frameon=False, loc="lower center")
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)

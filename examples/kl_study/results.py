"""All numbers of the study, and what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import bimodal
import sampled
import topk_bias

WEIGHTS: Final = (0.5, 0.6)
"""Teacher's probability of AA..A in the study of letters."""
LENGTHS: Final = tuple(range(1, 11))
"""Letters of a text."""
BETAS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999)
DIGITS: Final = 0.005
"""Tolerance of means, deviations and their KLs, and of what was published with two digits after the point."""
FINE: Final = 0.0006
"""Tolerance of what is known to three digits after the point."""


@dataclass(frozen=True)
class GaussianResult:
    """One Gaussian fitted to one mixture."""

    teacher: bimodal.Mixture
    forward: bimodal.Fit
    reverse: list[bimodal.Fit]
    """One of each of bimodal.REVERSE_STARTS."""
    resting: bimodal.Fit


@dataclass(frozen=True)
class Study:
    """What `measure` found."""

    gaussians: list[GaussianResult]
    letters: dict[tuple[float, int], bimodal.Letters]
    """By (weight, length)."""
    courses: list[topk_bias.Course]
    signal_of_one: float
    """Norm of the gradient of the renormalised top-k form with k = 1."""
    noise: tuple[float, float]
    """Variance of the gradient of one sampled token, without and with baseline."""
    bias: float
    """Distance of their means from the gradient of the reverse KL, the larger one."""
    spurious_kl: float
    """Reverse KL between equal models at different temperatures, nats."""
    jsd: dict[float, tuple[float, float]]
    """By beta: (as defined, divided by beta (1 - beta)), nats."""

    def course(self, name: str, is_reverse: bool) -> topk_bias.Course:
        """The course of a top-k form."""
        return next(c for c in self.courses if c.form.name == name and c.form.is_reverse == is_reverse)


def measure(tell: Callable[[str], None] = lambda text: None) -> Study:
    """Compute everything; `tell` hears what is being worked on."""
    gaussians = []
    for teacher in bimodal.MIXTURES:
        tell(f"one Gaussian for {teacher}")
        fits = bimodal.forward_fit(teacher), bimodal.reverse_fits(teacher), bimodal.resting_fit(teacher)
        gaussians.append(GaussianResult(teacher, *fits))
    tell("texts of letters")
    letters = {(weight, t): bimodal.fit_letters(weight, t) for weight in WEIGHTS for t in LENGTHS}
    example, courses = topk_bias.Example(), []
    for form in topk_bias.forms(example):
        tell(f"top-k, {'reverse' if form.is_reverse else 'forward'} KL, {form.name}: {topk_bias.STEPS:,} steps")
        courses.append(topk_bias.course(form, example))
    jsd = {beta: (topk_bias.jsd(beta, rescale=False), topk_bias.jsd(beta, rescale=True)) for beta in BETAS}
    (alone, bias), (steadied, other_bias) = sampled.noise("none"), sampled.noise("full_vocabulary")
    return Study(
        gaussians,
        letters,
        courses,
        signal_of_one=topk_bias.signal_of_one(),
        noise=(alone, steadied),
        bias=max(bias, other_bias),
        spurious_kl=sampled.spurious_kl(),
        jsd=jsd,
    )


@dataclass(frozen=True)
class Check:
    """A number of the study beside the one it should be."""

    name: str
    found: float
    expected: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        """NaN is not."""
        return abs(self.found - self.expected) <= self.tolerance


def checks(study: Study) -> list[Check]:
    """Every number that is known beforehand."""
    parts = (_gaussian_checks, _letter_checks, _topk_checks, _sampled_checks, _jsd_checks)
    return [check for part in parts for check in part(study)]


_GAUSSIANS: Final = (
    # of each mixture: (mu, sigma, forward KL, reverse KL) of the forward fit; (mu, sigma, reverse KL) from each start
    ((0.0, 3.162, 0.4620, 0.937), ((-2.984, 1.023, 0.6888), (2.984, 1.023, 0.6888), (2.984, 1.023, 0.6888))),
    ((-0.6, 3.046, 0.6643, 1.769), ((-2.999, 0.801, 0.5106), (2.999, 0.802, 0.916), (2.999, 0.802, 0.916))),
    ((-0.8, 1.962, 0.4254, 0.820), ((-1.989, 0.716, 0.3524), (1.967, 0.744, 1.1915), (1.967, 0.744, 1.1915))),
)
_RESTING: Final = ((0.0, 2.744, 0.8406), (-0.475, 2.587, 1.5804), (-1.989, 0.716, 0.3524))


def _gaussian_checks(study: Study) -> Iterator[Check]:
    for result, (forward, reverse), resting in zip(study.gaussians, _GAUSSIANS, _RESTING, strict=True):
        found = result.forward
        for name, value, expected in zip(
            ("mu", "sigma", "forward KL", "reverse KL"),
            (found.mu, found.sigma, found.forward, found.reverse),
            forward,
            strict=True,
        ):
            yield Check(f"{result.teacher}, forward fit, {name}", value, expected, DIGITS)
        starts = [f"from {start:g}" for start in bimodal.REVERSE_STARTS] + ["resting"]
        for start, fit, wanted in zip(starts, [*result.reverse, result.resting], [*reverse, resting], strict=True):
            for name, value, expected in zip(
                ("mu", "sigma", "KL"), (fit.mu, fit.sigma, fit.reverse), wanted, strict=True
            ):
                yield Check(f"{result.teacher}, reverse fit {start}, {name}", value, expected, DIGITS)


def _letter_checks(study: Study) -> Iterator[Check]:
    """The laws: w^T + (1 - w)^T are right after the forward KL; the reverse KL costs -ln w, the weight left out."""
    for (weight, length), found in study.letters.items():
        where = f"{length} letters, w = {weight:g}"
        law = weight**length + (1 - weight) ** length
        yield Check(f"{where}, valid after forward KL", found.valid_forward, law, 1e-5)
        yield Check(f"{where}, valid after reverse KL", found.valid_reverse, 1.0, 1e-4)
        if length > 1:  # one letter has nothing to leave out
            yield Check(f"{where}, reverse KL at A", found.reverse_a, -math.log(weight), 1e-3)
            yield Check(f"{where}, reverse KL at B", found.reverse_b, -math.log(1 - weight), 1e-3)


_COSINES: Final = {
    "tail": 0.717,
    "generalised": 0.522,
    "naive: truncated": -0.435,
    "naive: renormalised": -0.206,
}
"""With the gradient of the full reverse KL, at the start."""
_ENDS: Final = (
    # form, is reverse, p(S) and KL to the teacher where descent ends, tolerance of that KL
    ("full vocabulary", True, 0.657, 0.0, FINE),
    ("tail", True, 0.657, 0.355, FINE),
    ("generalised", True, 0.657, 0.355, FINE),
    ("naive: truncated", True, 0.242, 1.32, DIGITS),
    ("naive: renormalised", True, 0.079, 2.21, DIGITS),
    ("full vocabulary", False, 0.657, 0.0, FINE),
    ("tail", False, 0.657, 0.317, FINE),
    ("generalised", False, 0.657, 0.317, FINE),
    ("naive: truncated", False, 0.999, 1.93, DIGITS),
    ("naive: clamped at 0", False, 0.725, 0.387, FINE),
)


def _topk_checks(study: Study) -> Iterator[Check]:
    for name, is_reverse, mass, kl, tolerance in _ENDS:
        course = study.course(name, is_reverse)
        where = f"top-k, {'reverse' if is_reverse else 'forward'}, {name}"
        yield Check(f"{where}, mass on S at the end", course.from_student.masses[-1], mass, FINE)
        yield Check(f"{where}, KL at the end", course.from_student.kls[-1], kl, tolerance)
        is_biased = name in ("naive: truncated", "naive: clamped at 0")
        expected = 0.098 if is_biased else 0.0
        yield Check(f"{where}, gradient at p = q", course.norm_at_teacher, expected, FINE if is_biased else 1e-9)
        if course.form.is_offered:
            yield Check(f"{where}, KL after starting at p = q", course.from_teacher.kls[-1], 0.0, 1e-9)
    for name, cosine in _COSINES.items():
        yield Check(f"top-k, reverse, {name}, cosine at the start", study.course(name, True).cosine, cosine, FINE)
    drained = study.course("naive: truncated", True).from_teacher
    yield Check("top-k, reverse, naive: truncated, mass before, started at p = q", drained.masses[0], 0.657, FINE)
    yield Check("top-k, reverse, naive: truncated, mass after", drained.masses[-1], 0.242, FINE)
    yield Check("top-k, reverse, naive: renormalised, k = 1, gradient", study.signal_of_one, 0.0, 1e-12)


def _sampled_checks(study: Study) -> Iterator[Check]:
    yield Check("sampled token, variance", study.noise[0], 6.587, FINE)
    yield Check("sampled token, variance with baseline", study.noise[1], 3.621, FINE)
    yield Check("sampled token, bias", study.bias, 0.0, 1e-12)
    yield Check("temperatures 0.7 and 1, KL of equal models", study.spurious_kl, 0.070, FINE)


_JSD: Final = {0.001: 0.00170, 0.01: 0.01597, 0.1: 0.12417, 0.5: 0.30487, 0.9: 0.13264, 0.99: 0.01773, 0.999: 0.00187}


def _jsd_checks(study: Study) -> Iterator[Check]:
    for beta, expected in _JSD.items():
        raw, rescaled = study.jsd[beta]
        yield Check(f"JSD, beta {beta:g}", raw, expected, 6e-6)
        yield Check(f"JSD, beta {beta:g}, rescaled", rescaled, expected / (beta * (1 - beta)), 6e-6 / beta / (1 - beta))
    forward, reverse = (study.course("full vocabulary", is_reverse).from_student.kls[0] for is_reverse in (False, True))
    yield Check("forward KL of the example", forward, 1.7209, 6e-5)
    yield Check("reverse KL of the example", reverse, 1.8860, 6e-5)

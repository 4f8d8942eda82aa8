"""A student that is too small for its teacher: the forward KL covers, the reverse KL seeks.

Two kinds of teachers with two modes, and students that cannot have two:

* a mixture of two Gaussians, fitted by one Gaussian (mean mu, standard deviation sigma);
* texts AA..A and BB..B of T letters, fitted by a model that chooses every letter without looking at the others.

Which way: q is the teacher, p the student; forward is KL(q || p), reverse KL(p || q), in nats. All numbers are minima
that an optimiser found, none is written down.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from scipy.optimize import minimize

Array = np.ndarray[Any, np.dtype[np.float64]]
Direction = Literal["forward", "reverse"]

GRID: Final = np.linspace(-14, 14, 20_001)
"""[X] where densities are summed: 4.4 standard deviations of the widest fit to each side."""
CELL: Final = float(GRID[1] - GRID[0])
FORWARD_START: Final = 0.5
"""mu; sigma starts at 1. The forward KL has one minimum: one start is enough."""
REVERSE_STARTS: Final = (-2.0, 0.3, 2.0)
"""The reverse KL has a minimum at every mode: where it ends depends on where it starts."""
SIMPLEX: Final = {"xatol": 1e-6, "fatol": 1e-9}
IMPOSSIBLE: Final = -30.0
"""Teacher's log-probability of a text that is neither AA..A nor BB..B, nats: -inf would have no gradient."""


@dataclass(frozen=True)
class Mixture:
    """weight N(left, deviation) + (1 - weight) N(right, deviation); deviations are standard deviations."""

    weight: float
    left: float
    right: float
    deviation: float

    def log_density(self) -> Array:
        """[X] log q on the grid."""
        left = log_normal(self.left, self.deviation) + math.log(self.weight)
        right = log_normal(self.right, self.deviation) + math.log1p(-self.weight)
        return np.logaddexp(left, right)

    def __str__(self) -> str:
        a, b, s = self.weight, 1 - self.weight, self.deviation
        return f"{a:.1g} N({self.left:g}, {s:g}) + {b:.1g} N({self.right:g}, {s:g})"


MIXTURES: Final = (
    Mixture(weight=0.5, left=-3, right=3, deviation=1),
    Mixture(weight=0.6, left=-3, right=3, deviation=0.8),
    Mixture(weight=0.7, left=-2, right=2, deviation=0.7),
)


@dataclass(frozen=True)
class Fit:
    """One Gaussian fitted to a mixture."""

    mu: float
    sigma: float
    forward: float
    """KL(teacher || student), nats."""
    reverse: float
    """KL(student || teacher), nats."""


@dataclass(frozen=True)
class Letters:
    """The student of texts of T letters, at its optimum."""

    valid_forward: float
    """Share of AA..A and BB..B in what the student writes, after minimising the forward KL."""
    valid_reverse: float
    """The same after minimising the reverse KL, the worse of both starts."""
    reverse_a: float
    """KL(student || teacher) where the minimisation ends that starts on the side of A, nats."""
    reverse_b: float
    """The same for B."""


def log_normal(mean: float, deviation: float) -> Array:
    """[X] log N(mean, deviation) on the grid."""
    return -((GRID - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - 0.5 * math.log(2 * math.pi)


def kl(log_a: Array, log_b: Array) -> float:
    """KL(a || b) of probabilities; of densities, times the size of a cell."""
    return float((np.exp(log_a) * (log_a - log_b)).sum())


def both(log_q: Array, log_p: Array) -> dict[Direction, float]:
    """The KL both ways."""
    return {"forward": kl(log_q, log_p), "reverse": kl(log_p, log_q)}


def fit(teacher: Mixture, direction: Direction, start: float, method: str = "Nelder-Mead") -> Fit:
    """Minimise the KL of that direction over (mu, log sigma), from (start, 0)."""
    log_q = teacher.log_density()

    def divergences(at: Array) -> dict[Direction, float]:
        values = both(log_q, log_normal(at[0], math.exp(at[1])))
        return {name: CELL * value for name, value in values.items()}

    options = SIMPLEX if method == "Nelder-Mead" else {}
    end = minimize(lambda at: divergences(at)[direction], [start, 0.0], method=method, options=options).x
    return Fit(float(end[0]), math.exp(end[1]), **divergences(end))


def forward_fit(teacher: Mixture) -> Fit:
    """The minimum of KL(teacher || student)."""
    return fit(teacher, "forward", FORWARD_START)


def reverse_fits(teacher: Mixture) -> list[Fit]:
    """Minima of KL(student || teacher), one of each start."""
    return [fit(teacher, "reverse", start) for start in REVERSE_STARTS]


def resting_fit(teacher: Mixture) -> Fit:
    """Where a method that follows the gradient of the reverse KL ends, from the start between the modes."""
    return fit(teacher, "reverse", REVERSE_STARTS[1], method="BFGS")


def fit_letters(weight: float, length: int) -> Letters:
    """Minimise both KLs over the logits of A at each of the T places; sums run over all 2^T texts."""
    texts = np.array(list(itertools.product((1, -1), repeat=length)))  # [2^T, T] +1 = A
    log_q = np.full(len(texts), IMPOSSIBLE)
    log_q[0], log_q[-1] = math.log(weight), math.log1p(-weight)  # the first text is all A, the last all B
    log_q -= np.logaddexp.reduce(log_q)

    def log_p(logits: Array) -> Array:
        return -np.logaddexp(0, -texts * logits).sum(1)

    def optimum(direction: Direction, start: float) -> Array:
        ends = minimize(lambda logits: both(log_q, log_p(logits))[direction], np.full(length, start), method="BFGS")
        return log_p(ends.x)

    covering, at_a, at_b = optimum("forward", 0.2), optimum("reverse", 1.0), optimum("reverse", -1.0)
    valid = [float(np.exp(end[[0, -1]]).sum()) for end in (covering, at_a, at_b)]
    return Letters(valid[0], min(valid[1:]), kl(at_a, log_q), kl(at_b, log_q))

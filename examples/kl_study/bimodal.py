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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse"]
Loss = Callable[[Tensor], Tensor]
"""Parameters [N] to a number."""

GRID: Final = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
"""[X] where densities are summed: 4.4 standard deviations of the widest fit to each side."""
CELL: Final = float(GRID[1] - GRID[0])
FORWARD_START: Final = 0.5
"""mu; sigma starts at 1. The forward KL has one minimum: one start is enough."""
REVERSE_STARTS: Final = (-2.0, 0.3, 2.0)
"""The reverse KL has a minimum at every mode: where it ends depends on where it starts."""
X_TOLERANCE, F_TOLERANCE = 1e-6, 1e-9
"""Size of the simplex, and spread of its values, at which Nelder-Mead is done."""
MAX_MOVES: Final = 2000
"""Of the simplex; about 100 are enough."""
IMPOSSIBLE: Final = -30.0
"""Teacher's log-probability of a text that is neither AA..A nor BB..B, nats: -inf would have no gradient."""


@dataclass(frozen=True)
class Mixture:
    """weight N(left, deviation) + (1 - weight) N(right, deviation); deviations are standard deviations."""

    weight: float
    left: float
    right: float
    deviation: float

    def log_density(self) -> Tensor:
        """[X] log q on the grid."""
        left = log_normal(self.left, self.deviation) + math.log(self.weight)
        right = log_normal(self.right, self.deviation) + math.log1p(-self.weight)
        return torch.logaddexp(left, right)

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


def log_normal(mean: float | Tensor, deviation: float | Tensor) -> Tensor:
    """[X] log N(mean, deviation) on the grid."""
    deviation = torch.as_tensor(deviation, dtype=torch.float64)
    return -((GRID - mean) ** 2) / (2 * deviation**2) - deviation.log() - 0.5 * math.log(2 * math.pi)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of probabilities; of densities, times the size of a cell."""
    return (log_a.exp() * (log_a - log_b)).sum()


def divergence(direction: Direction, log_q: Tensor, log_p: Tensor) -> Tensor:
    """The KL of that direction between teacher and student."""
    return kl(log_q, log_p) if direction == "forward" else kl(log_p, log_q)


def nelder_mead(loss: Loss, start: Tensor) -> Tensor:
    """The minimum that a simplex finds from `start`: it looks around, where a gradient only looks down.

    The usual form (reflect by 1, expand by 2, contract and shrink by 1/2; first edges 5 % of a coordinate). Not that of
    scipy: where it is installed, transformers imports it in every process.
    """

    def at(point: Tensor) -> tuple[float, Tensor]:
        return float(loss(point)), point

    def size(simplex: list[tuple[float, Tensor]]) -> float:
        return max(float((point - simplex[0][1]).abs().max()) for _, point in simplex)

    edges = torch.where(start == 0, 0.00025, 0.05 * start)
    simplex = [at(start), *(at(start + edge) for edge in torch.diag(edges))]
    for _ in range(MAX_MOVES):
        simplex.sort(key=lambda pair: pair[0])
        (low, best), (second, _), (high, worst) = simplex[0], simplex[-2], simplex[-1]
        if high - low <= F_TOLERANCE and size(simplex) <= X_TOLERANCE:
            return best
        centre = torch.stack([point for _, point in simplex[:-1]]).mean(0)
        away = centre - worst
        reflected = at(centre + away)
        if reflected[0] < low:
            simplex[-1] = min(reflected, at(centre + 2 * away), key=lambda pair: pair[0])
        elif reflected[0] < second:
            simplex[-1] = reflected
        else:
            contracted = at(centre + (0.5 if reflected[0] < high else -0.5) * away)
            if contracted[0] < min(high, reflected[0]):
                simplex[-1] = contracted
            else:
                simplex = [simplex[0], *(at((point + best) / 2) for _, point in simplex[1:])]
    raise RuntimeError(f"no minimum after {MAX_MOVES} moves from {start.tolist()}")


def follow_gradient(loss: Loss, start: Tensor) -> Tensor:
    """The minimum that L-BFGS finds from `start`."""
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        parameters.grad = None
        value = loss(parameters)
        value.backward()
        return float(value.detach())

    optimiser.step(closure)
    return parameters.detach()


def fit(
    teacher: Mixture, direction: Direction, start: float, minimise: Callable[[Loss, Tensor], Tensor] = nelder_mead
) -> Fit:
    """Minimise the KL of that direction over (mu, log sigma), from (start, 0)."""
    log_q = teacher.log_density()

    def at(point: Tensor, direction: Direction) -> Tensor:
        return CELL * divergence(direction, log_q, log_normal(point[0], point[1].exp()))

    end = minimise(lambda point: at(point, direction), torch.tensor([start, 0.0], dtype=torch.float64))
    return Fit(float(end[0]), math.exp(end[1]), float(at(end, "forward")), float(at(end, "reverse")))


def forward_fit(teacher: Mixture) -> Fit:
    """The minimum of KL(teacher || student)."""
    return fit(teacher, "forward", FORWARD_START)


def reverse_fits(teacher: Mixture) -> list[Fit]:
    """Minima of KL(student || teacher), one of each start."""
    return [fit(teacher, "reverse", start) for start in REVERSE_STARTS]


def resting_fit(teacher: Mixture) -> Fit:
    """Where a method that follows the gradient of the reverse KL ends, from the start between the modes."""
    return fit(teacher, "reverse", REVERSE_STARTS[1], follow_gradient)


def fit_letters(weight: float, length: int) -> Letters:
    """Minimise both KLs over the logits of A at each of the T places; sums run over all 2^T texts."""
    texts = torch.tensor(list(itertools.product((1.0, -1.0), repeat=length)), dtype=torch.float64)  # [2^T, T] +1 = A
    log_q = torch.full((len(texts),), IMPOSSIBLE, dtype=torch.float64)
    log_q[0], log_q[-1] = math.log(weight), math.log1p(-weight)  # the first text is all A, the last all B
    log_q = log_q.log_softmax(0)

    def log_p(logits: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(texts * logits).sum(1)

    def optimum(direction: Direction, start: float) -> Tensor:
        begin = torch.full((length,), start, dtype=torch.float64)
        return log_p(follow_gradient(lambda logits: divergence(direction, log_q, log_p(logits)), begin))

    covering, at_a, at_b = optimum("forward", 0.2), optimum("reverse", 1.0), optimum("reverse", -1.0)
    valid = [float(end[[0, -1]].exp().sum()) for end in (covering, at_a, at_b)]
    return Letters(valid[0], min(valid[1:]), float(kl(at_a, log_q)), float(kl(at_b, log_q)))

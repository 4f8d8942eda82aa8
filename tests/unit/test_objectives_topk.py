"""Why the naive top-k forms are not offered: what they train towards, in numbers, next to the forms that are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.trainer.losses import make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from tests.unit.loss_cases import example, loss
from tests.unit.loss_oracles import kl, top_k

Loss = Callable[[Tensor], Tensor]
STUDENT, TEACHER = example()
Q = TEACHER.softmax(-1)
IDS = Q.topk(8).indices
ON_S = torch.zeros(50, dtype=torch.bool)
ON_S[IDS] = True


def inside(p: Tensor) -> tuple[Tensor, Tensor]:
    return p[IDS], Q[IDS]


def renormalised(p: Tensor) -> Tensor:
    p_s, q_s = inside(p)
    return kl(p_s / p_s.sum(), q_s / q_s.sum())


def ours(divergence: str, correction: str) -> Loss:
    spec = loss("top_k", divergence=divergence, correction=correction)
    return lambda p: top_k(spec, p[None], Q[None], ON_S[None])[0]


FORMS: dict[str, Loss] = {
    "full": lambda p: kl(p, Q),
    "naive reverse": lambda p: kl(*inside(p)),
    "renormalised": renormalised,
    "generalised reverse": ours("reverse_kl", "generalised"),
    "tail reverse": ours("reverse_kl", "tail"),
    "naive forward": lambda p: kl(*inside(p)[::-1]),
    "clamped forward": lambda p: kl(*inside(p)[::-1]).clamp(min=0),
    "generalised forward": ours("forward_kl", "generalised"),
    "tail forward": ours("forward_kl", "tail"),
}


def gradient(form: Loss, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(form(leaf.softmax(-1)), leaf)[0]


@pytest.mark.parametrize(
    ("form", "cosine", "size"),
    [
        ("naive reverse", -0.435, 0.16),
        ("renormalised", -0.206, 0.61),
        ("generalised reverse", 0.522, 0.11),
        ("tail reverse", 0.717, 0.23),
    ],
)
def test_the_gradient_at_the_start_against_that_of_the_full_reverse_kl(form: str, cosine: float, size: float) -> None:
    full, partial = gradient(FORMS["full"], STUDENT), gradient(FORMS[form], STUDENT)
    assert float(torch.nn.functional.cosine_similarity(partial, full, dim=0)) == pytest.approx(cosine, abs=1e-3)
    assert float(partial.norm() / full.norm()) == pytest.approx(size, abs=5e-3)


def test_held_fixed_with_weight_p_is_the_generalised_form() -> None:
    """sum_S sg[p log(p / q)] log p, met in other code, has the gradient of the generalised reverse KL."""

    def held_fixed(p: Tensor) -> Tensor:
        p_s, q_s = inside(p)
        return ((p_s * (p_s / q_s).log()).detach() * p_s.log()).sum()

    torch.testing.assert_close(gradient(held_fixed, STUDENT), gradient(FORMS["generalised reverse"], STUDENT))


@pytest.mark.parametrize("form", FORMS)
def test_who_rests_at_the_teacher(form: str) -> None:
    norm = float(gradient(FORMS[form], TEACHER).norm())
    if form.startswith("naive"):
        assert norm == pytest.approx(0.098, abs=1e-3)
        mass = float(Q[IDS].sum())
        assert norm <= 2**0.5 * mass * (1 - mass)
    else:
        # the clamp hides it: the truncated sum is not above 0 there
        assert norm < (0.1 if form == "clamped forward" else 1e-12)


def test_renormalised_over_one_token_says_nothing() -> None:
    leaf = STUDENT.clone().requires_grad_()
    p = leaf.softmax(-1)[IDS[:1]]
    (grad,) = torch.autograd.grad(kl(p / p.sum(), torch.ones(1).double()), leaf)
    assert not grad.any()


def descend(steps: int) -> dict[str, np.ndarray]:
    """p after gradient descent with step 0.5 on the student's logits, for each form but the full one; in numpy."""
    q, on_s = Q.numpy(), ON_S.numpy()
    names = [form for form in FORMS if form != "full"]
    logits = np.tile(STUDENT.numpy(), (len(names), 1))

    def slope(form: str, p: np.ndarray) -> np.ndarray:
        """d loss / d p of each token, up to a constant."""
        tail_p, tail_q = p[~on_s].sum(), q[~on_s].sum()
        mass_p, mass_q = p[on_s].sum(), q[on_s].sum()
        ratio = np.log(p / q)
        if form == "naive reverse":
            return np.where(on_s, ratio + 1, 0)
        if form == "renormalised":
            own = ratio - np.log(mass_p / mass_q)
            return np.where(on_s, (own - (p * own)[on_s].sum() / mass_p) / mass_p, 0)
        if form == "generalised reverse":
            return np.where(on_s, ratio, 0)
        if form == "tail reverse":
            return np.where(on_s, ratio, np.log(tail_p / tail_q))
        if form == "generalised forward":
            return np.where(on_s, 1 - q / p, 0)
        if form == "tail forward":
            return np.where(on_s, -q / p, -tail_q / tail_p)
        stopped = form == "clamped forward" and -(q * ratio)[on_s].sum() <= 0
        return np.where(on_s & ~stopped, -q / p, 0)

    p = np.exp(logits)
    for _ in range(steps):
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        slopes = np.stack([slope(form, p[row]) for row, form in enumerate(names)])
        logits -= 0.5 * p * (slopes - (p * slopes).sum(1, keepdims=True))
    return dict(zip(names, p, strict=True))


def test_one_step_by_hand_is_the_step_by_autograd() -> None:
    for form, p in descend(2).items():
        step = (STUDENT - 0.5 * gradient(FORMS[form], STUDENT)).softmax(-1)
        np.testing.assert_allclose(p, step.numpy(), rtol=1e-9, err_msg=form)


@pytest.fixture(scope="module")
def ends() -> dict[str, Tensor]:
    return {form: torch.from_numpy(p) for form, p in descend(20_000).items()}


@pytest.mark.full
@pytest.mark.parametrize(
    ("form", "mass", "reverse", "forward"),
    [
        ("naive reverse", 0.242, 1.32, None),
        ("renormalised", 0.079, None, None),
        ("generalised reverse", 0.657, 0.355, 0.317),
        ("tail reverse", 0.657, 0.355, 0.317),
        ("naive forward", 0.999, None, 1.93),
        ("clamped forward", 0.725, None, 0.387),
        ("generalised forward", 0.657, 0.355, 0.317),
        ("tail forward", 0.657, 0.355, 0.317),
    ],
)
def test_where_descent_ends(
    ends: dict[str, Tensor], form: str, mass: float, reverse: float | None, forward: float | None
) -> None:
    """Mass on S, of which the teacher has .657 and the student starts with .185; KL(p || q); KL(q || p)."""
    p = ends[form]
    assert float(p[IDS].sum()) == pytest.approx(mass, abs=1e-3)
    if reverse is not None:
        assert float(kl(p, Q)) == pytest.approx(reverse, abs=5e-3)
    if forward is not None:
        assert float(kl(Q, p)) == pytest.approx(forward, abs=5e-3)
    error = float((p[IDS] / Q[IDS] - 1).abs().max())
    if form == "clamped forward":
        assert error == pytest.approx(0.66, abs=5e-3)
    if form.startswith(("generalised", "tail")):
        assert error < 1e-6
        assert rests_there(form, p)


def rests_there(form: str, p: Tensor) -> bool:
    """The code under test has next to no gradient at p."""
    correction, direction = form.split()
    spec = loss("top_k", divergence=f"{direction}_kl", correction=correction)
    signals = Signals(topk_ids=IDS[None], topk_logprobs=Q[IDS].log()[None])
    logits, head = p.log()[None].requires_grad_(), Head(torch.eye(50).double())
    result = packed_loss(make_objective(spec), logits, head, IDS[:1], torch.ones(1).double(), signals)
    (grad,) = torch.autograd.grad(result.loss, logits)
    return float(grad.norm()) < 1e-6

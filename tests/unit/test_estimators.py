"""What each estimator trains towards: exact averages over the vocabulary, one statistical test, and the known example.

The example (V = 50, numpy default_rng(0)) is that of loss_cases.py; its numbers were recomputed, not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.trainer.losses import make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from tests.unit.loss_cases import example, loss, name
from tests.unit.loss_oracles import jsd, kl

V = 50
BASELINES = [loss("policy_gradient", baseline=b, **k) for b, k in (("full_vocabulary", {}), ("top_k", {"k": 8}))]
UNBIASED = [
    loss("policy_gradient"),
    *BASELINES,
    loss("policy_gradient", estimator="k2"),
    loss("policy_gradient", student_term="sampler"),
    loss("policy_gradient", ratio_gate="icepop"),
    loss("full_vocabulary", divergence="k2"),
    loss("policy_gradient", advantage_clip=1000),
]
"""Sampled-token forms whose gradient is on average that of the reverse KL, if p itself sampled."""


def problem(seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher."""
    if seed is None:
        return example()
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(V, generator=draw).double() * 1.5, torch.randn(V, generator=draw).double() * 1.5


def gradients(spec: Any, logits: Tensor, teacher: Tensor, ids: Tensor, mu: Tensor | None = None) -> Tensor:
    """[R, V] gradient with respect to the student's logits, one row for each sampled token."""
    identity, log_q, log_mu = torch.eye(V).double(), teacher.log_softmax(-1), (mu if mu is not None else logits)
    facts: dict[str, Any] = {"rollout_logprobs": log_mu.log_softmax(-1)[ids], "logprobs": log_q[ids]}
    if spec.payload() == "hidden":
        facts |= {"hidden": teacher.expand(len(ids), V), "head": Head(identity)}
    if spec.payload() == "top_k":
        likeliest = log_q.topk(min(spec.k, V))
        facts |= {"topk_ids": likeliest.indices.expand(len(ids), -1)}
        facts |= {"topk_logprobs": likeliest.values.expand(len(ids), -1)}
    rows = logits.repeat(len(ids), 1).requires_grad_()
    objective, ones = make_objective(spec), torch.ones(len(ids)).double()
    result = packed_loss(objective, rows, Head(identity), ids, ones, Signals(**facts))
    return torch.autograd.grad(result.loss, rows)[0]


def gradient_of(value: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """[V] gradient of a function of p, by autograd."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(value(leaf.softmax(-1)), leaf)[0]


def reverse_gradient(logits: Tensor, teacher: Tensor) -> Tensor:
    return gradient_of(lambda p: kl(p, teacher.softmax(-1)), logits)


def mean_and_variance(spec: Any, logits: Tensor, teacher: Tensor) -> tuple[Tensor, float]:
    """([V] mean of the gradient over y drawn from p, sum of the variances of its elements), both exact."""
    p, each = logits.softmax(-1), gradients(spec, logits, teacher, torch.arange(V))
    mean = p @ each
    return mean, float(p @ each.square().sum(-1) - mean.square().sum())


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("spec", UNBIASED, ids=name)
def test_the_average_over_the_vocabulary_is_the_gradient_of_the_reverse_kl(spec: Any, seed: int | None) -> None:
    logits, teacher = problem(seed)
    mean, _ = mean_and_variance(spec, logits, teacher)
    torch.testing.assert_close(mean, reverse_gradient(logits, teacher), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", UNBIASED, ids=name)
def test_samples_agree_with_it_within_a_confidence_bound(spec: Any) -> None:
    """In 20 random directions the mean of 20,000 samples is within 4.5 standard errors: by chance 1 run in 7,000."""
    logits, teacher = problem()
    draw = torch.Generator().manual_seed(7)
    each = gradients(spec, logits, teacher, torch.arange(V))
    ids = torch.multinomial(logits.softmax(-1), 20_000, replacement=True, generator=draw)
    directions = torch.randn(V, 20, generator=draw, dtype=torch.float64)

    def largest_deviation(truth: Tensor) -> float:
        projected = each[ids] @ directions
        error = (projected.mean(0) - truth @ directions) / (projected.std(0) / len(ids) ** 0.5)
        return float(error.abs().max())

    assert largest_deviation(reverse_gradient(logits, teacher)) < 4.5
    forward = gradient_of(lambda p: kl(teacher.softmax(-1), p), logits)
    assert largest_deviation(forward) > 20, "the test tells the two directions apart"


def test_the_baseline_takes_away_almost_half_of_the_variance_of_the_known_example() -> None:
    logits, teacher = problem()
    true, plain = mean_and_variance(loss("policy_gradient"), logits, teacher)
    _, exact = mean_and_variance(BASELINES[0], logits, teacher)
    _, in_buckets = mean_and_variance(BASELINES[1], logits, teacher)
    assert float(true.square().sum()) == pytest.approx(0.244, abs=5e-4)
    assert (plain, exact) == (pytest.approx(6.587, abs=5e-4), pytest.approx(3.621, abs=5e-4))
    assert exact / plain == pytest.approx(0.550, abs=5e-4)
    # no constant does much better: the best one weighs tokens by the size of grad log p
    p, advantage = logits.softmax(-1), teacher.log_softmax(-1) - logits.log_softmax(-1)
    size = (torch.eye(V) - p).square().sum(-1)
    best = (p * size * advantage).sum() / (p * size).sum()
    least = float((p * size * (advantage - best).square()).sum() - true.square().sum())
    assert least == pytest.approx(3.610, abs=5e-4)
    assert least <= exact < in_buckets < plain


def test_the_factor_as_200_000_samples_show_it() -> None:
    """.553, the same with noise: drawn with its own generator, after the logits."""
    logits, teacher = problem()
    draw = np.random.default_rng(0)
    draw.normal(size=2 * V)
    p = logits.softmax(-1).numpy()
    ids = draw.choice(V, p=p / p.sum(), size=200_000)
    share = torch.from_numpy(np.bincount(ids, minlength=V) / len(ids))

    def variance(spec: Any) -> float:
        each = gradients(spec, logits, teacher, torch.arange(V))
        return float(share @ each.square().sum(-1) - (share @ each).square().sum())

    plain, centred = variance(loss("policy_gradient")), variance(BASELINES[0])
    assert plain == pytest.approx(6.540, abs=5e-4)
    assert centred / plain == pytest.approx(0.553, abs=5e-4)


@pytest.mark.parametrize("clip", [0.3, 2.0])
@pytest.mark.parametrize("baseline", ["full_vocabulary", "top_k"])
def test_a_baseline_changes_no_mean_also_under_a_clip(baseline: str, clip: float) -> None:
    logits, teacher = problem()
    without, plain = mean_and_variance(loss("policy_gradient", advantage_clip=clip), logits, teacher)
    spec = loss("policy_gradient", advantage_clip=clip, baseline=baseline, **({"k": 8} if baseline == "top_k" else {}))
    mean, variance = mean_and_variance(spec, logits, teacher)
    torch.testing.assert_close(mean, without, rtol=1e-9, atol=1e-12)
    assert variance < plain


def test_the_baseline_of_a_bad_student_is_the_mean_of_what_the_clip_leaves() -> None:
    """KL far above the clip: the KL itself as baseline would make all advantages positive, and the variance larger."""
    logits, teacher = (4 * values for values in problem())
    _, plain = mean_and_variance(loss("policy_gradient", advantage_clip=2), logits, teacher)
    _, ours = mean_and_variance(loss("policy_gradient", advantage_clip=2, baseline="full_vocabulary"), logits, teacher)
    p, advantage = logits.softmax(-1), (teacher.log_softmax(-1) - logits.log_softmax(-1)).clamp(-2, 2)
    each = -(advantage + kl(p, teacher.softmax(-1)))[:, None] * (torch.eye(V) - p)
    plain_kl = float(p @ each.square().sum(-1) - (p @ each).square().sum())
    assert kl(p, teacher.softmax(-1)) > 2
    assert ours < plain < plain_kl


def expected(value: Callable[[Tensor, Tensor], Tensor], logits: Tensor, teacher: Tensor) -> Tensor:
    """sum over y of p(y) times the gradient of a loss of (log p(y), log q(y)), differentiated as it stands."""
    leaf, p = logits.clone().requires_grad_(), logits.softmax(-1)
    losses = value(leaf.log_softmax(-1), teacher.log_softmax(-1))
    return torch.autograd.grad((p * losses).sum(), leaf)[0]


def test_the_table_of_estimators() -> None:
    """k1 differentiated trains nothing, k2 gives the reverse KL, k3 the forward KL, and -k3 as advantage neither."""
    logits, teacher = problem()
    q = teacher.softmax(-1)
    reverse, forward = reverse_gradient(logits, teacher), gradient_of(lambda p: kl(q, p), logits)

    def k3(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q - log_p).exp() - 1 - (log_q - log_p)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    k1 = expected(lambda log_p, log_q: log_p - log_q, logits, teacher)
    torch.testing.assert_close(k1, torch.zeros(V).double(), atol=1e-12, rtol=0)
    k2 = expected(lambda log_p, log_q: (log_p - log_q).square() / 2, logits, teacher)
    torch.testing.assert_close(k2, reverse)
    as_loss = expected(k3, logits, teacher)
    torch.testing.assert_close(as_loss, forward)
    assert cosine(as_loss, reverse) == pytest.approx(0.67, abs=5e-3)
    as_reward = expected(lambda log_p, log_q: k3(log_p, log_q).detach() * log_p, logits, teacher)
    assert cosine(as_reward, reverse) == pytest.approx(0.815, abs=1e-3)
    assert cosine(as_reward, forward) == pytest.approx(0.115, abs=1e-3)


@pytest.mark.parametrize("baseline", ["none", "full_vocabulary", "top_k"])
def test_importance_weights_undo_staleness_on_average(baseline: str) -> None:
    """Samples of mu, weighted by p / mu, give the gradient that samples of p would give, also with a baseline."""
    logits, teacher = problem()
    stale = logits + torch.randn(V, generator=torch.Generator().manual_seed(3)).double()
    spec = loss("policy_gradient", ratio_gate="is", baseline=baseline)
    each = gradients(spec, logits, teacher, torch.arange(V), stale)
    mean = stale.softmax(-1) @ each
    torch.testing.assert_close(mean, reverse_gradient(logits, teacher), rtol=1e-9, atol=1e-12)
    ungated = gradients(loss("policy_gradient"), logits, teacher, torch.arange(V), stale)
    assert (stale.softmax(-1) @ ungated - mean).norm() > 0.1, "without the weights it is another one"


def test_the_divergences_of_the_known_example() -> None:
    logits, teacher = problem()
    p, q = logits.softmax(-1), teacher.softmax(-1)
    assert float(kl(q, p)) == pytest.approx(1.7209, abs=5e-5)
    assert float(kl(p, q)) == pytest.approx(1.8860, abs=5e-5)
    sizes = {0.001: 0.00170, 0.01: 0.01597, 0.1: 0.12417, 0.5: 0.30487, 0.9: 0.13264, 0.99: 0.01773, 0.999: 0.00187}
    for beta, size in sizes.items():
        assert value("jsd", beta=beta) == pytest.approx(size, abs=6e-6)
    torch.testing.assert_close(jsd(p, q, 0.5), jsd(q, p, 0.5))


def value(divergence: str, **knobs: Any) -> float:
    """Of the known example, by the code under test."""
    logits, teacher = problem()
    identity = Head(torch.eye(V).double())
    objective = make_objective(loss("full_vocabulary", divergence=divergence, **knobs))
    rows = Signals(hidden=teacher[None], head=identity)
    result = packed_loss(
        objective, logits[None], identity, torch.zeros(1, dtype=torch.long), torch.ones(1).double(), rows
    )
    return float(result.values[0])


def test_the_ends_of_the_mixtures_are_the_two_kls() -> None:
    forward, reverse = value("forward_kl"), value("reverse_kl")
    assert value("jsd", beta=1e-6) / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert value("jsd", beta=1 - 1e-6) / 1e-6 == pytest.approx(reverse, rel=1e-4)
    assert value("jsd", beta=1e-6, beta_rescale=True) == pytest.approx(forward, rel=1e-4)
    assert value("jsd", beta=1 - 1e-6, beta_rescale=True) == pytest.approx(reverse, rel=1e-4)
    assert value("skew_forward_kl", alpha=1e-7) == pytest.approx(forward, rel=1e-4)
    assert value("skew_reverse_kl", alpha=1e-7) == pytest.approx(reverse, rel=1e-4)


def test_averaging_teachers_fits_a_pool_that_none_of_them_is() -> None:
    """Reverse KLs fit the normalised geometric mean, forward KLs the arithmetic one: hence a teacher for each row."""
    draw = np.random.default_rng(0)
    _, one, other = (torch.from_numpy(1.5 * draw.normal(size=V)).softmax(-1) for _ in range(3))
    geometric = (one * other).sqrt() / (one * other).sqrt().sum()
    arithmetic = (one + other) / 2

    def mean_kls(pool: Tensor) -> tuple[float, float]:
        reverse = (kl(pool, one) + kl(pool, other)) / 2
        forward = (kl(one, pool) + kl(other, pool)) / 2
        return float(reverse), float(forward)

    assert mean_kls(geometric) == pytest.approx((0.3211, 0.3514), abs=5e-5)
    assert mean_kls(arithmetic) == pytest.approx((0.4336, 0.2389), abs=5e-5)
    # each is the minimum of its own: no step away from it helps
    log_geometric = geometric.log()
    slope = gradient_of(lambda x: (kl(x, one) + kl(x, other)) / 2, log_geometric)
    torch.testing.assert_close(slope, torch.zeros(V).double(), atol=1e-12, rtol=0)

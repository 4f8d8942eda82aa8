"""The study of divergences (examples/kl_study): every number that is known beforehand, and its figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples import EXAMPLES, neighbours

pytestmark = pytest.mark.timeout(240)  # ten seconds of computation; a busy machine may need many times that

STUDY = EXAMPLES / "kl_study"
MODULES = [path.stem for path in STUDY.glob("*.py")]
FIGURES = {"bimodal.png", "jsd_scale.png", "topk_bias.png"}


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    """The study's files by name; they import each other as neighbours, as they do when run.py is run."""
    with neighbours(STUDY, MODULES) as found:
        yield found


@pytest.fixture(scope="module")
def study(modules: dict[str, Any]) -> Any:
    return modules["results"].measure()


def given(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def log_ratios(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


NAIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "truncated_reverse": lambda p, q: log_ratios(p, q),
    "renormalised_reverse": lambda p, q: log_ratios(given(p), given(q)),
    "truncated_forward": lambda p, q: log_ratios(q, p),
    "clamped_forward": lambda p, q: log_ratios(q, p).clamp(min=0),
}
"""The naive losses of p and q on the support, as they are met."""


@pytest.mark.parametrize("name", NAIVE)
def test_the_naive_gradients_are_those_of_their_losses(modules: dict[str, Any], name: str) -> None:
    study = modules["topk_bias"]
    example = study.Example()
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(20, study.V, generator=draw, dtype=torch.float64).requires_grad_()
    losses = NAIVE[name](logits.softmax(1)[:, example.support], example.q[example.support])
    (expected,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(example.naive(getattr(study, name))(logits.detach()), expected)


def test_every_number_is_as_known(modules: dict[str, Any], study: Any) -> None:
    found = modules["results"].checks(study)
    assert modules["run"].wrong(found) == []
    assert len(found) == 187


def test_a_number_that_is_off_is_named(modules: dict[str, Any], study: Any) -> None:
    beta = 0.5
    bad = dataclasses.replace(study, signal_of_one=float("nan"), jsd=study.jsd | {beta: (0.31, study.jsd[beta][1])})
    complaints = modules["run"].wrong(modules["results"].checks(bad))
    assert len(complaints) == 2
    assert "k = 1" in complaints[0]
    assert complaints[1].startswith("JSD, beta 0.5: 0.31000, not 0.30487")


def test_the_figures_are_drawn_and_small_enough_for_a_page(modules: dict[str, Any], study: Any, tmp_path: Path) -> None:
    paths = modules["figures"].draw(study, tmp_path / "figures")
    assert {path.name for path in paths} == FIGURES
    for path in [*paths, *(STUDY / name for name in FIGURES)]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000, path

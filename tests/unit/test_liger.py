"""Liger's kernel beside ours: which of the two is taken, and what the adapter makes of the kernel's answer.

The kernel itself needs a GPU or Triton's interpreter: benchmarks/liger_parity.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.core.spec import StudentSpec
from stillhouse.trainer import engine
from stillhouse.trainer.losses import packed_loss
from stillhouse.trainer.objectives import liger
from stillhouse.trainer.objectives.base import ChunkLoss, Head, Objective, Signals, StudentChunk
from stillhouse.trainer.objectives.full_vocabulary import K2, ForwardKL, GeneralisedJSD, ReverseKL
from stillhouse.trainer.objectives.liger import (
    RUNS,
    Example,
    Faster,
    LigerDivergence,
    best_seconds,
    choose,
    faster_on,
    liger_divergence,
)
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import stage

R, V, D = 4, 30, 5
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DIVERGENCES = [
    ForwardKL(),
    GeneralisedJSD(0.1),
    GeneralisedJSD(0.5),
    GeneralisedJSD(0.9, rescale=True),
    ReverseKL(),
]


def example(vocab: int = V, dtype: torch.dtype = torch.float32) -> Example:
    draw = torch.Generator().manual_seed(3)
    log_p = (3 * torch.randn(R, vocab, generator=draw)).to(dtype).log_softmax(-1)
    head = Head(torch.randn(vocab, D, generator=draw).to(dtype))
    signals = Signals(hidden=torch.randn(R, D, generator=draw).to(dtype), head=head)
    ids = torch.arange(R)
    return Example(StudentChunk(log_p, log_p.exp(), ids, log_p.gather(1, ids[:, None]).squeeze(1)), signals, 0.8)


@dataclass
class Changed:
    """An objective that answers as the reverse KL does, but for one entry."""

    answer: str = "value"
    factor: float = 1.0

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        answer = ReverseKL()(student, signals, temperature)
        return answer._replace(**{self.answer: getattr(answer, self.answer) * self.factor})


@dataclass
class Clock:
    """Says that Liger's takes so many times what ours takes; knows who asked."""

    ratio: float
    asked: list[Objective] = field(default_factory=list)

    def __call__(self, objective: Objective, _: Example) -> float:
        self.asked.append(objective)
        return 1.0 if isinstance(objective, ReverseKL) else self.ratio


def fails(*_: Any) -> ChunkLoss:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize(
    ("theirs", "ratio", "is_taken"),
    [
        (Changed(), 0.9, True),
        (Changed(), 1.1, False),
        (Changed("grad", 1 + 5e-5), 0.9, True),
        (Changed("grad", 1 + 2e-4), 0.1, False),
        (Changed("value", 1 + 2e-4), 0.1, False),
        (Changed("reverse_kl", 1 + 2e-4), 0.1, False),
        (Changed("grad", float("nan")), 0.1, False),
        (fails, 0.1, False),
    ],
)
def test_taken_only_if_faster_and_equal(theirs: Objective, ratio: float, is_taken: bool) -> None:
    ours = ReverseKL()
    assert choose(ours, theirs, example(), Clock(ratio)) is (theirs if is_taken else ours)


def test_float32_only() -> None:
    ours = ReverseKL()
    assert choose(ours, Changed(), example(dtype=torch.float64), Clock(0.1)) is ours


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_choosing_changes_nothing_of_what_the_kernel_computes(ratio: float) -> None:
    clock = Clock(ratio)
    expected, found = packed(ReverseKL()), packed(Faster(ReverseKL(), Changed(), clock))
    assert len(clock.asked) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def packed(objective: Objective) -> list[Tensor]:
    """Values and gradients, through buffers that the kernel lends to the objective."""
    draw = torch.Generator().manual_seed(5)
    hidden, weight, teacher = (torch.randn(n, D, generator=draw) for n in (R, V, V))
    leaves, bias = [hidden.requires_grad_(), weight.requires_grad_()], torch.randn(V, generator=draw)
    signals = Signals(hidden=torch.randn(R, D, generator=draw), head=Head(teacher, bias, 0.5, 9.0))
    result = packed_loss(objective, hidden, Head(weight, bias), torch.arange(R), torch.ones(R), signals, 0.8)
    return [result.values, result.reverse_kl, *torch.autograd.grad(result.loss, leaves)]


def test_time_is_that_of_the_calls() -> None:
    calls: list[StudentChunk] = []
    tile = example()

    def counted(student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        calls.append(student)
        return ReverseKL()(student, signals, temperature)

    assert best_seconds(counted, tile) > 0
    assert len(calls) == RUNS
    assert len({student.log_p.data_ptr() for student in calls} | {tile.student.log_p.data_ptr()}) == RUNS + 1


def test_measured_once_per_vocabulary() -> None:
    clock = Clock(0.5)
    objective = Faster(ReverseKL(), Changed("value", 1 + 1e-5), clock)
    answers = [objective(*example()) for _ in range(3)]
    assert len(clock.asked) == 2
    assert all(torch.equal(answer.value, ReverseKL()(*example()).value * (1 + 1e-5)) for answer in answers)
    objective(*example(vocab=V + 1))
    assert len(clock.asked) == 4


def test_offered_on_cuda_with_the_package_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert faster_on(CUDA, ReverseKL()) == ReverseKL()
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    assert isinstance(faster_on(CUDA, ReverseKL()), Faster)
    assert faster_on(CPU, ReverseKL()) == ReverseKL()
    assert faster_on(CUDA, K2()) == K2()


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_jobs_choose_nothing_by_the_clock(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[Objective] = []
    monkeypatch.setattr(engine, "faster_on", lambda device, ours: offered.append(ours))
    model = make_tiny_model(tmp_path)
    student, spec = StudentSpec(model="m"), stage(loss={"objective": "full_vocabulary"})
    engine.Engine(model, student=student, stage=spec, seed=0, deterministic=deterministic)
    assert offered == ([] if deterministic else [ReverseKL()])


@pytest.mark.parametrize(("found", "is_refused"), [("0.8.3", True), ("0.8.4", False), ("0.8.10", False)])
def test_old_versions_are_refused(found: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "version", lambda name: found)
    monkeypatch.setattr(liger, "import_module", lambda name: SimpleNamespace(dispatch=len))
    if is_refused:
        with pytest.raises(ImportError, match=r"liger-kernel 0\.8\.3 is installed, 0\.8\.4 is needed"):
            liger._dispatch.__wrapped__()
    else:
        assert liger._dispatch.__wrapped__() is len


def by_definition(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """What the kernel answers, by autograd of the definition: log p counts as free, its sum over tokens as anything."""
    leaf = log_p.clone().requires_grad_()
    with torch.enable_grad():
        if beta == 0:
            loss = log_q.exp() * (log_q - leaf)
        elif beta == 1:
            loss = leaf.exp() * (leaf - log_q)
        else:
            log_m = (beta * log_q.exp() + (1 - beta) * leaf.exp()).log()
            loss = beta * log_q.exp() * (log_q - log_m) + (1 - beta) * leaf.exp() * (leaf - log_m)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), log_p.copy_(slope)


@pytest.mark.parametrize("ours", DIVERGENCES, ids=str)
def test_adapter_answers_what_ours_answers(ours: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "_loss_and_slope", by_definition)
    theirs = liger_divergence(ours)
    assert isinstance(theirs, LigerDivergence)
    tile = example(dtype=torch.float64)
    for name, distance in liger.distances(tile.answer(theirs), tile.answer(ours)).items():
        assert distance < 1e-12, name

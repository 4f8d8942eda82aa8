"""The same random rows and heads for both losses; needs TRL, see environment.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.trainer.losses import packed_loss
from stillhouse.trainer.objectives.base import Head, Objective, Signals
from stillhouse.trainer.objectives.full_vocabulary import ForwardKL, GeneralisedJSD, ReverseKL


@dataclass(eq=False)
class Problem:
    """T rows of a student and a teacher of width D over V tokens; logits have a spread of about 3."""

    rows: int
    vocab: int
    width: int
    seed: int = 0

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.hidden = normal(self.rows, self.width).requires_grad_()
        self.weight = normal(self.vocab, self.width).mul_(3 / self.width**0.5).requires_grad_()
        self.teacher_hidden = normal(self.rows, self.width)
        self.teacher_weight = normal(self.vocab, self.width).mul_(3 / self.width**0.5)
        self.ids = torch.randint(self.vocab, (self.rows,), generator=draw)

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def objective(beta: float) -> Objective:
    """TRL's beta: 0 = forward KL(teacher || student), 1 = reverse KL(student || teacher), between them JSD(beta)."""
    return ForwardKL() if beta == 0 else ReverseKL() if beta == 1 else GeneralisedJSD(beta)


def ours(problem: Problem, beta: float) -> Callable[[], Tensor]:
    """Forward and backward of the mean over the rows."""
    weights = torch.full((problem.rows,), 1 / problem.rows)
    signals = Signals(hidden=problem.teacher_hidden, head=Head(problem.teacher_weight))

    def run() -> Tensor:
        result = packed_loss(objective(beta), problem.hidden, Head(problem.weight), problem.ids, weights, signals)
        result.loss.backward()
        return result.loss.detach()

    return run


def trl(problem: Problem, beta: float) -> Callable[[], Tensor]:
    """The same by TRL's function: its DistillationTrainer divides the sum by the number of valid tokens."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # slow to import, and not always needed

    def run() -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            problem.hidden, problem.weight, None, problem.teacher_hidden, problem.teacher_weight, None, beta
        )
        loss = divergence.sum() / problem.rows
        loss.backward()
        return loss.detach()

    return run


def products(problem: Problem) -> Callable[[], None]:
    """The four matrix products alone, each at once, into memory that is there already."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    student = torch.empty(problem.rows, problem.vocab)
    teacher = torch.empty(problem.rows, problem.vocab)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=student)
        torch.mm(problem.teacher_hidden, problem.teacher_weight.T, out=teacher)
        torch.mm(student, weight, out=grad_hidden)
        torch.mm(student.T, hidden, out=grad_weight)

    return run

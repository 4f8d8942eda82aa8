"""The KLs and the JSD by Liger's Triton kernel: an optional second way to the same numbers, for CUDA devices.

Liger's kernel reads log p and log q of a tile once and writes loss and slope of each token, where ours makes a handful
of passes. Whether that is faster depends on the device, so it is measured there, at the first tile; Liger's is
taken only if it is faster and its answer is ours. Needs the extra `liger`; imported when a tile is first measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import structlog
import torch
from torch import Tensor

from stillhouse.trainer.objectives.base import ChunkLoss, Objective, Signals, StudentChunk
from stillhouse.trainer.objectives.full_vocabulary import ForwardKL, GeneralisedJSD, ReverseKL

AGREEMENT: Final = 1e-4
"""Largest difference between Liger's answer and ours, in norm, relative to ours."""

OLDEST: Final = (0, 8, 4)
"""Of liger-kernel: before, the JSD was NaN where student and teacher both give a token less than float32 can hold."""

RUNS: Final = 5
"""Timed calls of each; the shortest counts."""


@dataclass(frozen=True)
class LigerDivergence:
    """size * (b KL(q || m) + (1 - b) KL(p || m)), m = b q + (1 - b) p, or one of the KLs; in float32."""

    beta: float
    """Share of the teacher in the mixture; 0 = KL(teacher || student), 1 = KL(student || teacher)."""
    size: float = 1.0

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        log_q_CV, spare_CV = signals.teacher(temperature)
        difference_CV = torch.sub(student.log_p, log_q_CV, out=spare_CV)
        reverse_kl_C = torch.linalg.vecdot(student.p, difference_CV)
        loss_CV, slope_CV = _loss_and_slope(student.log_p, log_q_CV, self.beta)
        # the slope is with respect to log p: through log-softmax, slope - p * sum(slope)
        grad_CV = slope_CV.addcmul_(student.p, slope_CV.sum(-1, keepdim=True), value=-1)
        value_C = loss_CV.sum(-1)
        if self.size != 1:
            value_C, grad_CV = value_C * self.size, grad_CV.mul_(self.size)
        return ChunkLoss(value_C, grad_CV, reverse_kl_C)


def _loss_and_slope(log_p_CV: Tensor, log_q_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """([C, V] loss of each token, [C, V] its derivative with respect to log p, in the place of log p)."""
    labels, ignored_label, divisor = None, -100, 1.0
    return _dispatch()(
        "jsd_loss_and_grad", log_p_CV, log_q_CV, labels, beta, ignored_label, divisor, impl="nvidia-triton"
    )


@cache
def _dispatch() -> Callable[..., Any]:
    found = version("liger-kernel")
    if tuple(int(part) for part in found.split(".")[:3]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ImportError(f"liger-kernel {found} is installed, {wanted} is needed: pip install -U liger-kernel")
    return import_module("liger_kernel.backends").dispatch


class Example(NamedTuple):
    """What an objective is called with."""

    student: StudentChunk
    signals: Signals
    temperature: float

    def answer(self, objective: Objective) -> ChunkLoss:
        """The objective's answer; the example stays as it is."""
        return objective(*self.copy())

    def copy(self) -> Example:
        """With tensors that an objective may overwrite."""
        student = self.student._replace(log_p=self.student.log_p.clone(), p=self.student.p.clone())
        return self._replace(student=student, signals=_copy(self.signals))


def _copy(signals: Signals) -> Signals:
    if signals.products is None:
        return signals
    products_CV = signals.products().clone()
    space_CV = None if signals.space is None else torch.empty_like(signals.space)
    return replace(signals, products=lambda: products_CV, space=space_CV)


Seconds = Callable[[Objective, Example], float]
"""What a call takes."""


def best_seconds(objective: Objective, example: Example) -> float:
    """Time of a call, the shortest of several; the objective is compiled already."""
    return min(_seconds(objective, example.copy()) for _ in range(RUNS))


def _seconds(objective: Objective, example: Example) -> float:
    _wait_for(example.student.log_p.device)
    start = time.perf_counter()
    objective(*example)
    _wait_for(example.student.log_p.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose(ours: Objective, liger: Objective, example: Example, seconds: Seconds = best_seconds) -> Objective:
    """Liger's if it is faster on this example and agrees with ours there; otherwise, or if it fails, ours."""
    try:
        is_better, why = _compare(ours, liger, example, seconds)
    except Exception as error:  # whatever ails a compiler or kernel of others: ours needs neither
        is_better, why = False, f"{type(error).__name__}: {error}"
    chosen = liger if is_better else ours
    structlog.get_logger().info("kernel of the loss chosen", chosen=str(chosen), why=why)
    return chosen


def _compare(ours: Objective, liger: Objective, example: Example, seconds: Seconds) -> tuple[bool, str]:
    """(Liger's is better, why)."""
    if example.student.log_p.dtype is not torch.float32:
        return False, f"Liger's computes in float32, the loss in {example.student.log_p.dtype}"
    distance = distances(example.answer(liger), example.answer(ours))
    # not `any(... > ...)`: NaN disagrees
    if not all(each <= AGREEMENT for each in distance.values()):
        found = ", ".join(f"{name} {each:.1e}" for name, each in distance.items())
        return False, f"Liger's differs from ours, relative to it: {found}; allowed {AGREEMENT:.0e}"
    theirs_s, ours_s = seconds(liger, example), seconds(ours, example)
    return theirs_s < ours_s, f"Liger's takes {theirs_s * 1e3:.3f} ms a tile, ours {ours_s * 1e3:.3f} ms"


def distances(answer: ChunkLoss, ours: ChunkLoss) -> dict[str, float]:
    """How far everything in an answer is from ours: ||answer - ours|| / ||ours||."""
    return {name: _distance(getattr(answer, name), getattr(ours, name)) for name in ("value", "grad", "reverse_kl")}


def _distance(a: Tensor, b: Tensor) -> float:
    difference = torch.linalg.vector_norm(a - b)
    return 0.0 if difference == 0 else float(difference / torch.linalg.vector_norm(b))


class Faster:
    """The faster of two objectives, measured at the first tile; once per size of the vocabulary and type."""

    def __init__(self, ours: Objective, liger: Objective, seconds: Seconds = best_seconds) -> None:
        self._ours, self._liger, self._seconds = ours, liger, seconds
        self._chosen: dict[tuple[int, torch.dtype], Objective] = {}

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        key = (student.log_p.shape[1], student.log_p.dtype)
        if key not in self._chosen:
            example = Example(student, signals, temperature)
            self._chosen[key] = choose(self._ours, self._liger, example, self._seconds)
        return self._chosen[key](student, signals, temperature)


def liger_divergence(ours: Objective) -> LigerDivergence | None:
    """The same divergence by Liger's kernel; none = it has none."""
    match ours:
        case ForwardKL():
            return LigerDivergence(0.0)
        case ReverseKL():
            return LigerDivergence(1.0)
        case GeneralisedJSD():
            return LigerDivergence(ours.beta, ours.size)
    return None


def faster_on(device: torch.device, ours: Objective) -> Objective:
    """`ours`, or on a CUDA device with Liger the one of both that turns out to be faster there."""
    liger = liger_divergence(ours)
    if liger is None or device.type != "cuda" or find_spec("liger_kernel") is None:
        return ours
    return Faster(ours, liger)

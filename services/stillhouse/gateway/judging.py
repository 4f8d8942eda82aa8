"""Checks of a job about what judges completions: verifiers of rewards and of held-out accuracy, several teachers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from stillhouse.core.explain import Finding
from stillhouse.core.spec import PolicyGradientLoss
from stillhouse.core.verifiers import problem_of, verifiers

if TYPE_CHECKING:
    from stillhouse.gateway.validation import Case, Source

COMPILE_S: Final = 2.0
"""After so long no more patterns of rows are compiled, or one job could hold up all others for hours; the trainer's
workers compile each within its verdict's deadline, and say what is wrong."""


def check_verifiers(case: Case) -> Iterator[Finding]:
    """Rows can be judged where a stage asks for an outcome reward, and held-out rows where they name a verifier;
    elsewhere rows may name what they like."""
    known = verifiers()
    compiling_s = 0.0
    for source, default, param in _judged(case):
        for index, row in enumerate(source.rows):
            name = row.verifier or default
            if not name:
                if source.stage is not None:
                    message = f"{source.name(index)}: no verifier judges its completions"
                    yield Finding(source.where(index), message, f"set the row's 'verifier', or {param}")
                continue
            started = time.monotonic()
            problem = problem_of(name, row.answer, known, compiles=compiling_s < COMPILE_S)
            compiling_s += time.monotonic() - started if name == "regex" else 0.0
            if problem:
                fix = "correct the row" if row.verifier else f"correct the row, or name its own verifier beside {param}"
                yield Finding(source.where(index), f"{source.name(index)}: {problem}", fix)


def _judged(case: Case) -> Iterator[tuple[Source, str | None, str]]:
    """(rows that are judged, their verifier if they name none, where that stands)."""
    for source in case.training:
        loss = source.stage.loss if source.stage is not None else None
        if isinstance(loss, PolicyGradientLoss) and loss.reward is not None:
            yield source, loss.reward.verifier, "loss.reward.verifier"
    if case.evaluation is not None:
        yield case.evaluation, case.spec.evaluation.verifier, "evaluation.verifier"


def check_mixtures(case: Case) -> Iterator[Finding]:
    """Several teachers judge a sample only where the loss asks for scores."""
    for source in case.training:
        silent = source.stage is not None and source.stage.loss.payload() == "none"
        for index, row in source.table.where(lambda row: len(case.teachers_of(row)) > 1) if silent else ():
            message = f"{source.name(index)} names the teachers {case.teachers_of(row)}, the loss asks none for scores"
            yield Finding(source.where(index), message, "name one")

"""Which verifiers there are: names and what people should know. Light: nothing is imported to find out.

Built-in ones run in trainer/verify. Others come with installed packages, by entry points of the group
`stillhouse.verifiers`; a job can only name what is installed, never bring code. See docs/verifiers.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from stillhouse.core.answers import ANSWER_CHECKS

GROUP: Final = "stillhouse.verifiers"
"""Group of the entry points of other packages."""
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
"""What a row can say in its `verifier`."""


@dataclass(frozen=True, slots=True)
class VerifierInfo:
    """A verifier, for people and for checks of a job."""

    name: str
    about: str
    """One sentence: what it rewards."""
    needs_answer: bool
    """The row must have an `answer`."""
    source: str = "built in"
    """Where it comes from: `built in`, or the package with its version."""
    extra: str = ""
    """Extra of this package that it needs, as in `pip install stillhouse[extra]`."""
    problem: str = ""
    """Why it cannot be used; empty = it can."""


BUILT_IN: Final = (
    VerifierInfo("exact", "The text is the answer, but for white space.", True),
    VerifierInfo("numeric", "The last number in the text is the number of the answer.", True),
    VerifierInfo("regex", "The answer, a regular expression, matches somewhere in the text.", True),
    VerifierInfo(
        "math", "The last boxed or final expression equals the answer, by math-verify.", True, extra="verifiers"
    ),
    VerifierInfo(
        "reasoning_gym", "The scorer of the row's reasoning-gym task; the answer is its entry.", True, extra="gym"
    ),
)


def verifiers(found: Iterable[EntryPoint] | None = None) -> dict[str, VerifierInfo]:
    """All verifiers by name, those that cannot be used included; `found` replaces the installed entry points."""
    known = {info.name: info for info in BUILT_IN}
    for point in sorted(entry_points(group=GROUP) if found is None else found, key=lambda point: point.name):
        info = _third_party(point)
        first = known.get(point.name)
        # Which of two would answer to a name must not depend on the order of folders
        if first is None:
            known[point.name] = info
        elif first.source != "built in" and first.source != info.source:
            both = f"both {first.source} and {info.source} bring it; uninstall one"
            known[point.name] = VerifierInfo(point.name, first.about, False, first.source, problem=both)
    return known


def _third_party(point: EntryPoint) -> VerifierInfo:
    source = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
    problem = "" if _NAME.fullmatch(point.name) else f"its name is not of the form {_NAME.pattern}"
    return VerifierInfo(point.name, f"{point.value} of an installed package.", False, source, problem=problem)


def entry_point(name: str) -> EntryPoint | None:
    """The entry point of a verifier that is not built in."""
    return next(iter(entry_points(group=GROUP, name=name)), None)


def problem_of(name: str, answer: str | None) -> str:
    """Why a row with this `verifier` and `answer` cannot be judged, with the fix; empty = nothing is known against it.

    Whether the packages behind a verifier are installed where the trainer runs is not known here.
    """
    known = verifiers()
    info = known.get(name)
    if info is None:
        return f"unknown verifier '{name}'; there are {', '.join(sorted(known))}"
    if info.problem:
        return f"verifier '{name}' cannot be used: {info.problem}"
    if info.needs_answer and (answer is None or not answer.strip()):
        return f"verifier '{name}' needs the row's 'answer', which is missing or empty"
    check = ANSWER_CHECKS.get(name)
    problem = check(answer) if check is not None and answer is not None else ""
    return f"verifier '{name}': {problem}" if problem else ""

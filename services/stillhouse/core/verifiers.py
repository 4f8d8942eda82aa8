"""Which verifiers there are: names and what people should know. Light: nothing is imported to find out.

Built-in ones run in trainer/verify. Others come with installed packages, by entry points of the group
`stillhouse.verifiers`; a job can only name what is installed, never bring code. See docs/verifiers.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from stillhouse.core.answers import ANSWER_CHECKS, ANSWER_MAX

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
    module: str = ""
    """Module of that extra, by which one can tell whether it is installed."""
    problem: str = ""
    """Why it cannot be used; empty = it can."""


BUILT_IN: Final = (
    VerifierInfo("exact", "The final answer is the reference answer, but for white space.", True),
    VerifierInfo("numeric", "The last number of the text is the last number of the reference answer.", True),
    VerifierInfo("regex", "The reference answer, a regular expression, matches somewhere in the text.", True),
    VerifierInfo(
        "math",
        "The last boxed or final expression equals the reference answer, by math-verify.",
        True,
        extra="verifiers",
        module="math_verify",
    ),
    VerifierInfo(
        "reasoning_gym",
        "The scorer of the row's reasoning-gym dataset; the reference answer is the dataset's entry as JSON.",
        True,
        extra="gym",
        module="reasoning_gym",
    ),
)


@cache
def verifiers() -> dict[str, VerifierInfo]:
    """All verifiers by name, those that cannot be used included; a package installed later is not seen."""
    return collect(entry_points(group=GROUP))


def collect(points: Iterable[EntryPoint]) -> dict[str, VerifierInfo]:
    """The built-in verifiers and those of entry points. A name that is built in stays ours."""
    known = {info.name: info for info in BUILT_IN}
    for point in sorted(points, key=lambda point: point.name):
        info = _third_party(point)
        first = known.get(point.name)
        if first is None:
            known[point.name] = info
        elif first.source != "built in" and first.source != info.source:
            # which of two answers to a name must not depend on the order of folders
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


def problem_of(
    name: str, answer: str | None, known: Mapping[str, VerifierInfo] | None = None, *, compiles: bool = True
) -> str:
    """Why a row with this `verifier` and `answer` cannot be judged, with the fix; empty = nothing is known against it.

    `known` are the `verifiers()`, looked up once by whoever checks many rows. Without `compiles` regular expressions
    are let be: some take seconds. Whether the packages behind a verifier are installed where the trainer runs is not
    known here.
    """
    known = verifiers() if known is None else known
    info = known.get(name)
    if info is None:
        return f"unknown verifier '{name}'; there are {', '.join(sorted(known))}"
    if info.problem:
        return f"verifier '{name}' cannot be used: {info.problem}"
    if info.needs_answer and (answer is None or not answer.strip()):
        return f"verifier '{name}' needs the row's 'answer', which is missing or empty"
    if answer is None:
        return ""
    if len(answer) > ANSWER_MAX:
        return f"verifier '{name}': the answer has {len(answer)} characters, at most {ANSWER_MAX} are allowed"
    check = ANSWER_CHECKS.get(name) if compiles or name != "regex" else None
    problem = check(answer) if check is not None else ""
    return f"verifier '{name}': {problem}" if problem else ""

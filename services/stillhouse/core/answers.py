"""Reading answers: the number in a text, and whether a row's reference answer suits its verifier.

Standard library only. The gateway, which refuses what can never be judged, reads like the verifiers in trainer/verify.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

ANSWER_MAX: Final = 256 << 10
"""Longest reference answer, characters: entries of reasoning-gym carry whole boards and graphs."""
PATTERN_MAX: Final = 1_000
"""Longest regular expression, characters. The slowest known of this length compiles for 1 s of a core."""
DIGITS_MAX: Final = 300
"""Digits of a number that is kept exact; longer ones are no numbers that a float holds."""
REL_TOLERANCE: Final = 1e-6
"""Of numbers that are not whole. Whole ones must be equal: 12345678 is not 12345679."""

GYM_RUNS_TEXT: Final = frozenset(
    {
        "binary_matrix",
        "bitwise_arithmetic",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Datasets of reasoning-gym whose scorers run the student's text, or the row's, as Python code."""
GYM_NO_JSON: Final = frozenset({"arc_agi", "rearc", "composite"})
"""Those whose entries do not survive JSON, or belong to several datasets."""

_WHOLE: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_UNSIGNED: Final = rf"{_WHOLE}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,4}}(?![0-9]))?|\.[0-9]+"
_NUMBER: Final = re.compile(
    # a dash after a letter, digit or bracket is a hyphen or a difference, one before a blank a bullet or a difference
    rf"(?P<sign>(?<![\w)}}\]])[-+])?[$€£¥]?(?P<inner>(?<=[$€£¥])[-+])?"
    rf"(?:\\[dt]?frac\s?\{{\s?(?P<above>[-+]?(?:{_UNSIGNED}))\s?\}}\s?\{{\s?(?P<below>{_UNSIGNED})\s?\}}"
    rf"|(?P<number>{_UNSIGNED})(?:\s?/\s?(?P<over>{_UNSIGNED})(?![0-9/]))?)"
    r"(?P<percent>\s?%)?"
)
_SPELLINGS: Final = {"−": "-", "\u2013": "-", "{,}": ",", "\\!": "", "\\,": "", "\\%": "%", "\\$": "$"}
"""Other ways to write the same: minus and dash, LaTeX's separators and escapes."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written."""

    value: float | Fraction
    """Exact, unless it has an exponent."""
    is_percent: bool
    """It has a percent sign."""

    def __str__(self) -> str:
        text = str(self.value) if isinstance(self.value, Fraction) else f"{self.value:g}"
        return text + ("%" if self.is_percent else "")


def last_number(text: str) -> Number | None:
    """The last number in a text; None if it has none, or one that no float holds."""
    for other, ours in _SPELLINGS.items():
        text = text.replace(other, ours)
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - only the last one is wanted
        pass
    return None if found is None else _read(found)


def _read(found: re.Match[str]) -> Number | None:
    above = _plain(found["above"] or found["number"])
    below = _plain(found["below"] or found["over"] or "1")
    if below == 0 or not (math.isfinite(above) and math.isfinite(below)):
        return None
    sign = -1 if "-" in (found["sign"] or "") + (found["inner"] or "") else 1
    value = sign * above / below
    try:
        is_finite = math.isfinite(float(value) * 100)  # a percent sign may still multiply it
    except OverflowError:
        is_finite = False
    return Number(value, found["percent"] is not None) if is_finite else None


def _plain(text: str) -> float | Fraction:
    """Exact without an exponent; with one a float, since 1e9999 as an exact number would fill the memory."""
    text = text.replace(",", "")
    if len(text) > DIGITS_MAX or "e" in text.lower():
        return float(text)
    return Fraction(text)


def same_number(number: Number, answer: Number) -> bool:
    """Equal; when only one has a percent sign, 50% is both 50 and 0.5."""
    if number.is_percent == answer.is_percent:
        return _close(number.value, answer.value)
    hundred = number.value / 100 if number.is_percent else number.value * 100
    return _close(number.value, answer.value) or _close(hundred, answer.value)


def _close(value: float | Fraction, answer: float | Fraction) -> bool:
    if value == answer:
        return True
    if answer == int(answer):
        # what a float cannot tell apart, such as 0.1 * 3 * 10, is still equal
        return isinstance(value, float) and math.isclose(value, answer, rel_tol=1e-12)
    return math.isclose(value, answer, rel_tol=REL_TOLERANCE)


def gym_entry(answer: str) -> dict[str, Any]:
    """The entry of a reasoning-gym dataset that an answer holds as JSON.

    Raises:
        ValueError: it is none; says what is missing.
    """
    try:
        entry = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer must be an entry of a reasoning-gym dataset as JSON: {error}") from None
    metadata = entry.get("metadata") if isinstance(entry, dict) else None
    name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or "answer" not in entry:
        raise ValueError("the entry needs 'answer' and 'metadata' with 'source_dataset', as reasoning-gym makes it")
    if name in GYM_RUNS_TEXT:
        raise ValueError(f"the scorer of reasoning-gym's '{name}' runs texts as Python code, which is not allowed")
    if name in GYM_NO_JSON:
        raise ValueError(f"entries of reasoning-gym's '{name}' cannot be sent as JSON")
    return entry


def _check_numeric(answer: str) -> str:
    return "" if last_number(answer) is not None else f"there is no number in the answer '{answer[:80]}'"


def _check_regex(answer: str) -> str:
    if len(answer) > PATTERN_MAX:
        return f"the answer, a regular expression, has {len(answer)} characters, at most {PATTERN_MAX} are allowed"
    try:
        re.compile(answer)
    except (re.error, RecursionError, OverflowError) as error:
        return f"the answer is not a regular expression of Python: {error}"
    return ""


def _check_gym(answer: str) -> str:
    try:
        gym_entry(answer)
    except ValueError as error:
        return str(error)
    return ""


ANSWER_CHECKS: Final[dict[str, Callable[[str], str]]] = {
    "numeric": _check_numeric,
    "regex": _check_regex,
    "reasoning_gym": _check_gym,
}
"""Verifier -> why an answer within ANSWER_MAX can never be judged; empty = it can, as far as is known without the
packages. The others take any."""

"""The built-in verifiers: (completion, reference answer, row) -> (reward in [0, 1], a note for people).

They run in a worker process (worker.py) and need not care how long they take. What a library is needed for is imported
when its verifier is loaded. A ValueError says that the row's answer cannot be used.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from stillhouse.core.answers import ANSWER_CHECKS, last_number, same_number
from stillhouse.trainer.verify.gym import load_gym
from stillhouse.trainer.verify.reading import Judgement, Verifier, final_answer, short

MATH_MAX: Final = 2000
"""Characters that math-verify searches for an expression: of 40,000 such as `1 1 1 ...`, which a student in a loop
writes, it needs 18 s, with the square of their number."""


def exact(text: str, answer: str, row: Mapping[str, Any]) -> Judgement:
    """The final answer is the reference answer; runs of white space count as one blank, letter case counts."""
    said, wanted = _normal(final_answer(text)), _normal(answer)
    return (1.0, "right") if said == wanted else (0.0, f"wrong: expected {short(wanted)}, got {short(said)}")


def numeric(text: str, answer: str, row: Mapping[str, Any]) -> Judgement:
    """The last number of the final answer is the last number of the reference answer; core/answers.py reads both."""
    wanted, said = last_number(answer), last_number(final_answer(text))
    if wanted is None:
        raise ValueError(f"there is no number in the answer {short(answer)}")
    if said is None:
        return 0.0, f"wrong: expected {short(str(wanted))}, found no number"
    if same_number(said, wanted):
        return 1.0, "right"
    return 0.0, f"wrong: expected {short(str(wanted))}, got {short(str(said))}"


def regex(text: str, answer: str, row: Mapping[str, Any]) -> Judgement:
    """The answer, a regular expression of Python, matches somewhere in the whole completion."""
    if problem := ANSWER_CHECKS["regex"](answer):
        raise ValueError(problem)
    found = re.search(answer, text)
    return (0.0, f"no match of {short(answer)}") if found is None else (1.0, f"matched {short(found[0])}")


def load_math() -> Verifier:
    """`math`: math-verify compares the last boxed or final expression with the answer, as mathematics."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    config = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def read(text: str) -> list[Any]:
        # its own time limit is an alarm signal that counts as a wrong answer; ours kills the process and says so
        return parse(_end(text), extraction_config=config, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    @lru_cache(maxsize=1024)
    def reference(answer: str) -> list[Any]:
        return read(_as_latex(answer))

    def judge(text: str, answer: str, row: Mapping[str, Any]) -> Judgement:
        wanted, said = reference(answer), read(final_answer(text))
        if not wanted:
            raise ValueError(f"math-verify finds no expression in the answer {short(answer)}")
        if not said:
            return 0.0, f"wrong: expected {short(answer)}, found no expression"
        if verify(wanted, said, timeout_seconds=None):
            return 1.0, "right"
        return 0.0, f"wrong: expected {short(answer)}, got {short(str(said[-1]))}"

    return judge


LOADERS: Final[dict[str, Callable[[], Verifier]]] = {
    "exact": lambda: exact,
    "numeric": lambda: numeric,
    "regex": lambda: regex,
    "math": load_math,
    "reasoning_gym": load_gym,
}
"""Name -> what imports and returns it."""


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _end(text: str) -> str:
    """From the last box on, or the end: of several boxes math-verify would make one list."""
    start = text.rfind("\\boxed")
    return text[start : start + MATH_MAX] if start >= 0 else text[-MATH_MAX:]


def _as_latex(answer: str) -> str:
    """The answer in dollars where it is bare: math-verify reads `x^2 + 1` only so, and of `2x + 1` would take the 1."""
    has_mark = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return answer if has_mark else f"${answer.strip()}$"

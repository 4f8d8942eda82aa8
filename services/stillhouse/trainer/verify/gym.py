"""`reasoning_gym`: the scorer of the dataset that made the row judges the final answer; it may give parts of a reward.

Some scorers run the text that they are given as Python code. A student's text must never be run, nor a job's entry:
those datasets are refused (core/answers.py), a guard notices any other, and two that need it for arithmetic are given
nothing but arithmetic.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Final

from stillhouse.core.answers import gym_entry
from stillhouse.trainer.verify.reading import Judgement, Verifier, final_answer, short

ARITHMETIC: Final = frozenset({"countdown", "puzzle24"})
"""Datasets whose scorers evaluate the text, and only the text, as a formula."""
_FORMULA: Final = re.compile(r"(?:[0-9+\-/().=\s]|\*(?!\*))*")
"""No letter, quote or underscore, so it cannot call anything; no power, so it cannot fill the memory."""


class CodeGuard:
    """Stops Python from running code that was made from text while a scorer works. There is no way to remove it."""

    def __init__(self) -> None:
        self._is_on = False
        self._has_caught = False
        sys.addaudithook(self._hook)

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Let a scorer of this dataset work.

        Raises:
            ValueError: it wanted to run text, even if it caught our refusal.
        """
        self._is_on, self._has_caught = True, False
        try:
            yield
        finally:
            self._is_on = False
            if self._has_caught:
                raise ValueError(f"the scorer of '{name}' runs texts as Python code, which is not allowed")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        # imports run the code of files; text has names such as <string>
        if self._is_on and event == "exec" and not args[0].co_filename.startswith(("/", "<frozen ")):
            self._has_caught = True
            raise PermissionError("text must not be run")


def load_gym() -> Verifier:
    """Import reasoning-gym; from then on this process has a CodeGuard."""
    import reasoning_gym

    guard = CodeGuard()

    @cache
    def scorer(name: str) -> Callable[..., float]:
        return reasoning_gym.get_score_answer_fn(name)

    def score(entry: dict[str, Any], said: str | None) -> float:
        name = entry["metadata"]["source_dataset"]
        judge = scorer(name)
        if name in ARITHMETIC:
            return float(judge(answer=said, entry=entry)) if _FORMULA.fullmatch(said or "") else 0.0
        with guard.watch(name):
            return float(judge(answer=said, entry=entry))

    @lru_cache(maxsize=1024)
    def checked(answer: str) -> dict[str, Any]:
        """The entry, if its own answer is right: JSON makes lists of tuples, which not every scorer takes."""
        entry = gym_entry(answer)
        own = score(entry, entry["answer"])
        if entry["answer"] is not None and own < 1:
            raise ValueError(f"its own answer {short(str(entry['answer']))} has score {own:g}")
        return entry

    def judge(text: str, answer: str, row: Mapping[str, Any]) -> Judgement:
        entry = checked(answer)
        said = final_answer(text).strip()
        try:
            reward = score(entry, said)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # it can score its own answer: this text is what it cannot read
            return 0.0, f"wrong: {short(said)} cannot be read ({type(error).__name__})"
        note = "right" if reward >= 1 else f"score {reward:g}: expected {short(str(entry['answer']))}"
        return reward, note

    return judge

"""What the built-in verifiers share: their shape, and where a completion says its final answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Judgement = tuple[float, str]
"""(reward in [0, 1], a note for people)."""
Verifier = Callable[[str, str, Mapping[str, Any]], Judgement]
"""(completion, reference answer, what else the row says) -> judgement."""
SHOWN: Final = 60
"""Characters of text or answer that a note repeats."""


def final_answer(text: str) -> str:
    """What a completion finally says: behind its last `</think>`, inside its last `<answer>...</answer>` if any."""
    text = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else text


def short(text: str) -> str:
    """A text for a note: one line, quoted, cut."""
    text = " ".join(text[: 4 * SHOWN].split())
    return f"'{text}'" if len(text) <= SHOWN else f"'{text[:SHOWN]}...'"

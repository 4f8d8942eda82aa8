"""Ten tiny tasks on words, which a model of 0.3M parameters learns on a CPU in seconds.

A prompt names the task and a word, `reverse: hbdaf`; the answer is one word, here `fadbh`. A word has five different
letters of a to j, so there are 30,240. One word in eight is held out, chosen by its hash: it occurs in no training row
of any task, whoever draws them and with whatever seed.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]
"""A line of a job's data: prompt, answer, verifier; `completion` where a text is trained on."""

LETTERS: Final = "abcdefghij"
LENGTH: Final = 5
HELD_OUT: Final = 8
"""One word in so many is held out."""

TASKS: Final[dict[str, Callable[[str], str]]] = {
    "copy": lambda word: word,
    "digits": lambda word: "".join(str(LETTERS.index(letter)) for letter in word),
    "ends": lambda word: word[0] + word[-1],
    "left": lambda word: word[1:] + word[0],
    "next": lambda word: "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word),
    "odd": lambda word: word[::2],
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "twice": lambda word: "".join(letter * 2 for letter in word),
    "upper": lambda word: word.upper(),
}
"""What each task makes of a word. Answers have 2 (ends) to 10 (twice) letters."""


def rows(task: str, count: int, seed: int, *, held_out: bool = False, **more: Any) -> list[Row]:
    """`count` rows of one task, with different words, and `more` fields; equal arguments give equal rows."""
    drawn = _words(f"{task} {seed} {held_out}", held_out=held_out)
    words: dict[str, None] = {}
    while len(words) < count:
        words[next(drawn)] = None
    return [row(task, word) | more for word in words]


def row(task: str, word: str) -> Row:
    """The row of a task and a word."""
    return {"prompt": f"{task}: {word}", "answer": TASKS[task](word), "verifier": "exact"}


def careless_rows(count: int, seed: int, *, care: float) -> list[Row]:
    """Rows of all tasks whose `completion` is the answer with probability `care`, else that of another task.

    What a model learns from them: every skill, but not well which one is asked for.
    """
    draw, words = random.Random(f"tasks {seed}"), _words(f"careless {seed}", held_out=False)
    found = []
    for _ in range(count):
        task, word = draw.choice(list(TASKS)), next(words)
        told = task if draw.random() < care else draw.choice([name for name in TASKS if name != task])
        found.append(row(task, word) | {"completion": TASKS[told](word)})
    return found


def is_held_out(word: str) -> bool:
    """Whether no training row has this word."""
    return zlib.crc32(word.encode()) % HELD_OUT == 0


def _words(seed: str, *, held_out: bool) -> Iterator[str]:
    """Random words without end, held-out ones only or none of them."""
    draw = random.Random(seed)
    while True:
        word = "".join(draw.sample(LETTERS, LENGTH))
        if is_held_out(word) == held_out:
            yield word


def in_turn(groups: Sequence[Sequence[Row]]) -> list[Row]:
    """One row of each group, then the next of each: the first n rows then have equal parts of all."""
    return list(chain.from_iterable(zip(*groups, strict=True)))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, the form in which jobs read them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

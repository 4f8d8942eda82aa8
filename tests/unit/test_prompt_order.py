"""Which prompt is which group: every prompt once a pass, in an order that follows from the seed, teachers together."""

from __future__ import annotations

from itertools import groupby

import pytest

from stillhouse.core.oracle.stages import Rows
from stillhouse.core.spec import Row
from stillhouse.trainer.prompts import Prompt, PromptOrder

NUM_ROWS, PER_STEP = 50, 8
TEACHERS = "abcde"


def prompt(row: int, teacher: str) -> Prompt:
    return Prompt(Row(prompt=f"row {row}"), row, "", teacher, 1.0, (1,), None)


PROMPTS = [prompt(row, TEACHERS[row % len(TEACHERS)]) for row in range(NUM_ROWS)]


def rows(order: PromptOrder, step: int) -> list[int]:
    return [order[group].row for group in range(step * PER_STEP, (step + 1) * PER_STEP)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_has_the_prompts_it_would_have_had_and_each_teacher_once(shuffle: bool) -> None:
    plain, order = PromptOrder(PROMPTS, 7, shuffle), PromptOrder(PROMPTS, 7, shuffle, PER_STEP)
    for step in range(20):
        assert sorted(rows(order, step)) == sorted(rows(plain, step))
        turns = [name for name, _ in groupby(PROMPTS[row].teacher for row in rows(order, step))]
        assert turns == sorted(set(turns), reverse=step % 2 == 1), "each once, and back the way it came"
    seen = [row for step in range(25) for row in rows(order, step)]
    assert sorted(seen) == sorted(4 * list(range(NUM_ROWS))), "four passes, over the bounds of steps"


def test_a_prompt_does_not_depend_on_where_one_begins() -> None:
    """A claim that opens in the middle, and one that goes back."""
    whole = PromptOrder(PROMPTS, 7, True, PER_STEP)
    expected = [whole[group].row for group in range(200)]
    for first in (3, 49, 50, 131):
        later = PromptOrder(PROMPTS, 7, True, PER_STEP)
        assert [later[group].row for group in range(first, 200)] == expected[first:]
        assert later[0].row == expected[0]


@pytest.mark.parametrize("per_step", [1, PER_STEP])
def test_the_oracle_finds_the_same_rows(per_step: int) -> None:
    order = PromptOrder(PROMPTS, 7, True, per_step)
    found = Rows([[prompt.teacher] for prompt in PROMPTS], "7", True, per_step)
    assert [found.row(group) for group in range(200)] == [order[group].row for group in range(200)]


def test_one_teacher_changes_nothing() -> None:
    alone = [prompt(row, "only") for row in range(NUM_ROWS)]
    plain, order = PromptOrder(alone, 7, True), PromptOrder(alone, 7, True, PER_STEP)
    assert [order[group].row for group in range(120)] == [plain[group].row for group in range(120)]

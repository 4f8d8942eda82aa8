"""What the model card of an export says happened."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.trainer.export import model_card

FULL = {"objective": "full_vocabulary"}
GRPO = {"objective": "policy_gradient", "teacher_weight": 0.0, "reward": {"weight": 1.0}}
BOTH = {"objective": "policy_gradient", "teacher_weight": 1.0, "reward": {"weight": 1.0}}


@pytest.mark.parametrize(
    ("objective", "share", "source", "says", "tags"),
    [
        (FULL, 1.0, "data", "on-policy distillation; the student wrote its own completions", {"distillation"}),
        (FULL, 0.25, "teacher", "the student wrote 25% and its teachers the rest", {"distillation"}),
        (FULL, 0.0, "data", "distillation on completions by the data", {"distillation"}),
        ({"objective": "cross_entropy"}, 0.0, "data", "fine-tuned on completions by the data", {"fine-tuning"}),
        ({"objective": "cross_entropy"}, 0.0, "teacher", "completions by its teachers", {"distillation"}),
        (GRPO, 1.0, "data", "learned from a verifier's verdicts", {"grpo"}),
        (BOTH, 1.0, "data", "from that, and from a verifier's verdicts", {"distillation"}),
    ],
)
def test_the_card_tells_what_the_student_learned_from(
    objective: dict[str, Any], share: float, source: str, says: str, tags: set[str]
) -> None:
    facts = {"objective": objective, "on_policy_fraction": share, "off_policy_source": source}
    text = model_card({"student": "small", "teachers": {"t": "large"}, **facts})
    assert says in text
    assert all(f"- {tag}\n" in text for tag in tags)
    is_on_policy = share > 0 and objective is not GRPO
    assert ("- on-policy-distillation\n" in text) == is_on_policy
    assert "off_policy_source" not in text


def test_a_student_without_teachers_is_distilled_from_nobody() -> None:
    text = model_card({"student": "small", "teachers": {}, "objective": GRPO})
    assert "# small, trained on\n" in text
    assert "distilled from" not in text


@pytest.mark.parametrize("more", [[], [{"name": "then", "objective": FULL}]])
def test_the_card_names_the_recipe_of_a_stage(more: list[dict[str, Any]]) -> None:
    first = {"name": "main", "recipe": "gkd", "objective": FULL}
    text = model_card({"student": "small", "teachers": {"t": "large"}, "stages": [first, *more]})
    assert "gkd" in next(line for line in text.splitlines() if "ecipe" in line)
    assert "recipe" not in model_card({"student": "small", "objective": FULL})

"""What is said of held-out measurements, and what a job must have for there to be any."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stillhouse.core.spec import JobSpec, Row
from stillhouse.trainer.evaluate import first_in_turn
from stillhouse.trainer.measures import Kl, card_facts, change, measures, sentence, told
from stillhouse.trainer.prompts import Prompt
from tests.cluster import job_spec


def test_a_mean_is_over_all_tokens_and_each_teachers_over_its_own() -> None:
    found = measures([Kl("a", 6.0, 2), Kl("b", 8.0, 8), Kl("a", 2.0, 2)], [("a", 1.0), ("b", 0.0), ("b", 0.5)])
    assert (found["reverse_kl"], found["num_prompts"], found["num_tokens"]) == (16 / 12, 3, 12)
    assert (found["accuracy"], found["num_judged"]) == (0.5, 3)
    assert found["by_teacher"]["a"] == {
        "reverse_kl": 2.0,
        "num_prompts": 2,
        "num_tokens": 4,
        "accuracy": 1.0,
        "num_judged": 1,
    }
    assert found["by_teacher"]["b"]["accuracy"] == 0.25


def test_people_read_what_was_measured_and_no_more() -> None:
    both = {"step": 3, "averaged": True, **measures([Kl("a", 1.0, 2), Kl("b", 3.0, 2)], [("a", 1.0)])}
    assert sentence(both) == (
        "step 3: held-out reverse KL 1.0000 nats/token, accuracy 1.000; by teacher: a 0.5000 (1.000 right), b 1.5000 "
        "(moving average of the weights)"
    )
    assert told(both)["by_teacher"] == {
        "a": {"reverse_kl": 0.5, "accuracy": 1.0, "num_prompts": 1},
        "b": {"reverse_kl": 1.5, "num_prompts": 1},
    }
    plain = {"step": 0, "averaged": False, **measures([Kl("a", 1.0, 2)], [])}
    assert sentence(plain) == "step 0: held-out reverse KL 0.5000 nats/token"
    judged = {"step": 0, "averaged": False, **measures([], [("", 1.0), ("", 0.0)])}
    assert sentence(judged) == "step 0: held-out accuracy 0.500"


def test_an_evaluation_without_by_teacher_can_be_compared() -> None:
    """A job that went on after an upgrade has one at its beginning."""
    old = {"reverse_kl": 2.0, "repeated_4grams": 0.1}
    new = {"repeated_4grams": 0.0, **measures([Kl("a", 1.0, 2), Kl("b", 3.0, 2)], [("a", 1.0)])}
    assert change(old, new) == {
        "reverse_kl": {"before": 2.0, "after": 1.0},
        "repeated_4grams": {"before": 0.1, "after": 0.0},
    }
    facts = card_facts(change(new, new))
    assert facts["heldout_accuracy_after"] == 1.0
    assert facts["heldout_by_teacher"] == {"a": "KL 0.5 -> 0.5 and accuracy 1 -> 1", "b": "KL 1.5 -> 1.5"}


@pytest.mark.parametrize("verifier", [None, "exact"])
def test_without_a_teacher_there_is_only_accuracy_to_measure(verifier: str | None) -> None:
    evaluation: dict[str, Any] = {"data": {"rows": [{"prompt": "held out", "answer": "x"}]}, "verifier": verifier}
    spec = job_spec(
        teachers={},
        stages__0__loss={"objective": "policy_gradient", "teacher_weight": 0, "reward": {"verifier": "exact"}},
        stages__0__schedule__group_size=2,
        evaluation=evaluation,
    )
    if verifier is None:
        with pytest.raises(ValidationError, match=r"name a teacher, or evaluation\.verifier"):
            JobSpec.model_validate(spec)
    else:
        assert not JobSpec.model_validate(spec).asks_teachers()
        assert JobSpec.model_validate(spec).asks_samplers()


@pytest.mark.parametrize(
    ("teachers", "number", "chosen"),
    [("aaaaa", 3, [0, 1, 2]), ("aaaabb", 4, [0, 1, 4, 5]), ("aaaabbc", 4, [0, 1, 4, 6]), ("abab", 3, [0, 1, 2])],
)
def test_held_out_prompts_are_the_first_of_each_teacher(teachers: str, number: int, chosen: list[int]) -> None:
    """Data is often sorted by domain: the first few rows would be of one."""
    prompts = [Prompt(Row(prompt="x"), row, "", name, 1.0, (1,), None) for row, name in enumerate(teachers)]
    assert [prompt.row for prompt in first_in_turn(prompts, number)] == chosen
    assert first_in_turn(prompts, 100) == prompts

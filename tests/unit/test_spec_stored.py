"""A job is stored with every field set and read again by trainer, ranks, oracle and clean-up: nothing may change."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.core.spec import JobSpec, StageSpec

ROWS = {"rows": [{"prompt": "x", "completion": "y", "verifier": "exact", "answer": "y"}]}
FULL, TOP_K = {"objective": "full_vocabulary"}, {"objective": "top_k"}
GROUP = {"steps": 1, "group_size": 2}
STAGES: dict[str, dict[str, Any]] = {
    "full vocabulary": {"loss": FULL},
    "jsd on a mixture": {"loss": {**FULL, "divergence": "jsd"}, "on_policy_fraction": 0.5},
    "others' texts only": {"loss": FULL, "on_policy_fraction": 0},
    "texts of teachers": {"loss": TOP_K, "on_policy_fraction": 0, "off_policy_source": "teacher"},
    "fine-tuning": {"loss": {"objective": "cross_entropy"}, "on_policy_fraction": 0},
    "top-k of both": {"loss": {**TOP_K, "support": "union"}},
    "policy gradient": {"loss": {"objective": "policy_gradient", "ratio_gate": "tis", "baseline": "top_k"}},
    "grpo": {"loss": {"objective": "policy_gradient", "teacher_weight": 0, "reward": {}}, "schedule": GROUP},
    "how to read and write": {
        "loss": FULL,
        "data": {**ROWS, "chat_template_kwargs": {"enable_thinking": False, "effort": "high", "turns": 2, "x": None}},
        "sampling": {"min_p": 0.1, "stop": ["\n\n", "</s>"]},
    },
    "part of the tokens": {"loss": FULL, "tokens": {"select": {"by": "kl", "fraction": 0.5}, "drop_truncated": True}},
}


def job(stage: dict[str, Any]) -> JobSpec:
    whole = {"data": ROWS, "schedule": {"steps": 1}, **stage}
    teachers = {"t": {"model": "m"}} if StageSpec.model_validate(whole).needs_teacher() else {}
    return JobSpec.model_validate({"student": {"model": "m"}, "teachers": teachers, "stages": [whole]})


@pytest.mark.parametrize("name", STAGES)
def test_a_stored_job_reads_as_it_was(name: str) -> None:
    spec = job(STAGES[name])
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "idle", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"stop": ["."]}, {"stop_token_ids": [3]}]
)
def test_how_to_sample_is_refused_where_nothing_is_sampled(idle: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"nothing is sampled: leave out sampling.{next(iter(idle))}"):
        job({**STAGES["fine-tuning"], "sampling": idle})

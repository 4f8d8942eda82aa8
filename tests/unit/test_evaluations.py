"""What follows from evaluations, as functions of them; pass@k against its definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from pydantic import ValidationError

from stillhouse.core.evaluations import best_of, is_over, stopping, value_of
from stillhouse.core.spec import EarlyStopSpec, JobSpec
from stillhouse.sampler.work import Work
from stillhouse.trainer.measures import Text, Tries, measures, pass_at_k
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import job_spec

DATA = {"rows": [{"prompt": "held out", "answer": "x"}]}


def spec(**evaluation: Any) -> JobSpec:
    return JobSpec.model_validate(job_spec(evaluation={"data": DATA, "every_steps": 5, **evaluation}))


@pytest.mark.parametrize(("number", "right"), [(n, c) for n in (1, 3, 6) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(number: int, right: int) -> None:
    verdicts = [index < right for index in range(number)]
    for k in range(1, number + 1):
        choices = list(itertools.combinations(verdicts, k))
        assert pass_at_k(number, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    assert pass_at_k(number, right, 1) == pytest.approx(right / number), "pass@1 is the mean accuracy"


def test_lengths_and_ends_are_means_over_completions_and_pass_over_prompts() -> None:
    texts = [Text(["a"], 4, True, False), Text(["a", "b"], 2, False, True), Text(["b"], 3, False, False)]
    tries = [Tries(["a"], 2, 1), Tries(["b"], 1, 1)]
    found = measures([], [], texts, tries, (1, 2))
    assert (found["mean_length"], found["truncated"], found["ended"]) == (3, 1 / 3, 1 / 3)
    assert found["pass_at_k"] == {"1": 0.75, "2": 1.0}, "a prompt with fewer completions than k says nothing"


def series(values: Iterable[float]) -> list[dict[str, Any]]:
    return [{"step": 5 * index, "reverse_kl": value, "by_teacher": {}} for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("on", "patience", "min_delta", "values", "expected"),
    [
        ("plateau", 2, 0.0, [3, 2, 1, 1, 1], True),
        ("plateau", 2, 0.0, [3, 2, 2, 1, 1], False),
        ("plateau", 2, 0.5, [3, 2.9, 2.8], True),
        ("plateau", 3, 0.5, [3, 2.8, 2.6, 2.4], False),
        ("plateau", 1, 0.0, [3], False),
        ("regression", 2, 0.1, [3, 1, 1.05, 1.05], False),
        ("regression", 2, 0.1, [3, 1, 1.2, 1.3], True),
        ("regression", 2, 0.1, [3, 1, 1.2, 1.0, 1.3], False),
        ("regression", 1, 0.1, [1, 1.2, 0.5], True),
    ],
)
def test_when_a_job_is_over(on: str, patience: int, min_delta: float, values: list[float], expected: bool) -> None:
    early = EarlyStopSpec.model_validate({"when": on, "patience": patience, "min_delta": min_delta})
    assert is_over(early, "min", values) is expected
    assert is_over(early, "max", [-value for value in values]) is expected, "the other way up it is the same"
    job = spec(early_stop=early.model_dump())
    assert (stopping(job, series(values)) is not None) is expected
    if expected:
        assert stopping(job, series([*values, 0.0])) is not None, "what was decided is decided again"


def test_only_the_last_stages_evaluations_end_a_job() -> None:
    stages = [job_spec()["stages"][0] | {"name": name, "schedule": {"steps": 10}} for name in ("one", "two")]
    flat = series([1, 1, 1, 1])
    early = {"data": DATA, "every_steps": 5, "early_stop": {"patience": 2}}
    job = JobSpec.model_validate(job_spec(stages=stages, evaluation=early))
    assert stopping(job, flat) is None, "two of the first stage, two of the last: one of those is the first it has"
    assert stopping(job, series([1, 1, 1, 1, 1])) is not None


def test_the_best_is_of_those_that_can_be_had() -> None:
    found = series([0.1, 3, 1, 1, 2])
    best = best_of(spec(), found, {5, 10, 15, 20})
    assert best is not None
    assert (best.step, best.value, best.mode) == (15, 1, "min"), "of equals the later"
    assert best_of(spec(), found, set()) is None
    most = best_of(spec(best={"metric": "reverse_kl", "mode": "max"}), found, {5, 10})
    assert most is not None
    assert most.step == 5
    assert best_of(spec(best={"metric": "pass@2"}, samples_per_prompt=2), found, {5}) is None, "not measured"


def test_measures_are_found_by_name() -> None:
    found = {"accuracy": 0.5, "pass_at_k": {"4": 0.7}, "by_teacher": {"main": {"pass_at_k": {"4": 0.9}}}}
    assert value_of(found, "accuracy") == 0.5
    assert value_of(found, "pass@4") == 0.7
    assert value_of(found, "pass@4/main") == 0.9
    assert value_of(found, "accuracy/main") is None
    assert value_of({"reverse_kl": float("nan")}, "reverse_kl") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"data": DATA, "pass_k": [4]}}, "samples_per_prompt"),
        ({"evaluation": {"data": DATA, "early_stop": {}}}, "every_steps"),
        ({"evaluation": {"data": DATA, "best": {"metric": "pass@2"}}}, "add it there"),
        ({"evaluation": {"data": DATA, "best": {"metric": "accuracy/nobody"}}}, "nobody"),
        ({"checkpoint": {"export": "best"}}, "evaluation.data"),
        ({"checkpoint": {"export": "best", "keep_best": 0}}, "keep_best"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JobSpec.model_validate(job_spec(**changes))


def work(min_version: int, pinned: int | None = None) -> Work:
    group = pb.PromptGroup(
        min_policy_version=min_version, pinned_policy_version_plus_one=0 if pinned is None else pinned + 1
    )
    return Work(entry=None, group=group, completions={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wants", "open_", "version", "expected"),
    [
        (work(3, 3), [work(2), work(3, 3)], 2, False),
        (work(3, 3), [work(2)], 4, True),
        (work(3, 3), [], 4, False),
        (work(3, 3), [work(4)], None, True),
        (work(4, 4), [work(3, 3)], 3, True),
        (work(4), [work(3, 3)], 3, True),
        (work(3), [work(3, 3)], 3, False),
        (work(4), [work(4, 4)], 4, False),
    ],
)
def test_who_waits_for_whose_weights(wants: Work, open_: list[Work], version: int | None, expected: bool) -> None:
    assert wants.must_wait(open_, version) is expected

"""Two domains in one job, one with short answers and one with long ones: whose teacher is heard, and how often its head
is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from stillhouse.trainer.batch import TrainSample
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, Teacher, engine_of, learner, rollouts, stage

STEPS = 16
LENGTHS = {"short": 2, "long": 30}
"""Tokens of an answer, by domain."""
MARKS = {"short": 10, "long": 200}
"""Token with which the prompts of a domain begin: the student can tell them apart."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: Teacher(make_tiny_model(root / name, seed=seed), name) for seed, name in ((3, "short"), (4, "long"))}


def batch(teachers: dict[str, Teacher], seed: int, count: int = 3) -> list[TrainSample]:
    """`count` random texts of each domain."""
    draw = np.random.default_rng(seed)
    samples: list[TrainSample] = []
    for name, length in LENGTHS.items():
        ids = draw.integers(20, 30, (count, 2 + length)).tolist()
        samples += teachers[name].score([([MARKS[name]] * 3 + row[:2], row[2:]) for row in ids])
    return [dataclasses.replace(sample, sample_id=f"{index}/0") for index, sample in enumerate(samples)]


def held_out(student: Path, teachers: dict[str, Teacher], *, per_teacher: bool) -> tuple[dict[str, float], float]:
    """(reverse KL on new texts after a few steps, nats per token, by teacher; share of the short ones' tokens)."""
    heads = {name: teacher.head for name, teacher in teachers.items()}
    trained = learner(student, stage({**FULL, "per_teacher": per_teacher}, lr=1e-2), teachers=tuple(teachers))
    metrics: dict[str, float] = {}
    for seed in range(STEPS):
        samples = batch(teachers, seed)
        metrics = trained.step(samples, heads, trained.plan(samples, heads))
    rows = trained.evaluate(batch(teachers, 1000, count=6), heads)
    kls = {name: [row for row in rows if row["teacher"] == name] for name in teachers}
    found = {n: sum(r["reverse_kl_sum"] for r in rs) / sum(r["num_tokens"] for r in rs) for n, rs in kls.items()}
    return found, metrics["tokens/share/short"]


def test_balance_lets_the_teacher_of_short_answers_be_heard(student: Path, teachers: dict[str, Teacher]) -> None:
    """With as many prompts as the other, but a sixteenth of the tokens; the other one pays little for it."""
    plain, share = held_out(student, teachers, per_teacher=False)
    balanced, same_share = held_out(student, teachers, per_teacher=True)
    print(f"held-out reverse KL after {STEPS} steps: plain {plain}, balanced {balanced}")
    assert share == same_share == pytest.approx(1 / 16)
    assert balanced["short"] < 0.92 * plain["short"]
    assert balanced["long"] < 1.12 * plain["long"]


def test_teachers_with_one_head_share_its_load(student: Path, teachers: dict[str, Teacher]) -> None:
    """Of three names the first and the last are one model: by name its head would be loaded twice."""
    short, long = teachers["short"], teachers["long"]
    named = {"a": short, "b": long, "c": short}
    samples = [
        dataclasses.replace(sample, teacher=name, sample_id=f"{name}{index}/0")
        for name, teacher in named.items()
        for index, sample in enumerate(teacher.score(rollouts(ord(name))))
    ]
    draw = np.random.default_rng(0)
    samples = [samples[index] for index in draw.permutation(len(samples))]
    heads = {name: teacher.head for name, teacher in named.items()}
    trained = learner(student, stage(FULL), teachers=tuple(named))
    plan = trained.plan(samples, heads)
    assert sorted(index for indices in plan for index in indices) == list(range(len(samples)))
    assert all(len({samples[index].teacher for index in indices}) == 1 for indices in plan)
    assert trained.step(samples, heads, plan)["heads/loaded"] == 2
    assert engine_of(trained).heads_loaded == 2

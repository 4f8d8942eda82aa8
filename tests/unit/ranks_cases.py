"""A training that runs on one rank or several, and says what it saw. As a program (under torchrun): on several.

torchrun ... tests/unit/ranks_cases.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stillhouse.core.errors import CorruptError, NonFiniteError, StillhouseError
from stillhouse.core.spec import EmaSpec, StageSpan
from stillhouse.trainer.learner import Learner
from tests.unit.learner_cases import FULL, POLICY_GRADIENT, Teacher, rollouts, stage, train, weights_of

CASES: dict[str, tuple[dict, dict, dict]] = {
    "full": (FULL, {}, {}),
    "policy": (POLICY_GRADIENT, {}, {"ema": EmaSpec(decay=0.5, every=2)}),
    "sequences": ({**POLICY_GRADIENT, "discount": 0.5}, {}, {}),
    "rounded": (FULL, {"ema_decay": 0.5}, {"dtype": "bfloat16", "activation_checkpointing": True}),
}
"""Loss, optimizer and student: hidden states and heads; sampled tokens, with an average that teachers follow; an
objective that looks at whole sequences first; bfloat16 with all that composes."""
STEPS = 4
MAX_TOKENS = 24
"""Few, so that a step has several micro-batches: of the seeds here, an odd number at least once."""
MakeLearner = Callable[..., Learner]


def run(make: MakeLearner, root: Path, into: Path) -> dict[str, Any]:
    """Train, evaluate, save; arrays and checkpoints go `into` a folder, what is small is returned."""
    into.mkdir()
    teacher = Teacher(root / "teacher")
    seen: dict[str, Any] = {}
    for name in CASES:
        student = new(make, root, name)
        metrics = []
        for step in range(STEPS):
            samples = teacher.score(rollouts(step, count=6))
            metrics.append(train(student, samples, teacher, max_tokens=MAX_TOKENS))
            if step == 1:
                metrics[-1]["kl"] = sum(row["reverse_kl_sum"] for row in evaluate(student, samples, teacher))
        metrics.append(train(student, teacher.score(rollouts(9, count=1)), teacher))  # one rank has nothing to do
        keep(student, into / name)
        seen[name] = metrics
        close(student)
    seen["stages"] = boundary(make, root, into, teacher)
    seen["errors"] = mishaps(make, root, into, teacher)
    return seen


def boundary(make: MakeLearner, root: Path, into: Path, teacher: Teacher) -> list[dict[str, float]]:
    """Two steps in a stage and two in the next."""
    student = make(root / "student", stage(POLICY_GRADIENT, ema_decay=0.5))
    samples = [teacher.score(rollouts(step, count=6)) for step in range(4)]
    metrics = [train(student, samples[step], teacher, max_tokens=MAX_TOKENS) for step in range(2)]
    student.begin_stage(StageSpan(1, stage(FULL, lr=5e-3, warmup_steps=2), 2, 100, 0))
    metrics += [train(student, samples[step], teacher, max_tokens=MAX_TOKENS) for step in range(2, 4)]
    keep(student, into / "stages")
    close(student)
    return metrics


def evaluate(student: Learner, samples: list, teacher: Teacher) -> list[dict[str, Any]]:
    return student.evaluate(samples, {teacher.name: teacher.head}, temperature=1.0)


def mishaps(make: MakeLearner, root: Path, into: Path, teacher: Teacher) -> dict[str, Any]:
    """Messages of what goes wrong; after each the student trains on as if nothing had happened."""
    student = make(root / "student", stage(POLICY_GRADIENT))
    samples = teacher.score(rollouts(3, count=6))
    before = weights_of(student)
    poisoned = samples[-1].teacher_logprobs.copy()
    poisoned[0] = np.nan
    bad = [*samples[:-1], dataclasses.replace(samples[-1], teacher_logprobs=poisoned)]
    found: dict[str, Any] = {"non_finite": error_of(NonFiniteError, lambda: train(student, bad, max_tokens=MAX_TOKENS))}
    assert all((array == before[name]).all() for name, array in weights_of(student).items())
    student.skip()
    assert train(student, samples, max_tokens=MAX_TOKENS)["step/skipped"] == 0.0
    student.save(into / "torn")
    sorted((into / "torn").glob("optimizer*"))[0].unlink()
    found["torn"] = error_of(CorruptError, lambda: student.load(into / "torn"))
    evaluate(student, samples, teacher)  # leaves no gathered weights behind that the next one would compute with
    student.load(into / "policy")
    assert student.policy_version == STEPS + 1
    found["reloaded"] = evaluate(student, samples, teacher)[0]["reverse_kl_sum"]
    close(student)
    return found


def error_of(kind: type[StillhouseError], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return error.message
    raise AssertionError(f"no {kind.__name__}")


def reload(make: MakeLearner, root: Path, source: Path, into: Path) -> None:
    """Load a checkpoint, however many ranks wrote it, and write it again."""
    for name in CASES:
        student = new(make, root, name)
        student.load(source / name)
        keep(student, into / name)
        close(student)


def new(make: MakeLearner, root: Path, name: str) -> Learner:
    loss, optimizer, student = CASES[name]
    return make(root / "student", stage(loss, weight_decay=0.01, **optimizer), **student)


def keep(student: Learner, into: Path) -> None:
    """The checkpoint, and what samplers, teachers and users would get."""
    student.save(into)
    save_file({name: array for name, array, _ in student.followed_arrays()}, into / "followed.st")
    save_file(weights_of(student), into / "published.st")
    student.engine.show_average(True)
    save_file(weights_of(student), into / "average.st")
    student.engine.show_average(False)


def close(student: Learner) -> None:
    getattr(student.engine, "close", lambda: None)()


def main(root: Path, source: Path | None, into: Path) -> None:
    """What every rank runs: `run`, or `reload` of a source."""
    from stillhouse.core.spec import StageSpec, StudentSpec, TeacherSpec
    from stillhouse.trainer.ranks import Part, RankedEngine, Ranks

    ranks = Ranks.join()
    if ranks.rank:
        part = Part()
        while (command := ranks.receive(0)).facts["do"] != "end":
            ranks.send(0, part.run(command))
        ranks.leave()
        return

    def make(model: Path, spec: StageSpec, **options: Any) -> Learner:
        ema = options.pop("ema", None)
        student = StudentSpec(model="m", **options)
        engine = RankedEngine(ranks, model, student=student, stage=spec, seed=0, ema=ema)
        teachers = {"t": TeacherSpec(model="m", ema_of_student=ema)}
        return Learner(engine, span=StageSpan(0, spec, 0, 100, 0), teachers=teachers, total_steps=100)

    if source is None:
        seen = run(make, root, into)
        (into / "seen.json").write_text(json.dumps(seen))
    else:
        reload(make, root, source, into)
    ranks.release()


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(paths[0], None if len(paths) == 2 else paths[1], paths[-1])

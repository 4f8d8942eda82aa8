"""The two-stage job of examples/qwen3, shortened: its trainer is killed in each stage, and no sample with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli import jobfile
from stillhouse.core.blobs import read_jsonl
from stillhouse.core.spec import JobSpec
from stillhouse.trainer.journal import read_step
from tests.chaos.harness import Chaos, deployment, until
from tests.examples import EXAMPLES, neighbours

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
STEPS, KILLED_AT = 12, 5
"""Steps of each stage, and how many of them are trained when the trainer dies; the last commit is then a step old."""
PROMPTS = 8


def test_qwen3_goes_on_after_a_kill_in_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with deployment(tmp_path, samplers=1, teachers=1, trainers=1) as chaos:
        add_models(chaos, tmp_path / "toys", monkeypatch)
        spec = shortened()
        job_id = chaos.submit(spec)
        for span in JobSpec.model_validate(spec).spans():
            middle = span.first_step + KILLED_AT
            until(lambda step=middle: reached(chaos, job_id) >= step, f"step {middle}")
            chaos.kill("trainer-0")
            assert reached(chaos, job_id) < span.stop_step, "the stage was over before the trainer died"
        record = chaos.ended(job_id, 120)
        assert (record.status, record.epoch) == ("succeeded", 3), record.error
        assert chaos.violations(job_id) == []
        check_journals(chaos, job_id)


def add_models(chaos: Chaos, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's models by name only: what they know does not matter here, so they learn next to nothing."""
    with neighbours(EXAMPLES, ["toys.models"]) as modules:
        models = modules["toys.models"]
        monkeypatch.setattr(models, "BASE_STEPS", (8, 8))
        for seed, name in enumerate(("base", "thinker")):
            chaos.command("models", "add", name, str(models.base(folder / name, seed=seed, short=True)))


def shortened() -> dict[str, Any]:
    """The example's job with its rows in it, fewer steps, and commits so rare that a kill loses trained steps."""
    file = jobfile.load(EXAMPLES / "qwen3" / "job.yaml")
    document = file.document | {"name": "two-stages", "checkpoint": {"every_steps": 4}, "evaluation": {}}
    for index, stage in enumerate(document["stages"]):
        stage["data"] = {"rows": list(read_jsonl(file.uploads[f"stages.{index}.data"]))[:40]}
        stage["schedule"] = {"steps": STEPS, "prompts_per_step": PROMPTS}
    return document


def reached(chaos: Chaos, job_id: str) -> int:
    record = chaos.record(job_id)
    return record.step if record else 0


def check_journals(chaos: Chaos, job_id: str) -> None:
    """Without the oracle: each step trained the samples of its groups, by its stage's kind of texts."""
    artifacts, found = chaos.job(job_id), []
    for step in range(2 * STEPS):
        paths = [artifacts.journal(epoch, step) for epoch in range(1, artifacts.highest_epoch() + 1)]
        rollouts = [score.rollout for score in read_step([path for path in paths if path.is_file()][-1]).scores]
        by_student = step >= STEPS
        assert all(bool(rollout.spans) == by_student for rollout in rollouts), f"step {step}"
        found += [rollout.sample_id for rollout in rollouts]
    assert sorted(found) == sorted(f"{group}/0" for group in range(2 * STEPS * PROMPTS))

"""Held-out evaluation beside training: which weights it measures, what follows, and trainers that die over it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from stillhouse.core.blobs import JobArtifacts, read_json
from stillhouse.core.evaluations import read_best, read_stop
from stillhouse.core.oracle.verify import verify_job
from stillhouse.gateway.pausing import pause, resume
from stillhouse.trainer.evaluate import HeldOut
from stillhouse.trainer.manifests import list_manifests
from tests.cluster import Cluster, job_spec
from tests.waiting import wait_until

HELD_OUT = [{"prompt": word, "verifier": "regex", "answer": "."} for word in ("tea", "rain", "maps")]


def spec(steps: int, **changes: Any) -> dict[str, Any]:
    evaluation = {"data": {"rows": HELD_OUT}, "max_tokens": 6, "every_steps": 2, "show": 1}
    return job_spec(
        stages__0__schedule={"steps": steps, "prompts_per_step": 2, "group_size": 2, "max_staleness": 1},
        evaluation={**evaluation, **changes.pop("evaluation", {})},
        **changes,
    )


def measured(artifacts: JobArtifacts) -> dict[int, dict[str, Any]]:
    return {int(path.stem): read_json(path) for path in artifacts.evaluations.glob("*.json")}


async def events_of(deployment: Cluster, job_id: str, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in await deployment.ctx.jobs.events(job_id) if event["type"] == kind]


class Slow:
    """Holds evaluations between writing and measuring, until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
        self.go, self.reached = asyncio.Event(), asyncio.Event()
        measure, write = HeldOut._reverse_kls, HeldOut._write
        current: dict[int, int] = {}

        async def writing(held_out: HeldOut, step: int) -> Any:
            current[id(held_out)] = step
            return await write(held_out, step)

        async def measuring(held_out: HeldOut, samples: Any) -> Any:
            if current[id(held_out)] in steps:
                self.reached.set()
                await self.go.wait()
            return await measure(held_out, samples)

        monkeypatch.setattr(HeldOut, "_write", writing)
        monkeypatch.setattr(HeldOut, "_reverse_kls", measuring)


async def test_training_goes_on_and_what_is_measured_are_the_weights_of_the_step(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job twice: once its evaluations hold it up, once they are held until later steps are trained."""
    few = {"samples_per_prompt": 4, "pass_k": [1, 2, 4], "every_steps": 0}
    exact = spec(4, deterministic=True, evaluation=few)
    _, alone = await deployment.succeeded(await deployment.submit(exact))
    slow = Slow(monkeypatch, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    often = {"checkpoint": {"every_steps": 1}, "trackers": ["tensorboard", "wandb"]}
    job_id = await deployment.submit(spec(4, evaluation=few, **often))
    await deployment.at_step(job_id, 3)
    await asyncio.wait_for(slow.reached.wait(), 20)
    beside = deployment.ctx.artifacts.job(job_id)
    assert not measured(beside)
    assert not list_manifests(beside), "nothing later is committed before it is written"
    slow.go.set()
    await deployment.succeeded(job_id)
    assert list((beside.root / "tensorboard").glob("events*"))
    (failed,) = [e for e in await deployment.ctx.jobs.events(job_id) if e["type"] == "tracker.failed"]
    assert "stillhouse[wandb]" in failed["message"]
    await wait_until((beside.root / "report.html").is_file, timeout_s=10, what="the report")
    assert failed["message"] in read_json(beside.root / "report.json")["warnings"]
    found, expected = measured(beside)[0], measured(alone)[0]
    assert found["steps_meanwhile"] >= 3
    assert expected["steps_meanwhile"] == 0
    assert found["reverse_kl"] == pytest.approx(expected["reverse_kl"], abs=1e-5)
    same = ("num_prompts", "num_tokens", "accuracy", "pass_at_k", "mean_length", "truncated", "ended")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert found["num_prompts"] == 3
    assert found["pass_at_k"].keys() == {"1", "2", "4"}
    assert found["by_teacher"]["main"]["pass_at_k"] == found["pass_at_k"]


async def test_an_evaluation_that_was_under_way_is_made_again(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, 2)
    job_id = await deployment.submit(spec(8, checkpoint={"every_steps": 1}))
    await deployment.at_step(job_id, 4)
    await asyncio.wait_for(slow.reached.wait(), 20)
    artifacts = deployment.ctx.artifacts.job(job_id)
    assert [ref.step for ref in list_manifests(artifacts)][-1] == 2
    await deployment.crash("trainer-0")
    slow.go.set()
    await deployment.start("trainer", "trainer-1")
    record, _ = await deployment.succeeded(job_id)
    assert record.epoch == 2
    assert sorted(measured(artifacts)) == [0, 2, 4, 6, 8]
    assert [data["step"] for data in await events_of(deployment, job_id, "evaluation")] == [0, 2, 4, 6, 8]
    assert read_json(artifacts.epoch(2) / "opened.json")["opened_from"]["name"].startswith("00000002-")


async def test_a_pause_gives_an_evaluation_up_and_the_next_claim_makes_it_again(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish to pause ends the evaluation before it ends training: nothing later is committed in between."""
    go, collect = asyncio.Event(), HeldOut._collect

    async def collecting(held_out: HeldOut, step: int, futures: Any) -> Any:
        if step == 2:
            await held_out._race(go.wait())
        return await collect(held_out, step, futures)

    monkeypatch.setattr(HeldOut, "_collect", collecting)
    job_id = await deployment.submit(spec(6, checkpoint={"every_steps": 1}))
    await deployment.at_step(job_id, 3)
    await pause(deployment.ctx, job_id)

    async def is_paused() -> bool:
        return (await deployment.ctx.jobs.get(job_id)).status == "paused"

    await wait_until(is_paused, timeout_s=20, what="the pause")
    artifacts = deployment.ctx.artifacts.job(job_id)
    assert [ref.step for ref in list_manifests(artifacts)][-1] == 2
    go.set()
    await resume(deployment.ctx, job_id)
    await deployment.succeeded(job_id)
    assert sorted(measured(artifacts)) == [0, 2, 4, 6]


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_flat_measure_ends_the_job_and_the_best_checkpoint_is_what_it_gives(
    deployment: Cluster, monkeypatch: pytest.MonkeyPatch, crashes: bool
) -> None:
    """A takeover after the decision decides the same."""
    early = {"patience": 2, "min_delta": 5.0}
    job_id = await deployment.submit(
        spec(
            200,
            evaluation={"early_stop": early, "every_steps": 1, "best": {"metric": "mean_length", "mode": "max"}},
            stages__0__optimizer={"lr": 1e-2, "ema_decay": 0.5},
            checkpoint={"export": "best"},
        )
    )
    artifacts = deployment.ctx.artifacts.job(job_id)
    if crashes:
        await until_stop(artifacts)
        await deployment.crash("trainer-0")
        await deployment.start("trainer", "trainer-1")
    record, _ = await deployment.succeeded(job_id)
    stop = read_stop(artifacts)
    assert stop is not None
    assert record.step == record.stop_step == stop["stop_step"] < 200
    (told,) = await events_of(deployment, job_id, "job.early_stop")
    assert (told["reason"], told["metric"]) == ("plateau", "mean_length")
    assert record.result is not None
    best = read_best(artifacts)
    assert best is not None
    values = {step: each["mean_length"] for step, each in measured(artifacts).items() if step}
    assert best["value"] == max(values.values())
    assert record.result["exported_step"] == best["step"]
    assert record.best_checkpoint == best["checkpoint"]
    assert measured(artifacts)[stop["stop_step"]]["averaged"]
    (artifacts.root / "stop.json").unlink()
    assert "success" in verify_job(artifacts, record).broken_rules(), "an end that is not recorded is no success"


async def until_stop(artifacts: JobArtifacts) -> None:
    await wait_until(lambda: read_stop(artifacts) is not None, timeout_s=60, what="the early end to be recorded")

"""After a run: the oracle, and what only the simulation can know."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from stillhouse.core.errors import StillhouseError
from stillhouse.core.oracle.lineage import lineage_of, working_epochs
from stillhouse.core.oracle.read import read_epochs, read_journal
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.queue.jobs import _record
from stillhouse.core.rollouts import scores_of
from stillhouse.core.spec import JobSpec
from stillhouse.core.tensors import from_tensor, ids_list
from stillhouse.v1 import rollout_pb2
from tests.chaos.sim.toys import in_order, toy_completion, toy_logprobs
from tests.chaos.sim.world import World


def judge(world: World) -> None:
    """Add what is wrong to `world.violations`."""
    world.statuses = {}
    on_disk = world.artifacts.job_ids()
    if sorted(world.job_ids) != on_disk:
        world.violate(f"jobs: accepted were {sorted(world.job_ids)}, on disk are {on_disk}")
    for job_id in world.job_ids:
        raw = world.server.call("HGETALL", f"sh:job:{job_id}")
        if not raw:
            world.violate(f"jobs: {job_id} was accepted and has no record")
            continue
        record = _record({name.decode(): value.decode() for name, value in raw.items()})
        world.statuses[job_id] = f"{record.status} step {record.step} epoch {record.epoch}"
        _check_end(world, record)
        _check_oracle(world, record)
        _check_truth(world, record)
        _check_leftovers(world, job_id)


def _check_end(world: World, record: Any) -> None:
    """With so few faults every job succeeds, unless it was cancelled."""
    allowed = {"succeeded"} | ({"cancelled"} if any(f.action == "cancel" for f in world.faults) else set())
    if record.is_terminal and record.status not in allowed:
        world.violate(f"end: {record.id} is {record.status}: {record.error}")


def _check_oracle(world: World, record: Any) -> None:
    try:
        report = verify_job(world.artifacts.job(record.id), record)
    except StillhouseError as error:
        world.violate(f"oracle: {error.message}")
        return
    for finding in report.violations:
        world.violate(f"oracle: [{finding.rule}] {finding.message}")


def _check_truth(world: World, record: Any) -> None:
    """What the toy learner remembers is what the journals of the lineage say, its samplers had real weights, and
    its teachers said what they say."""
    artifacts = world.artifacts.job(record.id)
    epochs = read_epochs(artifacts)
    lineage = lineage_of(epochs, next(iter(working_epochs(epochs)), 0))
    expected: list[list[Any]] = []
    for step in sorted(lineage.steps):
        with suppress(StillhouseError):
            _, scores = read_journal(artifacts.journal(lineage.steps[step], step))
            scored = [score for score in scores if score.WhichOneof("result") != "failed"]
            stage = JobSpec.model_validate(record.spec).span_at(step).index
            said = [(score.rollout.sample_id, each.rollout.teacher) for score in scored for each in scores_of(score)]
            said = [[step, name, stage, teacher] for name, teacher in said]
            expected += sorted(said, key=in_order)
            for score in scored:
                _check_words(world, score)
                _check_weights(world, record.id, score.rollout)
                _check_tokens(world, score.rollout)
    for checkpoint in lineage.checkpoints[-1:]:
        with suppress(OSError, ValueError):
            state = json.loads((checkpoint.folder / "state.json").read_text())
            behind = [item for item in expected if item[0] < checkpoint.step]
            if state["trained"] != behind:
                world.violate(f"truth: {checkpoint.name} was trained on {state['trained']}, journals say {behind}")


def _check_weights(world: World, job_id: str, rollout: Any) -> None:
    span = rollout.spans[-1] if rollout.spans else None
    if span is None:
        return
    published = world.published.get((job_id, span.epoch, span.policy_version))
    if published != rollout.weights_sha256:
        world.violate(
            f"truth: sample {rollout.sample_id} says weights {span.epoch}/{span.policy_version} are "
            f"{rollout.weights_sha256[:8]}, published were {str(published)[:8]}"
        )


def _check_tokens(world: World, rollout: Any) -> None:
    """Whoever wrote a part of it, a completion of the student is what its seed says, whole and without repeats."""
    if rollout.origin not in (rollout_pb2.ORIGIN_UNSPECIFIED, rollout_pb2.ORIGIN_STUDENT):
        return
    expected, found = toy_completion(rollout.seed, rollout.sampling.max_tokens), ids_list(rollout.completion_ids)
    if found != expected:
        world.violate(f"truth: sample {rollout.sample_id} is {found}, its seed says {expected}")


def _check_words(world: World, score: Any) -> None:
    """Every teacher of the sample said what its model says of these tokens."""
    for each in scores_of(score):
        result = each.WhichOneof("result")
        if result in ("sampled", "hidden"):
            model = world.spec.teachers[each.rollout.teacher].model
            expected = toy_logprobs(model, ids_list(score.rollout.completion_ids)).tolist()
            found = from_tensor(getattr(each, result).teacher_logprobs).tolist()
            if found != expected:
                name = f"{score.rollout.sample_id} by teacher '{each.rollout.teacher}'"
                world.violate(f"truth: the score of sample {name} is {found}, its model says {expected}")


def _check_leftovers(world: World, job_id: str) -> None:
    kept = {f"sh:job:{job_id}:events".encode(), f"sh:job:{job_id}:metrics".encode()}
    left = [key for key in world.server.names() if key.startswith(f"sh:job:{job_id}:".encode()) and key not in kept]
    if left:
        world.violate(f"leftovers: {job_id} has ended, in the queue server are {left}")

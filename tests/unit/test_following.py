"""A teacher that follows a student: when it pulls, what it judges with then, what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
from transformers import AutoModelForCausalLM

from stillhouse.core.errors import StaleWeightsError, UnavailableError, WeightsError
from stillhouse.core.models import inspect_model
from stillhouse.core.pulse import Pulse
from stillhouse.core.queue.streams import Scope
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.engines.base import Scored, ScoreItem
from stillhouse.teacher.engines.transformers import TransformersEngine
from stillhouse.teacher.following import Follower, at_least
from stillhouse.teacher.pool import Resident
from stillhouse.trainer.publish import Shelf
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import trainer_pb2, weights_pb2
from tests.tiny import make_tiny_model

TASK = pb.TeacherTask(job_id="job_a", epoch=2, follows_student=True)
ITEM = ScoreItem("1", [5, 6], [7, 8, 9], pb.SCORE_KIND_SAMPLED)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / str(seed), seed=seed) for seed in (1, 2)]


def arrays_of(folder: Path) -> list[tuple[str, np.ndarray, str]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return [(name, param.detach().numpy(), "float32") for name, param in model.named_parameters()]


def engine_of(folder: Path) -> TransformersEngine:
    return TransformersEngine(inspect_model("student", folder), "float32", threads=1)


def said(engine: Any) -> np.ndarray:
    (scored,) = engine.score([ITEM])
    assert isinstance(scored, Scored)
    return scored.teacher_logprobs


class Trainer:
    """A peer, and all that a follower needs to find it."""

    what = "trainer"

    def __init__(self) -> None:
        self.shelf = Shelf(Scope("job_a", 2), hold=1)
        self.calls = 0
        self.is_gone = False

    async def stream(self, method: str, request: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        self.calls += 1
        if self.is_gone:
            raise UnavailableError("the trainer is gone")
        assert request.average
        held = self.shelf.find(request)
        yield trainer_pb2.FetchWeightsResponse(index=held.index)
        for chunk in held.parts():
            yield trainer_pb2.FetchWeightsResponse(chunk=chunk)

    def follower(self) -> Follower:
        async def anything(*_: Any) -> Any:
            return SimpleNamespace(trainer="trainer-0", address="")

        ctx: Any = SimpleNamespace(
            jobs=SimpleNamespace(get=anything),
            registry=SimpleNamespace(find=anything),
            peers=SimpleNamespace(get=lambda *_: self),
            transfer=Pulse(),
            log=structlog.get_logger(),
        )
        return Follower(ctx, ComputeThread("test"))


@pytest.fixture
def resident(models: list[Path]) -> Resident:
    entry = inspect_model("student", models[0])
    return Resident((entry.sha256, "float32", "job_a"), entry, "float32", engine_of(models[0]), 0)


async def test_it_judges_with_what_was_published_and_pulls_no_more_than_it_must(
    models: list[Path], resident: Resident
) -> None:
    trainer = Trainer()
    follower = trainer.follower()
    registered, other = said(engine_of(models[0])), said(engine_of(models[1]))
    for version, folder, expected in ((4, models[0], registered), (5, models[1], other)):
        ref = await trainer.shelf.hold(version, arrays_of(folder))
        await follower.follow(resident, TASK, version)
        np.testing.assert_array_equal(said(resident.engine), expected)
        assert resident.sha256 == ref.sha256
    head = resident.engine.head().sha256
    assert head == engine_of(models[1]).head().sha256

    await trainer.shelf.hold(6, arrays_of(models[0]))
    for _ in range(3):
        await follower.follow(resident, TASK, 5)
    assert trainer.calls == 2, "what it has is new enough"
    follower.hint("job_b", weights_pb2.WeightsRef(epoch=2, policy_version=9))
    follower.hint("job_a", weights_pb2.WeightsRef(epoch=1, policy_version=9))
    await follower.follow(resident, TASK, 5)
    assert trainer.calls == 2, "hints of another job and of an earlier claim say nothing"
    follower.hint("job_a", weights_pb2.WeightsRef(epoch=2, policy_version=6))
    await follower.follow(resident, TASK, 5)
    assert (trainer.calls, resident.weights and resident.weights.policy_version) == (3, 6)


async def test_it_never_judges_with_older_weights_than_those_that_wrote(models: list[Path], resident: Resident) -> None:
    trainer = Trainer()
    follower = trainer.follower()
    await trainer.shelf.hold(4, arrays_of(models[1]))
    with pytest.raises(StaleWeightsError, match=r"version 5 needs .* the trainer has 4"):
        await follower.follow(resident, TASK, 5)
    trainer.is_gone = True
    follower.hint("job_a", weights_pb2.WeightsRef(epoch=2, policy_version=7))
    await follower.follow(resident, TASK, 4)  # newer ones would be nice to have
    with pytest.raises(UnavailableError):
        await follower.follow(resident, TASK, 5)
    with pytest.raises(UnavailableError):
        await follower.follow(resident, pb.TeacherTask(job_id="job_a", epoch=3, follows_student=True), 0)


async def test_half_loaded_weights_have_no_name(
    models: list[Path], resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer()
    follower = trainer.follower()
    await trainer.shelf.hold(1, arrays_of(models[0]))
    await follower.follow(resident, TASK, 1)
    with monkeypatch.context() as patch:
        patch.setattr(resident.engine, "load_weights", lambda *_: (_ for _ in ()).throw(WeightsError("half")))
        await trainer.shelf.hold(2, arrays_of(models[1]))
        with pytest.raises(WeightsError):
            await follower.follow(resident, TASK, 2)
    assert resident.weights is None
    with pytest.raises(StaleWeightsError):
        await follower.follow(resident, TASK, 3)
    assert resident.weights is not None, "they were pulled again, as a whole"
    np.testing.assert_array_equal(said(resident.engine), said(engine_of(models[1])))


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "nan"])
def test_weights_that_do_not_fit_are_refused(models: list[Path], spoil: str) -> None:
    engine, arrays = engine_of(models[0]), {name: array for name, array, _ in arrays_of(models[1])}
    name = next(iter(arrays))
    if spoil == "missing":
        del arrays[name]
    elif spoil == "unknown":
        arrays["more"] = arrays[name]
    elif spoil == "shape":
        arrays[name] = arrays[name][1:]
    else:
        arrays[name] = np.full_like(arrays[name], np.nan)
    with pytest.raises(WeightsError, match="more" if spoil == "unknown" else name):
        engine.load_weights(arrays, dict.fromkeys(arrays, DTYPE_NAMES["float32"]))


def test_the_newest_policy_that_wrote_counts() -> None:
    spans = [pb.Span(epoch=2, policy_version=3), pb.Span(epoch=2, policy_version=5), pb.Span(epoch=1, policy_version=9)]
    assert at_least([pb.Rollout(spans=spans), pb.Rollout()], 2) == 5
    assert at_least([pb.Rollout()], 2) == 0

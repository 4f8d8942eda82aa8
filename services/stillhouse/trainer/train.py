"""The learner in a thread of its own: scored groups in, one optimizer step out. The event loop stays free.

Also converts wire messages to the learner's samples. No torch at import; `learner.py` is loaded when a job starts.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from stillhouse.core.blobs import staged_dir
from stillhouse.core.errors import WireError
from stillhouse.core.pulse import BULK, Pulse
from stillhouse.core.rollouts import scores_of
from stillhouse.core.spec import JobSpec, StageSpan, StageSpec
from stillhouse.core.tensors import from_tensor
from stillhouse.trainer.batch import STUDENT_ORIGINS, TeacherHead, TrainSample
from stillhouse.trainer.probes import ask_student
from stillhouse.trainer.scored import ScoredSample
from stillhouse.trainer.spans import span_arrays
from stillhouse.v1 import journal_pb2, rollout_pb2

if TYPE_CHECKING:
    from stillhouse.trainer.ranks import Ranks

T = TypeVar("T")
LISTS: Final = ("topk_ids", "topk_logprobs", "target_ids", "target_logprobs")
"""Fields of a sample that hold several tokens per position."""


def to_sample(
    sample: ScoredSample, weight: float, temperature: float | None = None, outcome: float = 0.0
) -> TrainSample:
    """A sample as one teacher scored it, as the learner takes it; checks that all lengths agree, and the temperature if
    one is given. `outcome` as in `TrainSample`.

    Raises:
        WireError: names the sample and both lengths or temperatures.
    """
    rollout = sample.score.rollout
    if temperature is not None:
        _check_temperature(rollout, temperature)
    completion = from_tensor(rollout.completion_ids)
    num_tokens = len(completion)
    is_students = rollout.origin in STUDENT_ORIGINS
    unknown = np.full(num_tokens, np.nan, dtype=np.float32)
    teacher_logprobs = _teacher_logprobs(sample.score, unknown)
    rollout_logprobs = from_tensor(rollout.rollout_logprobs) if is_students else unknown
    mask = from_tensor(rollout.loss_mask) if rollout.HasField("loss_mask") else np.ones(num_tokens, dtype=np.uint8)
    arrays: dict[str, Any] = {
        "teacher_logprobs": teacher_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "loss_mask": mask,
    }
    hidden = sample.hidden.get(sample.teacher)
    if hidden is not None:
        arrays["hidden"] = hidden
    if rollout.HasField("entropies"):
        arrays["entropies"] = from_tensor(rollout.entropies)
    arrays |= _lists(sample.score)
    if sample.score.WhichOneof("result") == "spans":
        arrays |= span_arrays(sample.score, num_tokens)
        teacher_logprobs, mask = arrays["teacher_logprobs"], mask * (arrays["spans"] >= 0)
    for name, array in arrays.items():
        if len(array) != num_tokens:
            raise WireError(f"sample {rollout.sample_id}: got {len(array)} {name} for {num_tokens} tokens")
    if is_students and not rollout.spans:
        raise WireError(f"sample {rollout.sample_id}: no span says which policy version sampled it")
    return TrainSample(
        sample_id=rollout.sample_id,
        teacher=rollout.teacher,
        prompt_ids=from_tensor(rollout.prompt_ids),
        completion_ids=completion,
        loss_mask=mask,
        rollout_logprobs=rollout_logprobs,
        teacher_logprobs=teacher_logprobs,
        hidden=hidden,
        weight=weight,
        oldest_policy_version=min((span.policy_version for span in rollout.spans), default=0),
        finish_reason=int(rollout.finish_reason),
        **{name: arrays[name] for name in (*LISTS, "entropies", "spans") if name in arrays},
        is_filtered=is_students and _is_filtered(rollout.sampling),
        outcome=outcome,
        origin=rollout.origin,
    )


def _check_temperature(rollout: rollout_pb2.Rollout, temperature: float) -> None:
    """p, mu and q are of one distribution only at one temperature."""
    expected = float(np.float32(temperature))  # as it travels
    found = {"scored": rollout.score.temperature or 1.0}
    if rollout.origin in STUDENT_ORIGINS:
        found["sampled"] = rollout.sampling.temperature
    for what, value in found.items():
        if value != expected:
            raise WireError(
                f"sample {rollout.sample_id} was {what} at temperature {value:g}, its stage trains at {temperature:g}; "
                "log-probabilities of different temperatures cannot be compared"
            )


def _is_filtered(sampling: rollout_pb2.SamplingParams) -> bool:
    return 0 < sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _lists(score: rollout_pb2.Score) -> dict[str, np.ndarray]:
    """The tokens that a score names at each position, by name of the sample's field.

    Raises:
        WireError: ids and log-probabilities are not of one shape.
    """
    kind, rollout = score.WhichOneof("result"), score.rollout
    tensors: dict[str, Any] = {}
    if kind == "topk":
        tensors |= {"topk_ids": score.topk.teacher_topk_ids, "topk_logprobs": score.topk.teacher_topk_logprobs}
    if kind in ("topk", "targets") and rollout.HasField("target_ids"):
        tensors |= {"target_ids": rollout.target_ids, "target_logprobs": getattr(score, kind).target_logprobs}
    arrays = {name: from_tensor(tensor) for name, tensor in tensors.items()}
    for ids, logprobs in zip(LISTS[::2], LISTS[1::2], strict=True):
        if ids in arrays and arrays[ids].shape != arrays[logprobs].shape:
            raise WireError(
                f"sample {rollout.sample_id}: {list(arrays[logprobs].shape)} {logprobs} for {list(arrays[ids].shape)} "
                f"{ids}"
            )
    return arrays


def _teacher_logprobs(score: rollout_pb2.Score, unknown: np.ndarray) -> np.ndarray:
    """[T]; `unknown` where no teacher was asked, or not about tokens."""
    kind = score.WhichOneof("result")
    if kind in ("none", "spans"):
        return unknown
    if kind not in ("sampled", "topk", "targets", "hidden"):
        raise WireError(f"sample {score.rollout.sample_id}: no score, got '{kind}'")
    return from_tensor(getattr(score, kind).teacher_logprobs)


class LearnerThread:
    """Runs the learner's methods one after the other in one thread."""

    def __init__(self, pulse: Pulse | None = None, hang_s: float = math.inf, ranks: Ranks | None = None) -> None:
        self.pulse = pulse or Pulse()
        self.num_ranks = 1 if ranks is None else ranks.size
        """Processes that train together."""
        self._hang_s = hang_s
        self._ranks = ranks
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._learner: Any = None

    async def call(self, function: Callable[..., T], *args: Any, patience: int = 1) -> T:
        """`function(*args)` in the learner's thread. It beats `pulse`, or ends, within `patience` times hang_s."""

        def measured() -> T:
            with self.pulse.work(patience):
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(self._executor, measured)

    async def load(self, model_dir: Path, spec: JobSpec, threads: int, span: StageSpan) -> dict[str, Any]:
        """Load the student for a stage; gives facts about it for people."""

        def build() -> Any:
            from stillhouse.trainer.learner import Learner

            engine = self._make_engine(model_dir, spec, threads, span.stage)
            learner = Learner(engine, span=span, teachers=spec.teachers, total_steps=spec.stop_step())
            learner.on_progress = self.pulse.beat
            return learner

        self._learner = await self.call(build, patience=BULK)
        return self._learner.engine.facts()

    def _make_engine(self, model_dir: Path, spec: JobSpec, threads: int, stage: StageSpec) -> Any:
        options: Any = {
            "student": spec.student,
            "stage": stage,
            "packings": [stage.schedule.packing for stage in spec.stages],
            "seed": spec.seed,
            "threads": threads,
            "ema": spec.ema_of_student(),
        }
        if self._ranks is None:
            from stillhouse.trainer.engine import Engine

            return Engine(model_dir, **options, deterministic=spec.deterministic)
        from stillhouse.trainer.ranks import RankedEngine

        return RankedEngine(self._ranks, model_dir, **options)

    @property
    def stage_index(self) -> int:
        """Of the stage that the learner is in."""
        return self._learner.span.index

    async def begin_stage(self, span: StageSpan) -> None:
        """Go on from the weights as they are under another stage."""
        await self.call(lambda: self._learner.begin_stage(span))

    async def plan(self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> list[list[int]]:
        """Micro-batches as indices into `samples`."""
        return await self.call(lambda: self._learner.plan(samples, heads))

    async def step(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], plan: list[list[int]]
    ) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        return await self.call(lambda: self._learner.step(samples, heads, plan))

    async def skip(self) -> dict[str, float]:
        """Count a step without an update; returns its metrics."""
        return await self.call(lambda: self._learner.skip())

    async def evaluate(self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> list[dict[str, Any]]:
        """Exact reverse KL per sample at temperature 1, in float32."""
        return await self.call(lambda: self._learner.evaluate(samples, heads, temperature=1.0))

    async def hold(self, on: bool) -> None:
        """Keep a copy of the weights as they are now, which `evaluate` then measures; or drop it."""
        await self.call(lambda: self._learner.hold(on))

    async def end_at(self, step: int) -> None:
        """The job ends after so many steps, fewer than planned."""
        await self.call(lambda: self._learner.end_at(step))

    async def probe(
        self, samples: Sequence[TrainSample], temperatures: Sequence[float], top_k: int
    ) -> list[dict[str, np.ndarray]]:
        """What the student says of the samples; see `ask_student`."""
        return await self.call(lambda: ask_student(self._learner.engine, samples, temperatures, top_k))

    async def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """A copy of the weights: (name, array, element type)."""
        return await self.call(lambda: self._learner.state_arrays())

    async def followed_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """A copy of the average that teachers follow."""
        return await self.call(lambda: self._learner.followed_arrays())

    async def save(self, write: Callable[[Callable[[Path], None]], T]) -> T:
        """Run `write(save_into)` in the thread, where `save_into(folder)` stores the learner's whole state."""
        return await self.call(lambda: write(self._learner.save), patience=BULK)

    async def restore(self, folder: Path) -> None:
        """Continue from a saved state, bit for bit."""
        await self.call(lambda: self._learner.load(folder), patience=BULK)

    async def export(self, source_dir: Path, folder: Path, card: dict[str, Any]) -> None:
        """Write the student as a folder that transformers loads, in place of an older one; complete or not at all."""

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            with staged_dir(folder) as staged:
                self._learner.export(source_dir, staged.path, card)

        await self.call(write, patience=BULK)

    def close(self) -> None:
        """Drop the learner and end the thread; a hung one ends with its process."""
        is_hung = self.pulse.is_hung(self._hang_s)
        self._executor.shutdown(wait=not is_hung, cancel_futures=True)
        if self._ranks is not None and self._learner is not None and not is_hung:
            self._learner.engine.close()
        self._learner = None


def micro_batch_plans(samples: Sequence[TrainSample], plan: list[list[int]]) -> list[journal_pb2.MicroBatchPlan]:
    """A plan as the journal stores it: by sample id."""
    return [
        journal_pb2.MicroBatchPlan(
            teacher=samples[indices[0]].teacher, sample_ids=[samples[index].sample_id for index in indices]
        )
        for indices in plan
    ]


def plan_from_journal(
    samples: Sequence[TrainSample], micro_batches: Sequence[journal_pb2.MicroBatchPlan]
) -> list[list[int]]:
    """The journalled plan as indices into `samples`; samples that no longer have a score are left out."""
    index = {(sample.teacher, sample.sample_id): position for position, sample in enumerate(samples)}
    planned = [[(batch.teacher, sample_id) for sample_id in batch.sample_ids] for batch in micro_batches]
    plan = [[index[each] for each in batch if each in index] for batch in planned]
    return [batch for batch in plan if batch]


def keep_journalled(old: rollout_pb2.Score, new: rollout_pb2.Score) -> None:
    """What goes by the journal when a sample is scored again.

    Which tokens train (the last bits of a new score may differ), and the verdict: completions are judged once.
    """
    for mine, journalled in zip(scores_of(new), scores_of(old), strict=True):
        mine.hidden.teacher_logprobs.CopyFrom(journalled.hidden.teacher_logprobs)
    if old.HasField("reward"):
        new.reward, new.reward_note = old.reward, old.reward_note

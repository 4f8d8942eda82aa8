"""Samples on their way back from their teachers: what one of them said, a sample at its end, a group in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stillhouse.core.queue.streams import Entry
from stillhouse.core.rollouts import add_further, scores_apart, scores_of
from stillhouse.v1 import rollout_pb2


@dataclass(slots=True)
class ScoredSample:
    """A sample at its end: a score, or a failure. On the way there: what one of its teachers said."""

    score: rollout_pb2.Score
    """With those of the other teachers in `further`."""
    entries: list[Entry] = field(default_factory=list)
    """Its queue entries, until the journal holds it."""
    hidden: dict[str, np.ndarray] = field(default_factory=dict)
    """Teacher -> float16 or float32 [T, D], for scores of kind hidden."""

    @property
    def sample_id(self) -> str:
        return self.score.rollout.sample_id

    @property
    def teacher(self) -> str:
        """Its first."""
        return self.score.rollout.teacher

    @property
    def is_failed(self) -> bool:
        return self.score.WhichOneof("result") == "failed"

    def score_bytes(self) -> int:
        """Size of what the teacher said about the sample, payload included."""
        hidden = sum(states.nbytes for states in self.hidden.values())
        return self.score.ByteSize() - self.score.rollout.ByteSize() + hidden

    def by_teacher(self) -> list[ScoredSample]:
        """The sample as each of its teachers sees it."""
        return [ScoredSample(score, hidden=self.hidden) for score in scores_apart(self.score)]


@dataclass(slots=True)
class ScoredGroup:
    """All samples of a planned group, in order of their index."""

    group: int
    samples: list[ScoredSample]

    @property
    def scored(self) -> list[ScoredSample]:
        return [sample for sample in self.samples if not sample.is_failed]


@dataclass(slots=True)
class PendingGroup:
    """A group in flight. Complete when each of its samples has ended; one that failed may be tried again."""

    name: str
    group: int
    wanted: Mapping[str, Sequence[str]]
    """Sample -> the teachers that judge it, in order."""
    further: Sequence[rollout_pb2.FurtherTeacher]
    """Those that are asked once the first has answered."""
    future: asyncio.Future[ScoredGroup] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when it is complete for the first time; what is tried again after that is put into its result."""
    message: rollout_pb2.PromptGroup | None = None
    """As a sampler gets it; None = the completions come from elsewhere."""
    is_journalled: bool = False
    """Its samples are scored again for a replay."""
    is_measured: bool = False
    """It is of an evaluation, which reads it as soon as it is complete."""
    answers: dict[str, dict[str, ScoredSample]] = field(default_factory=dict)
    """Sample -> teacher -> what it said."""
    arrived: dict[str, ScoredSample] = field(default_factory=dict)
    """Samples that have ended."""
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def waits_for(self, answer: ScoredSample) -> bool:
        """False for what comes late or twice."""
        if self.future.cancelled() or answer.sample_id in self.arrived:
            return False
        return answer.teacher not in self.answers.get(answer.sample_id, {})

    def take(self, answer: ScoredSample) -> ScoredSample | None:
        """Note what a teacher said; gives the sample if it ended: with the last word, or with the first failure."""
        answers = self.answers.setdefault(answer.sample_id, {})
        answers[answer.teacher] = answer
        teachers = self.wanted[answer.sample_id]
        if answer.is_failed:
            answer.entries = [entry for each in answers.values() for entry in each.entries]
            sample = answer
        elif len(answers) == len(teachers):
            sample = _joined([answers[name] for name in teachers])
        else:
            return None
        self.arrived[sample.sample_id] = sample
        if len(self.arrived) == len(self.wanted):
            self._complete()
        return sample

    def _complete(self) -> None:
        samples = sorted(self.arrived.values(), key=lambda sample: sample.score.rollout.index)
        if self.future.done():
            self.future.result().samples[:] = samples
        else:
            self.future.set_result(ScoredGroup(self.group, samples))
        self.complete.set()

    def reopen(self, failed: ScoredSample) -> None:
        """Wait for a sample that failed again; what its other teachers said stays. `failed` keeps its own entries."""
        del self.arrived[failed.sample_id]
        others = self.answers[failed.sample_id]
        del others[failed.teacher]
        kept = {entry.id for each in others.values() for entry in each.entries}
        failed.entries = [entry for entry in failed.entries if entry.id not in kept]
        self.complete.clear()


def _joined(answers: Sequence[ScoredSample]) -> ScoredSample:
    """One sample of what each of its teachers said."""
    sample = answers[0]
    for answer in answers[1:]:
        add_further(sample.score, answer.score)
        sample.entries += answer.entries
        sample.hidden |= answer.hidden
    return sample


def busy_seconds(scored: Sequence[ScoredSample]) -> dict[str, float]:
    """Tokens, seconds and processes of samplers and teachers; texts of the data and missing scores cost none."""
    sampled = [sample.score.rollout for sample in scored if sample.score.rollout.origin != rollout_pb2.ORIGIN_DATA]
    judged = [
        (sample.score.rollout.completion_ids.shape[0], score)
        for sample in scored
        for score in scores_of(sample.score)
        if score.WhichOneof("result") != "none"
    ]
    return {
        "sampled_tokens": float(sum(rollout.completion_ids.shape[0] for rollout in sampled)),
        "scored_tokens": float(sum(num_tokens for num_tokens, _ in judged)),
        "sample_s": sum(rollout.sample_s for rollout in sampled),
        "score_s": sum(score.score_s for _, score in judged),
        "samplers": float(len({rollout.sampler for rollout in sampled})),
        "teachers": float(len({score.teacher_instance for _, score in judged})),
        "cached_tokens": float(sum(num_tokens for num_tokens, score in judged if score.is_cached)),
        "model_loads": float(sum(score.model_loads for _, score in judged)),
        "score_bytes": float(sum(sample.score_bytes() for sample in scored)),
    }

"""Held-out measurements of one policy version: exact reverse KL on its own completions, greedy texts, accuracy, pass@k.

The student writes completions of every held-out prompt: `samples_per_prompt` sampled at temperature 1 with fixed seeds,
scored with float32 hidden states for the exact KL(student || teacher); one greedy, whose teacher log-likelihood and
repetition say whether the text got better. Where the row has a verifier the greedy one is judged for the accuracy, the
sampled ones for pass@k. All are written by exactly the version that is measured, also while newer ones train.

Teachers with other tokenizers judge spans of text: then the KL is the one-sample estimate log p(text) - log q(text),
per token of the student. All of it goes over the same queue as training, so a dying sampler only delays it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final

from stillhouse.core.blobs import JobArtifacts, read_json, write_json
from stillhouse.core.errors import JobFailedError, StillhouseError, WireError
from stillhouse.core.rollouts import scores_of
from stillhouse.core.spec import EvaluationSpec, TeacherSpec
from stillhouse.core.spec_base import NO_TEACHER
from stillhouse.core.tensors import DTYPE_NAMES, ids_list, ids_tensor
from stillhouse.trainer.asks import held_out_kinds, held_out_score
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.measures import Kl, Text, Tries, measures
from stillhouse.trainer.preflight import Readers
from stillhouse.trainer.prompts import Prompt
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.trainer.scored import ScoredGroup, ScoredSample
from stillhouse.trainer.space import Space
from stillhouse.trainer.spans import sums
from stillhouse.trainer.train import LearnerThread, to_sample
from stillhouse.trainer.verify.judges import Verdict
from stillhouse.v1 import rollout_pb2, sampler_pb2

NGRAM: Final = 4
"""Length of the repeated pieces that are counted."""
KL_SAMPLES: Final = 32
"""Completions whose KL the learner computes at once: a forward pass of as many, a small part of a step."""


def repeated_ngrams(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of n-grams of `ids` that occurred before in it; 0 for texts shorter than n."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def first_in_turn(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """The first `number` prompts, of each teacher in turn: data that is sorted by teacher leaves none out."""
    seen: Counter[str] = Counter()
    places: list[tuple[int, int]] = []
    for index, prompt in enumerate(prompts):
        places.append((seen[prompt.teacher], index))
        seen[prompt.teacher] += 1
    return [prompts[index] for index in sorted(index for _, index in sorted(places)[:number])]


class HeldOut:
    """Evaluates one job."""

    def __init__(
        self,
        spec: EvaluationSpec,
        prompts: Sequence[Prompt],
        *,
        plan: Callable[..., Awaitable[asyncio.Future[ScoredGroup]]],
        done: Callable[[Sequence[ScoredSample]], Awaitable[None]],
        race: Callable[[Awaitable[Any]], Awaitable[Any]],
        fence: Callable[[], Awaitable[None]],
        space: Space,
        learner: LearnerThread,
        heads: Mapping[str, TeacherHead],
        teachers: Mapping[str, TeacherSpec],
        samplers: SamplerPool,
        readers: Readers,
        judge: Callable[[Sequence[ScoredSample]], Awaitable[dict[str, Verdict]]],
        ends: Collection[int],
        by_spans: bool,
        stop: Sequence[str],
        stop_ids: Sequence[int],
        artifacts: JobArtifacts,
    ) -> None:
        self._spec = spec
        self._prompts = first_in_turn(prompts, spec.num_prompts)
        self._is_scored = prompts[0].teacher != NO_TEACHER
        """False: the job has no teachers, and greedy completions are all there is."""
        self._plan = plan
        self._done = done
        self._race = race
        self._fence = fence
        """Raises LeaseLostError when another claim leads the job."""
        self._space = space
        self._learner = learner
        self._heads = heads
        self._teachers = teachers
        self._samplers = samplers
        self._readers = readers
        self._judge = judge
        """Verdicts on greedy completions, by sample id; only of rows that have a verifier."""
        self._ends = ends
        """Steps before the first and after each stage's last."""
        self._by_spans = by_spans
        """Teachers may have other tokenizers than the student."""
        self._stop = stop
        """Where the completions of the last stage end, these do, as with `stop_ids`: one curve has one measure."""
        self._stop_ids = stop_ids
        self._artifacts = artifacts

    def is_due(self, step: int, stop_step: int) -> bool:
        """Before the first step, after the last of each stage, and every so many between; once per step."""
        if not self._prompts or (self._artifacts.evaluations / f"{step:08d}.json").is_file():
            return False
        every = self._spec.every_steps
        return step == stop_step or step in self._ends or bool(every and step % every == 0)

    async def evaluate(
        self, step: int, *, is_averaged: bool, facts: Callable[[], dict[str, Any]] = dict
    ) -> dict[str, Any]:
        """Measure the weights of `step` steps, or their moving average; the result is also written to the artifacts,
        with `facts` at its end."""
        start = time.monotonic()
        sampled, greedy = await self._write(step)
        kls = await self._reverse_kls(sampled)
        verdicts = await self._judge([*greedy, *(sampled if self._spec.ks() else ())])
        rewards = [
            (_teachers(sample), verdicts[sample.sample_id].reward) for sample in greedy if sample.sample_id in verdicts
        ]
        greedy_ids = {sample.sample_id: ids_list(sample.score.rollout.completion_ids) for sample in greedy}
        result: dict[str, Any] = {
            "step": step,
            "averaged": is_averaged,
            **measures(kls, rewards, self._lengths(sampled or greedy), _tries(sampled, verdicts), self._spec.ks()),
            "samples_per_prompt": self._spec.samples_per_prompt,
            **({"teacher_nll_greedy": _mean_nll(self._by_teacher(greedy))} if self._is_scored else {}),
            "repeated_4grams": _mean([repeated_ngrams(self._text_ids(ids)) for ids in greedy_ids.values()]),
            "completion_length_mean": _mean([float(len(ids)) for ids in greedy_ids.values()]),
            "samples": await self._texts(greedy, verdicts),
            "seconds": round(time.monotonic() - start, 2),
            "created_at": time.time(),
            **facts(),
        }
        await self._fence()  # what a zombie measured is of weights that nobody will have
        path = self._artifacts.evaluations / f"{step:08d}.json"
        await self._space.insist("an evaluation", lambda: asyncio.to_thread(write_json, path, result))
        return result

    async def _write(self, step: int) -> tuple[list[ScoredSample], list[ScoredSample]]:
        """Sampled completions and a greedy one of every prompt; where nothing is measured of sampled ones, no such."""
        none = rollout_pb2.SCORE_KIND_NONE
        if not self._is_scored and not self._spec.ks():
            return [], await self._collect(step, await self._start(step, "greedy", 0.0, none))
        # both are planned before either is awaited: the teacher scores the first while the sampler writes the second
        kinds = held_out_kinds(by_spans=self._by_spans)
        for_sampled, for_greedy = kinds if self._is_scored else (none, none)
        sampled = await self._start(step, "sampled", 1.0, for_sampled, self._spec.samples_per_prompt)
        greedy = await self._start(step, "greedy", 0.0, for_greedy)
        return await self._collect(step, sampled), await self._collect(step, greedy)

    async def _reverse_kls(self, samples: Sequence[ScoredSample]) -> list[Kl]:
        """Of each sample, to each of its teachers. The learner measures a few at a time: a step waits little."""
        if not self._is_scored:
            return []
        judged, found = self._by_teacher(samples), []
        if self._by_spans:
            found = [(log_p - log_q, number) for log_p, log_q, number in map(sums, judged)]
        else:
            for first in range(0, len(judged), KL_SAMPLES):
                rows = await self._learner.evaluate(judged[first : first + KL_SAMPLES], self._heads)
                found += [(row["reverse_kl_sum"], row["num_tokens"]) for row in rows]
        groups = [sample.score.rollout.group for sample in samples for _ in scores_of(sample.score)]
        return [
            Kl(sample.teacher, *kl, share=sample.weight, row=row)
            for sample, kl, row in zip(judged, found, groups, strict=True)
        ]

    def _by_teacher(self, samples: Sequence[ScoredSample]) -> list[TrainSample]:
        """What each teacher said, with the weight that it has in means over samples."""
        return [
            to_sample(each, self._prompts[sample.score.rollout.group].share_of(each.teacher))
            for sample in samples
            for each in sample.by_teacher()
        ]

    def read(self, step: int) -> dict[str, Any]:
        """An earlier result."""
        return read_json(self._artifacts.evaluations / f"{step:08d}.json")

    async def _start(
        self, step: int, kind: str, temperature: float, score_kind: rollout_pb2.ScoreKind, number: int = 1
    ) -> list[asyncio.Future[ScoredGroup]]:
        """Plan `number` completions of every prompt, by the weights of `step` and no others."""
        sampling = self._sampling(temperature, self._stop_ids)
        score = held_out_score(score_kind)
        return [
            await self._plan(
                prompt,
                purpose=rollout_pb2.PURPOSE_EVALUATE,
                group=index,
                group_id=f"eval-{step}-{kind}/{index}",
                # the same seeds at every step: before and after differ by the weights alone
                seed_id=f"eval-{kind}/{index}",
                size=number,
                sampling=sampling,
                score=score,
                min_policy_version=step,
                pinned=True,
            )
            for index, prompt in enumerate(self._prompts)
        ]

    def _sampling(self, temperature: float, stop_ids: Sequence[int]) -> rollout_pb2.SamplingParams:
        return rollout_pb2.SamplingParams(
            temperature=temperature,
            top_p=1.0,
            max_tokens=self._spec.max_tokens,
            stop=self._stop,
            stop_token_ids=stop_ids,
        )

    async def _collect(self, step: int, futures: Sequence[asyncio.Future[ScoredGroup]]) -> list[ScoredSample]:
        """The scored samples of the groups."""
        groups = [await self._race(future) for future in futures]
        samples = [sample for group in groups for sample in group.samples]
        await self._done(samples)
        ended_well = [sample for sample in samples if not sample.is_failed]
        for sample in ended_well:
            if versions := {span.policy_version for span in sample.score.rollout.spans} - {step}:
                raise WireError(f"sample {sample.sample_id} of step {step} was written by version {min(versions)}, too")
        if not ended_well:
            failed = samples[0].score.failed
            raise JobFailedError(
                f"evaluation at step {step}: every sample failed, first: {failed.reason}: {failed.message}"
            )
        return ended_well

    def _lengths(self, samples: Sequence[ScoredSample]) -> list[Text]:
        """How long completions are, and how they end."""
        found = []
        for sample in samples:
            rollout = sample.score.rollout
            ids = ids_list(rollout.completion_ids)
            is_truncated = rollout.finish_reason == rollout_pb2.FINISH_REASON_LENGTH
            found.append(Text(_teachers(sample), len(ids), is_truncated, bool(ids) and ids[-1] in self._stop_ids))
        return found

    def _text_ids(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self._stop_ids]

    async def _texts(
        self, greedy: Sequence[ScoredSample], verdicts: Mapping[str, Verdict]
    ) -> list[dict[str, str | float]]:
        by_row = {sample.score.rollout.row: sample for sample in greedy}
        shown = []
        for index, prompt in enumerate(self._prompts[: self._spec.show]):
            sample = by_row.get(prompt.row)
            ids = [] if sample is None else ids_list(sample.score.rollout.completion_ids)
            verdict = None if sample is None else verdicts.get(sample.sample_id)
            shown.append(
                {
                    "prompt": prompt.text,
                    "student": self._readers.renderer.text(ids),
                    "teacher": await self._teacher_text(index),
                    **({} if verdict is None else {"reward": verdict.reward, "note": verdict.note}),
                }
            )
        return shown

    async def _teacher_text(self, index: int) -> str:
        """The teacher's own greedy completion of a prompt; it is frozen, so the one of step 0 is kept."""
        if not self._is_scored:
            return ""
        first = self._artifacts.evaluations / f"{0:08d}.json"
        if first.is_file():
            return read_json(first)["samples"][index]["teacher"]
        prompt = self._prompts[index]
        teacher = self._teachers[prompt.teacher]
        request = sampler_pb2.GenerateRequest(
            model=teacher.model,
            dtype=DTYPE_NAMES[teacher.dtype],
            prompt_ids=ids_tensor(prompt.teacher_prompt_ids or prompt.prompt_ids),
            sampling=self._sampling(0.0, self._readers.crossing.get(prompt.teacher, self._stop_ids)),
            seeds=[0],
        )
        try:
            written = await self._race(self._samplers.generate(request))
        except StillhouseError:
            return ""  # only people read this text; a job never fails for it
        return self._readers.for_teachers[prompt.teacher].text(ids_list(written.answers[0].completion_ids))


def _teachers(sample: ScoredSample) -> list[str]:
    """Those that judged it."""
    return [each.rollout.teacher for each in scores_of(sample.score)]


def _tries(samples: Sequence[ScoredSample], verdicts: Mapping[str, Verdict]) -> list[Tries]:
    """The judged completions of each prompt."""
    of_prompt: dict[int, list[ScoredSample]] = {}
    for sample in samples:
        if sample.sample_id in verdicts:
            of_prompt.setdefault(sample.score.rollout.group, []).append(sample)
    return [
        Tries(_teachers(tried[0]), len(tried), sum(verdicts[sample.sample_id].reward >= 1 for sample in tried))
        for tried in of_prompt.values()
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_nll(samples: Sequence[TrainSample]) -> float:
    """Mean over all tokens of -log q, nats; of spans over those of the student."""
    found = [
        (float(s.teacher_logprobs.sum()), len(s.teacher_logprobs)) if s.spans is None else sums(s)[1:] for s in samples
    ]
    weights = [sample.weight for sample in samples]
    num_tokens = sum(weight * number for weight, (_, number) in zip(weights, found, strict=True))
    return -sum(weight * log_q for weight, (log_q, _) in zip(weights, found, strict=True)) / max(num_tokens, 1)

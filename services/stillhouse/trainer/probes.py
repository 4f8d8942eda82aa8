"""Probes of a live pre-flight: short answers of the student, and what sampler, trainer and teachers say about them.

All of it goes past the queue, by the services' direct calls, and has deadlines. Leaves out what the measurements mean:
see findings.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from stillhouse.core.errors import (
    ConflictError,
    DeadlineError,
    StaleWeightsError,
    StillhouseError,
    UnavailableError,
)
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.rpc import Peer
from stillhouse.core.tensors import DTYPE_NAMES, floats_tensor, from_tensor, ids_tensor, to_tensor
from stillhouse.trainer.batch import MIN_LOG_Q, TrainSample
from stillhouse.trainer.packing import collate, plan_micro_batches
from stillhouse.trainer.prompts import Prompt, sample_seed
from stillhouse.trainer.samplers import SamplerPool
from stillhouse.v1 import rollout_pb2, sampler_pb2, teacher_pb2

T = TypeVar("T")
TOPK: Final = rollout_pb2.SCORE_KIND_TOPK
RETRY_S: Final = 0.3
"""Pause before a sampler is asked again that has no student yet."""
TOP_K: Final = 64
"""Likeliest tokens of the student over which the KL is taken at each position; the rest is one bucket."""
OVERLAP_K: Final = 16
"""Likeliest tokens that are compared."""
MAX_ALONE: Final = 4
"""Rollouts that are also scored alone."""
PROBE_TOKENS: Final = 2048
"""Tokens of a forward pass of the student."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A completion that a sampler wrote for a probe, or the text that stands for one where nobody writes."""

    prompt: Prompt
    completion_ids: np.ndarray
    """[T] int32."""
    rollout_logprobs: np.ndarray
    """[T] float32, nats; NaN of a given text."""
    finish_reason: int
    seconds: float


async def write(
    pool: SamplerPool,
    info: ServiceInfo,
    prompts: Sequence[Prompt],
    sampling: rollout_pb2.SamplingParams,
    *,
    seed: int,
    wait_s: float,
) -> list[Answer]:
    """The student's answers by one sampler, all at once.

    Raises:
        StillhouseError: it did not have the student, or did not answer, in time.
    """

    async def one(index: int, prompt: Prompt) -> Answer:
        request = sampler_pb2.GenerateRequest(
            prompt_ids=ids_tensor(prompt.prompt_ids), sampling=sampling, seeds=[sample_seed(seed, "probe", index)]
        )
        started = time.monotonic()
        (answer,) = await pool.write(info, request)
        return Answer(
            prompt,
            from_tensor(answer.completion_ids),
            from_tensor(answer.rollout_logprobs),
            int(answer.finish_reason),
            time.monotonic() - started,
        )

    first = await _patiently(lambda: one(0, prompts[0]), wait_s)  # once it has the student, the others come at once
    async with asyncio.timeout(wait_s):
        others = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts[1:], start=1)))
    return [first, *others]


async def _patiently(call: Callable[[], Awaitable[T]], wait_s: float) -> T:
    """Ask until the sampler has loaded the student: it refuses until then."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await call()
        except (ConflictError, StaleWeightsError, UnavailableError):
            if time.monotonic() + RETRY_S > deadline:
                raise
            await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise DeadlineError(f"no answer within preflight_wait_s {wait_s:g} s") from None


def teachers(prompt: Prompt) -> list[str]:
    """Names of the teachers that judge its answers."""
    return [prompt.teacher, *(each.teacher for each in prompt.further)]


def own_prompt(prompt: Prompt, teacher: str) -> tuple[int, ...] | None:
    """[Q] the prompt as a teacher of it reads it; None = as the student does."""
    readings = {each.teacher: each.prompt_ids for each in prompt.further}
    return {prompt.teacher: prompt.teacher_prompt_ids, **readings}[teacher]


def make_rollout(
    answer: Answer, index: int, teacher: str, score: rollout_pb2.ScoreSpec, top_ids: np.ndarray | None = None
) -> rollout_pb2.Rollout:
    """An answer as a teacher gets it, which is asked about the student's likeliest tokens, too: `top_ids` [T, K]."""
    prompt = answer.prompt
    rollout = rollout_pb2.Rollout(
        schema_version=1,
        sample_id=f"probe/{index}",
        teacher=teacher,
        prompt_ids=ids_tensor(prompt.prompt_ids),
        completion_ids=ids_tensor(answer.completion_ids),
        rollout_logprobs=floats_tensor(answer.rollout_logprobs),
        score=score,
    )
    if top_ids is not None:
        rollout.target_ids.CopyFrom(to_tensor(top_ids.astype(np.int32)))
    if (own := own_prompt(prompt, teacher)) is not None:
        rollout.teacher_prompt_ids.CopyFrom(ids_tensor(own))
    return rollout


@dataclass(frozen=True, eq=False)
class Said:
    """What one teacher process said about the probes, three times."""

    instance: str
    first: list[rollout_pb2.Score]
    again: list[rollout_pb2.Score]
    alone: list[rollout_pb2.Score]
    """Of the first `MAX_ALONE`."""
    seconds: float
    """Of the first time, without loading the model."""

    def logprobs(self) -> np.ndarray:
        """[N] of all tokens."""
        return _logprobs(self.first)

    def differences(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] between the two batches, and between a batch and each rollout alone."""
        first = self.logprobs()
        alone = _logprobs(self.alone)
        return _logprobs(self.again) - first, alone - first[: len(alone)]


async def interrogate(
    peer: Peer,
    instance: str,
    task: rollout_pb2.TeacherTask,
    answers: Sequence[Answer],
    tops: Sequence[np.ndarray | None],
    temperature: float,
    wait_s: float,
) -> Said:
    """Have a teacher process score the answers: together, together again, and some of them alone. `tops`: of each
    answer the student's likeliest tokens; none where they are not known.

    Raises:
        StillhouseError: it cannot, or not in time; the message says why.
    """
    info = await peer.unary("GetInfo", teacher_pb2.TeacherServiceGetInfoRequest(), timeout_s=wait_s)
    kind = TOPK if TOPK in info.kinds else rollout_pb2.SCORE_KIND_SAMPLED
    is_asked = kind == TOPK and rollout_pb2.SCORE_KIND_TARGETS in info.kinds
    spec = rollout_pb2.ScoreSpec(kind=kind, top_k=OVERLAP_K, temperature=temperature, dtype=DTYPE_NAMES["float32"])
    rollouts = [
        make_rollout(answer, index, task.teacher, spec, top if is_asked else None)
        for index, (answer, top) in enumerate(zip(answers, tops, strict=True))
    ]
    started = time.monotonic()
    first = await _score(peer, task, rollouts, wait_s)
    seconds = time.monotonic() - started
    again = await _score(peer, task, rollouts, wait_s)
    alone = []
    for rollout in rollouts[:MAX_ALONE]:
        alone += await _score(peer, task, [rollout], wait_s)
    return Said(instance, first, again, alone, seconds)


async def _score(
    peer: Peer, task: rollout_pb2.TeacherTask, rollouts: Sequence[rollout_pb2.Rollout], wait_s: float
) -> list[rollout_pb2.Score]:
    request = teacher_pb2.ScoreRequest(task=task, rollouts=rollouts, is_fresh=True)
    scores = [part.score async for part in peer.stream("Score", request, timeout_s=wait_s)]
    if failed := next((score.failed for score in scores if score.WhichOneof("result") == "failed"), None):
        raise StillhouseError(f"{failed.reason}: {failed.message}")
    return scores


def _logprobs(scores: Sequence[rollout_pb2.Score]) -> np.ndarray:
    parts = [from_tensor(getattr(score, score.WhichOneof("result") or "").teacher_logprobs) for score in scores]
    return np.concatenate(parts).astype(np.float64)


def make_samples(answers: Sequence[Answer]) -> list[TrainSample]:
    """The answers as the student reads them."""
    return [
        TrainSample(
            sample_id=f"probe/{index}",
            teacher="",
            prompt_ids=np.asarray(answer.prompt.prompt_ids, dtype=np.int32),
            completion_ids=answer.completion_ids,
            loss_mask=np.ones(len(answer.completion_ids), dtype=np.uint8),
            rollout_logprobs=answer.rollout_logprobs,
            teacher_logprobs=np.full(len(answer.completion_ids), np.nan, dtype=np.float32),
            hidden=None,
            weight=1.0,
            oldest_policy_version=0,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]


def ask_student(
    engine: Any, samples: Sequence[TrainSample], temperatures: Sequence[float], top_k: int
) -> list[dict[str, np.ndarray]]:
    """What the student says at each token of each sample, by name of the measure; see probe_rows.py."""
    found: list[dict[str, np.ndarray]] = [{} for _ in samples]
    plan = plan_micro_batches(samples, PROBE_TOKENS, is_packed=engine.packs)
    for start in range(0, len(plan), engine.num_ranks):
        together = plan[start : start + engine.num_ranks]
        batches = [collate(samples, indices, [0.0] * len(samples), is_packed=engine.packs) for indices in together]
        for batch, rows in zip(batches, engine.probe(batches, temperatures, top_k), strict=True):
            for index in np.unique(batch.sample_of_row):
                found[index] = {name: values[batch.sample_of_row == index] for name, values in rows.items()}
    return found


def reverse_kl(score: rollout_pb2.Score, student: Mapping[str, np.ndarray]) -> np.ndarray:
    """[T] KL(student || teacher), nats, over the student's likeliest tokens and one bucket for the rest: never more
    than the exact one. Where the teacher was not asked about those, the one-sample estimate log p - log q."""
    if score.WhichOneof("result") != "topk" or not score.topk.HasField("target_logprobs"):
        return student["logprobs"][:, 0].astype(np.float64) - np.maximum(_logprobs([score]), MIN_LOG_Q)
    return bucket_kl(student["top_logprobs"], from_tensor(score.topk.target_logprobs))


def bucket_kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """[T] KL(p || q), nats, of [T, K] log-probabilities of the same tokens and what is outside of them."""
    log_p, log_q = log_p.astype(np.float64), np.maximum(log_q.astype(np.float64), MIN_LOG_Q)
    tail_p, tail_q = _tail(log_p), _tail(log_q)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + tail_p * (np.log(tail_p) - np.log(tail_q))


def _tail(logprobs: np.ndarray) -> np.ndarray:
    """[T] mass outside the named tokens; rounding leaves no more than 1e-7 of it uncertain."""
    return np.maximum(1.0 - np.exp(logprobs).sum(axis=1), 1e-7)


def overlap(score: rollout_pb2.Score, student: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """[T] share of the student's `OVERLAP_K` likeliest tokens that are among as many of the teacher's; None = it names
    none."""
    if score.WhichOneof("result") != "topk":
        return None
    return shared(student["top_ids"][:, :OVERLAP_K], from_tensor(score.topk.teacher_topk_ids))


def shared(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[T] share of the ids of `ours` [T, K] that are in `theirs` [T, K'] at the same place."""
    return (ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean(axis=1)

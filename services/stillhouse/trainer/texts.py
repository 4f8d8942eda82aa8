"""Groups that the student does not answer: the trainer brings the completions, from the data or from a teacher.

    planned -> written (a row's completion at once; a teacher's by a sampler, in the background) -> brought to the queue

From there they go the way of all samples: to their teacher for a score, or straight to `scored`. A takeover plans the
same groups with the same seeds; what was brought in a closed epoch is gone with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from stillhouse.core.errors import StillhouseError
from stillhouse.core.rollouts import blank_rollout
from stillhouse.core.spec import TeacherSpec
from stillhouse.core.tensors import DTYPE_NAMES, ids_tensor
from stillhouse.trainer.exchange import Exchange
from stillhouse.trainer.prompts import Prompt
from stillhouse.trainer.samplers import GENERATE_TRIES, SamplerPool, Written
from stillhouse.trainer.scored import ScoredGroup
from stillhouse.trainer.space import Space
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import sampler_pb2

CONCURRENCY: Final = 4
"""Prompts that teachers answer at once: a sampler does one after the other, between its own batches."""


class Texts:
    """Brings the completions of a job's off-policy groups."""

    def __init__(
        self,
        *,
        exchange: Exchange,
        samplers: SamplerPool,
        space: Space,
        teachers: Mapping[str, TeacherSpec],
        tokenizer_sha256: str,
        log: Any,
    ) -> None:
        self._exchange = exchange
        self._samplers = samplers
        self._space = space
        self._teachers = teachers
        self._tokenizer_sha256 = tokenizer_sha256
        self._log = log
        self._ordered: asyncio.Queue[pb.PromptGroup] = asyncio.Queue()

    async def start(self, group: pb.PromptGroup, prompt: Prompt, source: str) -> asyncio.Future[ScoredGroup]:
        """Have a group's completions brought from `source`, as in `StageSpec.off_policy_source`; the future is that of
        `Exchange.plan`."""
        future = self._exchange.expect(group)
        if source == "data":
            assert prompt.completion_ids is not None, "with_completions() came first"
            ids, finish_reason = cut(prompt.completion_ids, group.sampling.max_tokens)
            rollouts = [self._rollout(group, index, pb.ORIGIN_DATA) for index in group.sample_indices]
            for rollout in rollouts:
                rollout.completion_ids.CopyFrom(ids_tensor(ids))
                rollout.finish_reason = finish_reason
            await self._bring(rollouts)
        else:
            self._ordered.put_nowait(group)
        return future

    async def run(self) -> None:
        """Have teachers write until cancelled.

        consumes:     groups given to `start`
        waits for:    a group; a sampler that is free to write (with a deadline and a number of tries)
        produces:     a group's rollouts, or its failures, on the queue
        unblocked by: the loop's plan
        """
        slots = asyncio.Semaphore(CONCURRENCY)

        async def write(group: pb.PromptGroup) -> None:
            try:
                await self._write(group)
            finally:
                slots.release()

        async with asyncio.TaskGroup() as tasks:
            while True:
                await slots.acquire()
                group = await self._ordered.get()
                tasks.create_task(write(group), name=f"write group {group.group_id}")

    async def _write(self, group: pb.PromptGroup) -> None:
        """Bring what the group's teacher writes; what it cannot write ends as failures."""
        rollouts = [self._rollout(group, index, pb.ORIGIN_TEACHER) for index in group.sample_indices]
        try:
            written = await self._samplers.generate(self._request(group))
        except StillhouseError as error:
            self._log.warning("a teacher's text failed", group=group.group_id, error=error.message)
            message = f"teacher '{group.teacher}' could not write: {error.message}"
            await self._bring(
                rollouts,
                pb.Failure(reason="not_written", message=message, service="sampler", attempts=GENERATE_TRIES),
            )
            return
        _fill(rollouts, written)
        await self._bring(rollouts)

    def _request(self, group: pb.PromptGroup) -> sampler_pb2.GenerateRequest:
        teacher = self._teachers[group.teacher]
        has_own_prompt = group.HasField("teacher_prompt_ids")
        return sampler_pb2.GenerateRequest(
            model=teacher.model,
            dtype=DTYPE_NAMES[teacher.dtype],
            prompt_ids=group.teacher_prompt_ids if has_own_prompt else group.prompt_ids,
            sampling=group.sampling,
            seeds=group.seeds,
        )

    async def _bring(self, rollouts: Sequence[pb.Rollout], failure: pb.Failure | None = None) -> None:
        await self._space.insist("given texts", lambda: self._exchange.bring(rollouts, failure))

    def _rollout(self, group: pb.PromptGroup, index: int, origin: pb.Origin) -> pb.Rollout:
        """A sample without its completion. No policy of the student wrote it: no log-probabilities, spans, weights."""
        rollout = blank_rollout(group, index)
        rollout.tokenizer_sha256 = self._tokenizer_sha256
        rollout.origin = origin
        return rollout


def cut(ids: Sequence[int], max_tokens: int) -> tuple[Sequence[int], pb.FinishReason]:
    """A given completion within the stage's length, and how it ends."""
    if len(ids) <= max_tokens:
        return ids, pb.FINISH_REASON_STOP
    return ids[:max_tokens], pb.FINISH_REASON_LENGTH


def _fill(rollouts: Sequence[pb.Rollout], written: Written) -> None:
    for rollout, answer in zip(rollouts, written.answers, strict=True):
        rollout.completion_ids.CopyFrom(answer.completion_ids)
        rollout.finish_reason = answer.finish_reason
        rollout.sampler = written.sampler
        rollout.sample_s = written.seconds / len(rollouts)

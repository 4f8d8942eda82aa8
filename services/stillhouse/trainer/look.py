"""A live pre-flight: everything that a job's start checks, and probes of models and services. Trains nothing.

    validating (as every job) -> the student loaded, its weights published -> each sampler answers a few prompts
    -> the trainer gives its own log-probabilities of the answers -> each teacher process scores them, three times
    -> findings -> report

What cannot be had is skipped with the reason, never waited for beyond `preflight_wait_s`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from stillhouse.core.errors import NotFoundError, OverloadedError, StillhouseError, UnimplementedError
from stillhouse.core.estimate import estimate
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.rpc import Peer
from stillhouse.core.schemas import Check
from stillhouse.core.spec import StageSpec
from stillhouse.core.spec_base import STAGE_PREFIX
from stillhouse.trainer import findings, probes
from stillhouse.trainer.evaluate import first_in_turn
from stillhouse.trainer.preflight import all_stop_ids
from stillhouse.trainer.probes import Answer, Said
from stillhouse.trainer.prompts import Prompt
from stillhouse.trainer.start import Start
from stillhouse.v1 import rollout_pb2, teacher_pb2, teacher_pb2_grpc
from stillhouse.v1.rollout_pb2 import FINISH_REASON_LENGTH

TEMPERATURES: Final = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.2, 1.25, 1.3, 1.5, 2.0)
"""Temperatures that may explain what a sampler records, beside the job's."""
SECOND_PROMPTS: Final = 2
"""Prompts that all samplers but the first answer: enough to compare log-probabilities."""
MAX_SAMPLERS: Final = 8
"""Samplers that are probed."""
OF_SAMPLERS: Final = ("sampler_gap", "temperature", "truncation")
OF_TEACHERS: Final = ("uniform", "repeats", "replicas", "initial_kl", "overlap")
PASSES: Final = 3
"""A training step takes about as long as three forward passes."""


@dataclass
class Look:
    """Looks at one job."""

    start: Start
    given: bool = False
    """No sampler writes: a given text stands for the answers."""
    student: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    """What the student says of the answers, by id of the answer."""
    speeds: dict[str, float] = field(default_factory=dict)
    """Seconds per completion token, by who takes them."""

    async def probe(self) -> None:
        """Load the student and probe everything; adds to the report."""
        stage = self._stage()
        await self.start.progress.show("loading the student")
        await self.start.publish_first()
        await self.start.progress.show("probing samplers")
        answers = await self._ask_samplers(stage)
        self._estimate(stage, answers)
        await self.start.progress.show("probing teachers")
        if not self.start.spec.asks_teachers():
            return await self._skip(OF_TEACHERS, "no teacher is asked for scores")
        answers = answers or self._given_answers(stage)
        for name in self.start.spec.teachers:
            await self._ask_teacher(name, stage, [each for each in answers if name in probes.teachers(each.prompt)])
        self._estimate(stage, [] if self.given else answers)

    def _stage(self) -> StageSpec:
        """The stage whose sampling the probes have: the first in which the student writes."""
        stages = self.start.spec.stages
        return next((stage for stage in stages if stage.on_policy_fraction > 0), stages[0])

    def _prompts(self) -> list[Prompt]:
        """A few prompts, of each teacher in turn."""
        every = [prompt for prompts in self.start.stages.prompts() for prompt in prompts]
        return first_in_turn(every, self.start.ctx.settings.preflight_prompts)

    async def _skip(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            await self.start.report.add(findings.skipped(name, reason))

    # -- samplers ----------------------------------------------------------------------------------------------------

    async def _ask_samplers(self, stage: StageSpec) -> list[Answer]:
        """The answers of the first sampler; of all of them the gaps to the trainer are checked."""
        if stage.on_policy_fraction == 0:
            await self._skip(OF_SAMPLERS, "the student writes nothing: all texts are given")
            return []
        infos, reason = await self._samplers()
        if not infos:
            await self._skip(OF_SAMPLERS, reason)
            return []
        prompts, found = self._prompts(), list[Answer]()
        for info in infos:
            asked = prompts[:SECOND_PROMPTS] if found else prompts
            started = time.monotonic()
            try:
                answers = await self._write(info, asked, stage)
            except (StillhouseError, TimeoutError) as error:
                await self._skip(OF_SAMPLERS[:2], f"sampler {info.instance} did not answer: {error}")
                continue
            if not found:
                self.speeds["sampling"] = (time.monotonic() - started) / _num_tokens(answers) / len(infos)
                await self._check_truncation(answers, stage)
            found = found or answers
            await self._check_gap(info, answers, stage)
        if not found:
            await self._skip(OF_SAMPLERS[2:], "no sampler answered")
        return found

    async def _samplers(self) -> tuple[list[ServiceInfo], str]:
        """Samplers that the pre-flight has, or why there is none."""
        wait_s = self.start.ctx.settings.preflight_wait_s
        alive = await self.start.ctx.registry.services("sampler")
        if not alive:
            return [], "no sampler answers; `stillhouse services` shows what runs"
        try:
            async with asyncio.timeout(wait_s):
                await self.start.samplers.wait_for_min()
        except TimeoutError:
            busy = ", ".join(f"{info.instance} ({info.job_id or 'idle'})" for info in alive)
            return [], f"no sampler was free within preflight_wait_s {wait_s:g} s: {busy}"
        return self.start.samplers.leased()[:MAX_SAMPLERS], ""

    async def _write(self, info: ServiceInfo, prompts: Sequence[Prompt], stage: StageSpec) -> list[Answer]:
        settings, sampling = self.start.ctx.settings, stage.sampling
        asked = rollout_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=min(sampling.max_tokens, settings.preflight_tokens),
            stop=sampling.stop,
            stop_token_ids=all_stop_ids(stage, self.start.models.student),
        )
        seed, wait_s = self.start.spec.seed, settings.preflight_wait_s
        return await probes.write(self.start.samplers, info, prompts, asked, seed=seed, wait_s=wait_s)

    async def _check_truncation(self, answers: Sequence[Answer], stage: StageSpec) -> None:
        most = stage.sampling.max_tokens
        limit = min(most, self.start.ctx.settings.preflight_tokens)
        cut = sum(answer.finish_reason == FINISH_REASON_LENGTH for answer in answers)
        await self.start.report.add(findings.truncation(cut, len(answers), most, limit))

    async def _check_gap(self, info: ServiceInfo, answers: Sequence[Answer], stage: StageSpec) -> None:
        wanted, dtype = stage.sampling.temperature, self.start.spec.student.dtype
        candidates = [wanted, *(each for each in TEMPERATURES if each != wanted)]
        samples = probes.make_samples(answers)
        started = time.monotonic()
        rows = await self.start.learner.probe(samples, candidates, probes.TOP_K)
        self.student |= {id(answer): row for answer, row in zip(answers, rows, strict=True)}
        self.speeds["training"] = PASSES * (time.monotonic() - started) / _num_tokens(answers)
        recorded = np.concatenate([answer.rollout_logprobs for answer in answers])[:, None]
        gaps = np.abs(np.concatenate([row["logprobs"] for row in rows]) - recorded)
        means = [float(mean) for mean in gaps.mean(axis=0, dtype=np.float64)]
        by_temperature = dict(zip(candidates, means, strict=True))
        name, report = f"sampler {info.instance}", self.start.report
        await report.add(findings.temperature(name, wanted, by_temperature, dtype))
        await report.add(findings.sampler_gap(name, means[0], float(gaps[:, 0].max()), dtype, wanted))

    def _given_answers(self, stage: StageSpec) -> list[Answer]:
        """The prompts' own words in place of answers, so that teachers can be asked at all."""
        self.given = True
        stop_ids = all_stop_ids(stage, self.start.models.student)
        limit = self.start.ctx.settings.preflight_tokens

        def stand_in(prompt: Prompt) -> Answer:
            ids = self.start.stages.readers.renderer.completion(prompt.text, stop_ids)[:limit]
            unknown = np.full(len(ids), np.nan, dtype=np.float32)
            return Answer(prompt, np.asarray(ids, dtype=np.int32), unknown, 0, 0.0)

        return [stand_in(prompt) for prompt in self._prompts()]

    # -- teachers ----------------------------------------------------------------------------------------------------

    async def _ask_teacher(self, name: str, stage: StageSpec, answers: Sequence[Answer]) -> None:
        if reason := self._not_asked(name, answers):
            return await self._skip(OF_TEACHERS, f"teacher '{name}': {reason}")
        entry = self.start.models.entry(name)
        task = self.start.stages.task(name, entry)
        services = await self.start.ctx.registry.services("teacher")
        if not services:
            return await self._skip(OF_TEACHERS, "no teacher service answers; `stillhouse services` shows what runs")
        said: list[Said] = []
        absent: list[str] = []
        for info in services:
            try:
                said.append(await self._interrogate(info, task, answers, stage))
            except OverloadedError as error:
                await self._error("memory", f"too little memory in {info.instance}: {error.message}", name)
            except UnimplementedError as error:
                await self._skip(OF_TEACHERS, f"{info.instance} cannot serve teacher '{name}': {error.message}")
            except NotFoundError as error:  # teachers may have registries of their own
                absent.append(error.message)
            except (StillhouseError, TimeoutError) as error:
                await self._error("teachers", f"{info.instance} cannot score for teacher '{name}': {error}", name)
        if len(absent) == len(services):
            await self._error("teachers", f"no teacher here has the model of teacher '{name}': {absent[0]}", name)
        if said:
            await self._check_teacher(name, stage, answers, said)

    def _not_asked(self, name: str, answers: Sequence[Answer]) -> str:
        """Why a teacher cannot be probed before the job runs; "" = it can be."""
        spec = self.start.spec.teachers[name]
        if spec.ema_of_student is not None:
            return "it follows the student, and is the student at the beginning"
        if spec.model.startswith(STAGE_PREFIX) and not self.start.models.entry(name).files:
            return "its weights are those of a stage that has not ended"
        if name in self.start.stages.readers.crossing:
            return "it has another tokenizer and judges texts, not tokens"
        return "" if answers else "no prompt that is probed is routed to it (preflight_prompts)"

    async def _interrogate(
        self, info: ServiceInfo, task: rollout_pb2.TeacherTask, answers: Sequence[Answer], stage: StageSpec
    ) -> Said:
        ctx = self.start.ctx
        peer: Peer = ctx.peers.get(info.address, teacher_pb2_grpc.TeacherServiceStub, f"teacher {info.instance}")
        wait_s = ctx.settings.preflight_wait_s
        await peer.unary("EnsureModel", teacher_pb2.EnsureModelRequest(task=task), timeout_s=wait_s)
        temperature, said = stage.sampling.temperature, [self.student.get(id(answer)) for answer in answers]
        tops = [None if row is None else row["top_ids"] for row in said]
        return await probes.interrogate(peer, info.instance, task, answers, tops, temperature, wait_s)

    async def _error(self, name: str, message: str, teacher: str) -> None:
        param = f"teachers.{teacher}.model"
        await self.start.report.add(Check(name=name, verdict="error", message=message, param=param))

    async def _check_teacher(
        self, name: str, stage: StageSpec, answers: Sequence[Answer], said: Sequence[Said]
    ) -> None:
        """Does it have an opinion, always the same one, and how far from the student's is it?"""
        report, dtype = self.start.report, self.start.spec.teachers[name].dtype
        entry = self.start.models.entry(name)
        await report.add(findings.uniform(name, said[0].logprobs(), entry.num_usable_ids))
        unsteady = []
        for each in said:
            check = findings.repeats(name, each.instance, *each.differences(), dtype)
            await report.add(check)
            unsteady += [each.instance] if check.verdict != "ok" else []
        by_instance = {each.instance: each.logprobs() for each in said}
        await report.add(findings.replicas(name, by_instance, unsteady, dtype))
        steady = next((each for each in said if each.instance not in unsteady), said[0])
        self.speeds["scoring"] = steady.seconds / _num_tokens(answers) / len(said)
        if self.given:
            return await self._skip(OF_TEACHERS[3:], "no sampler wrote answers of the student")
        await self._check_distance(name, answers, steady)

    async def _check_distance(self, name: str, answers: Sequence[Answer], said: Said) -> None:
        report, dtype = self.start.report, self.start.spec.teachers[name].dtype
        pairs = [(score, self.student[id(each)]) for score, each in zip(said.first, answers, strict=True)]
        kl = float(np.concatenate([probes.reverse_kl(*pair) for pair in pairs]).mean())
        await report.add(findings.initial_kl(name, kl, is_same=self._is_same(name, answers), dtype=dtype))
        shares = [share for pair in pairs if (share := probes.overlap(*pair)) is not None]
        if not shares:
            return await self._skip(OF_TEACHERS[4:], f"the engine of {said.instance} names no likeliest tokens")
        await report.add(findings.overlap(name, float(np.concatenate(shares).mean()), probes.OVERLAP_K))

    def _is_same(self, name: str, answers: Sequence[Answer]) -> bool:
        """The teacher is the student as it begins, and reads the same."""
        spec, models = self.start.spec, self.start.models
        is_same_model = models.entry(name).sha256 == models.start.sha256
        reads_the_same = all(probes.own_prompt(each.prompt, name) is None for each in answers)
        return is_same_model and reads_the_same and spec.teachers[name].dtype == spec.student.dtype

    # -- cost --------------------------------------------------------------------------------------------------------

    def _estimate(self, stage: StageSpec, answers: Sequence[Answer]) -> None:
        """What the job will cost, as far as it is known by now."""
        spec, models = self.start.spec, self.start.models
        teachers = {name: models.entry(name) for name in spec.teachers}
        facts: dict[str, Any] = {}
        most = stage.sampling.max_tokens
        if answers:  # who had not ended may go on to the end
            lengths = [
                most if each.finish_reason == FINISH_REASON_LENGTH else len(each.completion_ids) for each in answers
            ]
            facts["length_share"] = sum(lengths) / len(lengths) / most
        if answers and "training" in self.speeds:
            facts["seconds_per_token"] = math.fsum(self.speeds.values())
        self.start.report.estimate = estimate(spec, models.student, teachers, **facts)


def _num_tokens(answers: Sequence[Answer]) -> int:
    return sum(len(answer.completion_ids) for answer in answers)

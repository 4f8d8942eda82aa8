"""From rows to prompt groups: templates applied, routed to teachers, in a seeded order, with seeds for every sample.

Both prompts are made here, the student's and the teacher's, so that sampler and teacher only ever see token ids.
Templates are applied by templates.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.core.errors import PreflightError, SpecError
from stillhouse.core.spec import DataSpec, Row, TeacherSpec
from stillhouse.core.spec_base import NO_TEACHER
from stillhouse.core.tensors import ids_tensor
from stillhouse.trainer.mix import draws
from stillhouse.trainer.templates import Conversation, Renderer, naming
from stillhouse.v1 import rollout_pb2


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as a teacher reads it."""

    teacher: str
    prompt_ids: tuple[int, ...] | None
    """[Q]; None = as the student does."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row, ready to be sampled and scored."""

    source: Row
    """The row as the user gave it."""
    row: int
    text: str
    """The user's last message, for people."""
    teacher: str
    """Name of its teacher, of a mixture the heaviest; NO_TEACHER in a job without."""
    weight: float
    prompt_ids: tuple[int, ...]
    """[P] as the student reads it."""
    teacher_prompt_ids: tuple[int, ...] | None
    """[Q] as the teacher reads it; None = the same."""
    completion_ids: tuple[int, ...] | None = None
    """[T] the row's own completion, where the job reads those."""
    further: tuple[Reading, ...] = ()
    """The other teachers of its mixture."""
    mixture: Mapping[str, float] = field(default_factory=dict)
    """Weights of its teachers; empty = it has one, or none."""

    def weight_of(self, teacher: str) -> float:
        """What a teacher's word on its samples counts in the loss."""
        return self.weight * self.mixture.get(teacher, 1.0)

    def share_of(self, teacher: str) -> float:
        """And in a mean over samples, in which all of its teachers together count once."""
        return self.mixture[teacher] / sum(self.mixture.values()) if self.mixture else 1.0


def load_rows(data: DataSpec, file_path: Path | None) -> list[Row]:
    """The rows of a data source.

    Raises:
        SpecError: names the line that is wrong.
    """
    if data.rows is not None:
        return list(data.rows)
    assert file_path is not None, "a spec with a file comes with its path"
    rows = []
    # not splitlines(): it also splits at U+2028 and others that JSON strings may hold
    for number, line in enumerate(file_path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(Row.model_validate(json.loads(line)))
            except ValueError as error:
                raise SpecError(f"{file_path.name} line {number}: {error}") from None
    return rows


def prepare(
    rows: Sequence[Row],
    teachers: Mapping[str, TeacherSpec],
    renderer: Renderer,
    *,
    for_teachers: Mapping[str, Renderer] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Render every row for student and teacher; `arguments` are the template's, of all rows.

    Raises:
        PreflightError: names the row and whose template refuses it.
    """
    render = _Render(renderer, for_teachers or {}, arguments or {})
    return [render(row, index, _mixture(row, index, teachers), teachers) for index, row in enumerate(rows)]


@dataclass(frozen=True, slots=True)
class _Render:
    """Makes prompts of rows."""

    renderer: Renderer
    for_teachers: Mapping[str, Renderer]
    arguments: Mapping[str, Any]
    _checked: set[tuple[str, str]] = field(default_factory=set)
    """(whose, arguments) for which the template ends prompts where the assistant speaks."""

    def __call__(
        self, row: Row, index: int, mixture: Mapping[str, float], teachers: Mapping[str, TeacherSpec]
    ) -> Prompt:
        conversation = row.conversation()
        arguments = {**self.arguments, **row.chat_template_kwargs}
        prompt_ids = self._ids("the student", self.renderer, index, conversation, arguments)

        def reading(name: str, teacher: TeacherSpec) -> Reading:
            read = _teacher_conversation(row, conversation, teacher)
            renderer = self.for_teachers.get(name, self.renderer)
            # rendering takes longest of all here; most often both read the same
            if renderer is self.renderer and read is conversation and not teacher.chat_template_kwargs:
                return Reading(name, None)
            ids = self._ids(f"teacher '{name}'", renderer, index, read, arguments | teacher.chat_template_kwargs)
            return Reading(name, ids if ids != prompt_ids else None)

        first, *further = [reading(name, teachers[name]) for name in mixture] or [Reading(NO_TEACHER, None)]
        return Prompt(
            source=row,
            row=index,
            text=conversation[-1]["content"],
            teacher=first.teacher,
            weight=row.weight,
            prompt_ids=prompt_ids,
            teacher_prompt_ids=first.prompt_ids,
            further=tuple(further),
            mixture=mixture if further else {},
        )

    def _ids(
        self, whose: str, renderer: Renderer, index: int, conversation: Conversation, arguments: Mapping[str, Any]
    ) -> tuple[int, ...]:
        with naming(f"row {index}, as {whose} reads it"):
            if (key := (whose, repr(arguments))) not in self._checked:
                renderer.check(arguments)
                self._checked.add(key)
            return renderer.ids(conversation, arguments)


def with_completions(prompts: Sequence[Prompt], renderer: Renderer, stop_ids: Sequence[int]) -> list[Prompt]:
    """The prompts with the rows' completions as tokens.

    Raises:
        PreflightError: names a row that has none.
    """
    made = []
    for prompt in prompts:
        text = prompt.source.completion
        if text is None:
            raise PreflightError(f"row {prompt.row} has no 'completion', and the job trains on those; add it")
        made.append(replace(prompt, completion_ids=renderer.completion(text, stop_ids)))
    return made


def _mixture(row: Row, index: int, teachers: Mapping[str, TeacherSpec]) -> dict[str, float]:
    """The row's teachers with their weights; empty = the job has none."""
    mixture = row.mixture(teachers)
    if (teachers and not mixture) or mixture.keys() - teachers.keys():
        named = sorted(mixture.keys() - teachers.keys()) or [None]
        raise PreflightError(f"row {index}: teacher '{named[0]}' is not one of {sorted(teachers)}")
    return mixture


def _teacher_conversation(row: Row, conversation: list[dict[str, str]], teacher: TeacherSpec) -> list[dict[str, str]]:
    if row.teacher_prompt is not None:
        return [message.model_dump() for message in row.teacher_prompt]
    if teacher.system_prompt is not None:
        without_system = [message for message in conversation if message["role"] != "system"]
        return [{"role": "system", "content": teacher.system_prompt}, *without_system]
    return conversation


def check_lengths(
    prompts: Sequence[Prompt], max_tokens: int, limits: Mapping[str, int], crossing: Collection[str] = ()
) -> None:
    """Refuse prompts that leave no room for a completion; `limits` = longest sequence of "student" and each teacher.
    How long a completion is to the teachers of `crossing`, which have another tokenizer, nobody knows before: one token
    is the least.

    Raises:
        PreflightError: names the row, the length, the limit and the fix.
    """
    for prompt in prompts:
        needs = {"student": (len(prompt.prompt_ids), max_tokens)}
        for reading in (Reading(prompt.teacher, prompt.teacher_prompt_ids), *prompt.further):
            if (name := reading.teacher) != NO_TEACHER:
                needs[name] = (len(reading.prompt_ids or prompt.prompt_ids), 1 if name in crossing else max_tokens)
        for who, (length, room) in needs.items():
            if length + room > limits[who]:
                fix = "shorten the prompt" + (" or lower sampling.max_tokens" if room == max_tokens else "")
                raise PreflightError(
                    f"row {prompt.row}: {length} prompt tokens + {room} completion tokens exceed the "
                    f"{limits[who]} that {who} can read; {fix}"
                )


class PromptOrder:
    """Which prompt is a stage's group g, counted from its first: rows as mix.py draws them.

    Within a step, groups of one teacher follow each other, so that a teacher process with little memory loads each
    model once a step; every other step the other way round, so that it begins with the model that is there. A step
    trains on the same prompts as without that.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int | str,
        shuffle: bool,
        prompts_per_step: int = 1,
        mix: Mapping[str, float] | None = None,
    ) -> None:
        self._prompts = prompts
        self._rows = draws([prompt.teacher for prompt in prompts], seed, shuffle=shuffle, mix=mix)
        self._per_step = prompts_per_step
        self._step = -1
        self._of_step: list[Prompt] = []

    def __getitem__(self, group: int) -> Prompt:
        step, position = divmod(group, self._per_step)
        if step != self._step:
            first = step * self._per_step
            self._of_step = [self._prompts[self._rows[first + index]] for index in range(self._per_step)]
            if self._per_step > 1:
                self._of_step.sort(key=lambda prompt: prompt.teacher, reverse=step % 2 == 1)
            self._step = step
        return self._of_step[position]


def sample_seed(job_seed: int, group_id: str, index: int) -> int:
    """Seed of a sample: from the job's seed, the group and the index, never from the policy version."""
    digest = hashlib.sha256(f"{job_seed}/{group_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_on_policy(job_seed: int, group: int, fraction: float) -> bool:
    """Whether the student answers a group itself: true of `fraction` of the groups, drawn from the job's seed."""
    digest = hashlib.sha256(f"{job_seed}/origin/{group}".encode()).digest()
    # 53 bits are exact as a float below 1: a fraction of 0 is never, one of 1 is always
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53 < fraction


def make_group(
    prompt: Prompt,
    *,
    job_id: str,
    epoch: int,
    purpose: rollout_pb2.Purpose,
    group: int,
    group_id: str,
    seeds: Sequence[int],
    sampling: rollout_pb2.SamplingParams,
    score: rollout_pb2.ScoreSpec,
    min_policy_version: int,
) -> rollout_pb2.PromptGroup:
    """The message a sampler claims."""
    message = rollout_pb2.PromptGroup(
        schema_version=1,
        job_id=job_id,
        epoch=epoch,
        purpose=purpose,
        group=group,
        group_id=group_id,
        sample_indices=range(len(seeds)),
        prompt_ids=ids_tensor(prompt.prompt_ids),
        teacher=prompt.teacher,
        sampling=sampling,
        score=score,
        seeds=seeds,
        min_policy_version=min_policy_version,
        row=prompt.row,
    )
    if prompt.teacher_prompt_ids is not None:
        message.teacher_prompt_ids.CopyFrom(ids_tensor(prompt.teacher_prompt_ids))
    for reading in prompt.further:
        further = message.further.add(teacher=reading.teacher)
        if reading.prompt_ids is not None:
            further.teacher_prompt_ids.CopyFrom(ids_tensor(reading.prompt_ids))
    return message

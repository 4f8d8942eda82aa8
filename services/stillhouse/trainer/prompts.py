"""From rows to prompt groups: templates applied, routed to teachers, in a seeded order, with seeds for every sample.

Both prompts are made here, the student's and the teacher's, so that sampler and teacher only ever see token ids.
Needs the tokenizer, hence transformers; loaded by the trainer when it leads a job.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.errors import PreflightError, SpecError
from stillhouse.core.spec import DataSpec, Row, TeacherSpec
from stillhouse.core.tensors import ids_tensor
from stillhouse.v1 import rollout_pb2


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row, ready to be sampled and scored."""

    row: int
    text: str
    """The user's last message, for people."""
    teacher: str
    weight: float
    prompt_ids: tuple[int, ...]
    """[P] as the student reads it."""
    teacher_prompt_ids: tuple[int, ...] | None
    """[Q] as the teacher reads it; None = the same."""


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


class Renderer:
    """Applies the chat template of the student's tokenizer."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)

    def ids(self, conversation: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """[P] token ids of a conversation, up to where the assistant speaks."""
        encoded = self._tokenizer.apply_chat_template(
            [dict(message) for message in conversation], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return tuple(int(token) for token in encoded["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """Completion ids as text, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def prepare(rows: Sequence[Row], teachers: Mapping[str, TeacherSpec], renderer: Renderer) -> list[Prompt]:
    """Render every row for student and teacher."""
    only = next(iter(teachers)) if len(teachers) == 1 else None
    prompts = []
    for index, row in enumerate(rows):
        name = row.teacher or only
        if name is None or name not in teachers:
            raise PreflightError(f"row {index}: teacher '{row.teacher}' is not one of {sorted(teachers)}")
        conversation = row.conversation()
        for_teacher = _teacher_conversation(row, conversation, teachers[name])
        prompts.append(
            Prompt(
                row=index,
                text=conversation[-1]["content"],
                teacher=name,
                weight=row.weight,
                prompt_ids=renderer.ids(conversation),
                teacher_prompt_ids=renderer.ids(for_teacher) if for_teacher is not None else None,
            )
        )
    return prompts


def _teacher_conversation(
    row: Row, conversation: list[dict[str, str]], teacher: TeacherSpec
) -> list[dict[str, str]] | None:
    if row.teacher_prompt is not None:
        return [message.model_dump() for message in row.teacher_prompt]
    if teacher.system_prompt is not None:
        without_system = [message for message in conversation if message["role"] != "system"]
        return [{"role": "system", "content": teacher.system_prompt}, *without_system]
    return None


def check_lengths(prompts: Sequence[Prompt], max_tokens: int, limits: Mapping[str, int]) -> None:
    """Refuse prompts that leave no room for a completion; `limits` = longest sequence of "student" and each teacher.

    Raises:
        PreflightError: names the row, the length, the limit and the fix.
    """
    for prompt in prompts:
        lengths = {"student": len(prompt.prompt_ids)}
        lengths[prompt.teacher] = len(prompt.teacher_prompt_ids or prompt.prompt_ids)
        for who, length in lengths.items():
            if length + max_tokens > limits[who]:
                raise PreflightError(
                    f"row {prompt.row}: {length} prompt tokens + {max_tokens} completion tokens exceed the "
                    f"{limits[who]} that {who} can read; shorten the prompt or lower sampling.max_tokens"
                )


class PromptOrder:
    """Which prompt is group g: a new seeded permutation in every pass over the data."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._pass = -1
        self._order: list[int] = []

    def __getitem__(self, group: int) -> Prompt:
        number, position = divmod(group, len(self._prompts))
        if number != self._pass:
            self._order = list(range(len(self._prompts)))
            if self._shuffle:
                random.Random(f"{self._seed}/pass/{number}").shuffle(self._order)
            self._pass = number
        return self._prompts[self._order[position]]


def sample_seed(job_seed: int, group_id: str, index: int) -> int:
    """Seed of a sample: from the job's seed, the group and the index, never from the policy version."""
    digest = hashlib.sha256(f"{job_seed}/{group_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


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
    return message

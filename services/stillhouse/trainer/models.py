"""The models of a job: who learns, from which weights, and who judges; checkpoints among them are made models.

What a reference means is settled with its first use and noted beside the artifacts (core/checkpoints.py), so that every
later claim, of whatever trainer, finds the same files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from stillhouse.core.checkpoints import START, Models, Settled, locate, parse, read_references, settle
from stillhouse.core.errors import NotFoundError, PreflightError
from stillhouse.core.models import ModelEntry
from stillhouse.core.spec import JobSpec
from stillhouse.core.spec_base import STAGE_PREFIX
from stillhouse.trainer.manifests import lineage
from stillhouse.trainer.space import Space

COSMETIC: Final = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
)
"""Keys of a config.json that change nothing of what a model computes."""


class JobModels:
    """Entries of a job's models."""

    def __init__(
        self,
        job_id: str,
        spec: JobSpec,
        models: Models,
        *,
        make: Callable[[str], Awaitable[ModelEntry]],
        fence: Callable[[], Awaitable[None]],
        space: Space,
        tell: Callable[..., Awaitable[None]],
    ) -> None:
        self._job_id = job_id
        self._spec = spec
        self._models = models
        self._job = models.artifacts.job(job_id)
        self._make = make
        """Gives the entry of a checkpoint, made a model if need be."""
        self._fence = fence
        """Fails if the claim is over: what a reference means is not for a zombie to settle."""
        self._space = space
        self._tell = tell
        """Takes (kind of event, message) and its data."""
        self.student: ModelEntry
        """The registered student: its tokenizer, template and limits are the job's."""
        self.start: ModelEntry
        """The model whose weights the student begins with."""

    async def open(self) -> None:
        """Settle what the job begins with, and make models of other jobs' checkpoints.

        Raises:
            PreflightError: a model is not what it was when the job began, or does not fit the student.
            NotFoundError: a model or a checkpoint is not there (any more).
        """
        self.student = self.start = self._models.get(self._spec.student.model)
        if self._spec.init_from is not None:
            self.start = await self._settled(self._spec.init_from)
            check_same_model(self.student, self.start)
        await self._note(START, self.start)
        for teacher in self._spec.teachers.values():
            if parse(teacher.model):
                await self._settled(teacher.model)

    def entry(self, teacher: str) -> ModelEntry:
        """A teacher's model. At the end of a stage that is to come the student's own: it reads the same."""
        model = self._spec.teachers[teacher].model
        if model == START:
            return self.start
        settled = read_references(self._job).get(model)
        if settled is not None:
            return self._models.get(settled.model)
        if model.startswith(STAGE_PREFIX):
            return self.student.model_copy(update={"name": model})
        return self._models.get(model)

    async def ready(self, teacher: str) -> ModelEntry:
        """A teacher's model, at the beginning of a stage that asks it."""
        model = self._spec.teachers[teacher].model
        if model.startswith(STAGE_PREFIX) and model != START:
            return await self._settled(model)
        return self.entry(teacher)

    async def _settled(self, reference: str) -> ModelEntry:
        """The model of a reference to a checkpoint."""
        known = read_references(self._job).get(reference)
        # a claim may have died over a stage's checkpoint; the stage ended again, and the old one is on no lineage
        may_move = reference.startswith(STAGE_PREFIX) and known is not None and not known.sha256
        if known is None or may_move:
            known = Settled(self._locate(reference))
            await self._settle(reference, known)  # named before it is read, so that nobody deletes it meanwhile
        entry = await self._make(known.model)
        await self._note(reference, entry)
        return entry

    def _locate(self, reference: str) -> str:
        if not reference.startswith(STAGE_PREFIX):
            return locate(self._models.artifacts, reference)
        name = reference.removeprefix(STAGE_PREFIX)
        stop_step = next(span.stop_step for span in self._spec.spans() if span.stage.name == name)
        past = lineage(self._job)
        for ref in past.manifests if past else ():
            if ref.step == stop_step and ref.folder(self._job).is_dir():
                return f"{self._job_id}/ckpt_{ref.epoch}-{ref.name}"
        raise NotFoundError(f"{reference}: the checkpoint of step {stop_step}, where stage '{name}' ended, is gone")

    async def _note(self, reference: str, entry: ModelEntry) -> None:
        """Note what a reference means, and hold it against what an earlier claim noted."""
        known = read_references(self._job).get(reference)
        if known is not None and known.sha256 not in ("", entry.sha256):
            raise PreflightError(
                f"{reference}: '{entry.name}' has sha256 {entry.sha256[:12]}, the job began with {known.sha256[:12]} "
                f"of '{known.model}'; register that model again as it was, or send a new job"
            )
        if known is None or not known.sha256:
            await self._settle(reference, Settled(entry.name, entry.sha256))
            if parse(entry.name):
                message = f"{reference} is '{entry.name}', sha256 {entry.sha256[:12]}"
                await self._tell("model.settled", message, reference=reference, model=entry.name, sha256=entry.sha256)

    async def _settle(self, reference: str, settled: Settled) -> None:
        await self._fence()
        await self._space.insist(
            "what the job names", lambda: asyncio.to_thread(settle, self._job, {reference: settled})
        )


def check_same_model(student: ModelEntry, start: ModelEntry) -> None:
    """Refuse weights of a model that computes otherwise than the student: samplers have the student's configuration.

    Raises:
        PreflightError: names the first difference.
    """
    ours, theirs = (_config(Path(entry.path)) for entry in (student, start))
    for key in sorted((ours.keys() | theirs.keys()) - COSMETIC):
        if ours.get(key) != theirs.get(key):
            raise PreflightError(
                f"init_from: '{start.name}' has {key} {theirs.get(key)!r}, the student '{student.name}' has "
                f"{ours.get(key)!r}; name the model that the checkpoint is of as student.model"
            )


def _config(folder: Path) -> dict[str, Any]:
    """Defaults filled in: files of several ages say the same in other words."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()


def model_names(spec: JobSpec, references: Mapping[str, Settled]) -> dict[str, Any]:
    """What the model card says about the models of a job: `teachers` by name, and `init_from` if it has one."""

    def name(reference: str) -> str:
        settled = references.get(reference)
        return f"{settled.model} (sha256 {settled.sha256[:12]})" if settled else reference

    names: dict[str, Any] = {
        "teachers": {
            key: f"{teacher.model} (moving average of the student)" if teacher.ema_of_student else name(teacher.model)
            for key, teacher in spec.teachers.items()
        }
    }
    return names if spec.init_from is None else {**names, "init_from": name(spec.init_from)}

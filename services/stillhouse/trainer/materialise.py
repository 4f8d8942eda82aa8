"""A checkpoint of a job made a model: a folder that transformers loads, and its registration, in that job's artifacts.

    export       registered where it lies
    committed    the weights that learn, as samplers had them: in the student's element type, a low-rank adapter merged,
                 with the tokenizer of the job's student

It is made once. Several trainers may make the same at the same time: the first folder that is whole is the model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from stillhouse.core.blobs import Artifacts, JobArtifacts, sha256_file, staged_dir, unsealed
from stillhouse.core.checkpoints import EXPORT, START, Models, committed, exported, parse, read_references
from stillhouse.core.config import load_settings
from stillhouse.core.errors import ConflictError, NotFoundError, StillhouseError
from stillhouse.core.models import ModelEntry, verify_files
from stillhouse.core.spec import JobSpec, OptimizerSpec
from stillhouse.trainer import checkpoint, manifests
from stillhouse.trainer.export import save_model
from stillhouse.trainer.lora import add_adapter
from stillhouse.trainer.parameters import Parameters
from stillhouse.trainer.student import load_student


def make_model(models: Models, name: str) -> ModelEntry:
    """The entry of a checkpoint `job_ID/ckpt_...`, which becomes a model if it is none yet. Blocks; CPU only.

    Raises:
        NotFoundError: it is not there (any more), or what it is made of is not.
        CorruptError: its files do not verify.
        ConflictError: the model that its job began with is another one by now.
    """
    entry = models.made(name)
    return entry or models.register(name, _folder(models, name))


def _folder(models: Models, name: str) -> Path:
    """Where the model of a checkpoint lies, written if it is not there."""
    job_id, checkpoint_id = parse(name) or ("", "")
    job = models.artifacts.job(job_id)
    source = exported(job) if checkpoint_id == EXPORT else committed(job, checkpoint_id)
    if checkpoint_id == EXPORT and source is not None:
        return source
    folder = job.models / checkpoint_id
    if folder.is_dir():  # whoever wrote it died before it was registered
        return folder
    if source is None:
        raise NotFoundError(f"checkpoint '{name}' is gone; name another one of GET /v1/jobs/{job_id}/checkpoints")
    manifests.verify(job, _ref(source))
    states = checkpoint.random_states()
    try:
        with staged_dir(folder) as staged:
            _write(models, job, source, staged.path)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        checkpoint.restore_random_states(states)
    return folder


def _ref(folder: Path) -> manifests.ManifestRef:
    """`folder` is `epochs/EPOCH/manifests/NAME`."""
    return manifests.ManifestRef(int(folder.parent.parent.name), folder.name, sha256_file(folder / manifests.MANIFEST))


def _write(models: Models, job: JobArtifacts, source: Path, folder: Path) -> None:
    spec = JobSpec.model_validate(unsealed(job.job_json)["spec"])
    student = models.get(spec.student.model)
    base = student if spec.student.lora is None else _began_with(models, job, student)
    model = load_student(Path(base.path), spec.student.dtype, torch.device("cpu"))
    if spec.student.lora is not None:
        add_adapter(model, spec.student.lora, spec.seed)
    parameters = Parameters(model, OptimizerSpec())
    parameters.load_weights(source)
    save_model(model, parameters.state_arrays(), Path(student.path), folder)


def _began_with(models: Models, job: JobArtifacts, student: ModelEntry) -> ModelEntry:
    """The model on which an adapter was trained: with another one it would be something else, silently."""
    settled = read_references(job).get(START)
    if settled is None:
        verify_files(student)
        return student
    entry = make_model(models, settled.model) if parse(settled.model) else models.get(settled.model)
    if entry.sha256 != settled.sha256:
        raise ConflictError(
            f"the adapter of {job.root.name} was trained on '{settled.model}' with sha256 {settled.sha256[:12]}, which "
            f"has {entry.sha256[:12]} now; register that model again as it was"
        )
    verify_files(entry)
    return entry


def main(name: str) -> int:
    """Make a model of one checkpoint, for `stillhouse models add`. Exit code 1 and a message if it cannot be done."""
    settings = load_settings()
    try:
        make_model(Models(settings.models_path(), Artifacts(settings.artifacts_dir())), name)
    except (StillhouseError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

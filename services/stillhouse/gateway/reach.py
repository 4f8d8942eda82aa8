"""What a job may name: files and checkpoints of its owner. Others do not exist for it."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.core.blobs import Artifacts, unsealed
from stillhouse.core.errors import CorruptError, NotFoundError
from stillhouse.gateway import files
from stillhouse.gateway.auth import Caller


@dataclass(frozen=True, slots=True)
class Reach:
    """Of a caller, among the artifacts."""

    artifacts: Artifacts
    caller: Caller

    def has_file(self, file_id: str) -> bool:
        """There is such a file, and the caller uploaded it."""
        try:
            files.find(self.artifacts, file_id, self.caller)
        except NotFoundError:
            return False
        return True

    def check_job(self, job_id: str) -> None:
        """Refuse another owner's job as if it were not there.

        Raises:
            NotFoundError: there is no such job here.
        """
        try:
            owner = unsealed(self.artifacts.job(job_id).job_json).get("owner", "")
        except (NotFoundError, CorruptError):
            return  # whoever looks for its checkpoints says what is wrong
        if not self.caller.may_see(owner):
            raise NotFoundError(f"there is no job '{job_id}' here; GET /v1/jobs lists them")

"""Checkpoints of a job, the finished student among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stillhouse.client.calls import Call, path
from stillhouse.client.download import download
from stillhouse.client.resource import EXPORT, Resource, delete
from stillhouse.core.schemas import Checkpoint, Page


class JobCheckpoints(Resource):
    """What a job has made."""

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Checkpoints, oldest first; the finished student (`ckpt_export`) last.

        >>> [(one.kind, one.step) for one in client.jobs.checkpoints(job.id)][-1]
        ('export', 4)
        """
        return (await self._sender.send(Call("GET", path("/v1/jobs/{}/checkpoints", job_id), Page[Checkpoint]))).data

    async def checkpoint(self, job_id: str, checkpoint: str = EXPORT) -> Checkpoint:
        """One of them, by default the finished student."""
        return await self._sender.send(Call("GET", path("/v1/jobs/{}/checkpoints/{}", job_id, checkpoint), Checkpoint))

    async def mark_best(self, job_id: str, checkpoint: str) -> Checkpoint:
        """Mark a checkpoint as the best: nothing deletes it until the mark is taken back."""
        where = path("/v1/jobs/{}/checkpoints/{}/best", job_id, checkpoint)
        return await self._sender.send(Call("PUT", where, Checkpoint))

    async def unmark_best(self, job_id: str, checkpoint: str) -> Checkpoint:
        """Take the mark back."""
        where = path("/v1/jobs/{}/checkpoints/{}/best", job_id, checkpoint)
        return await self._sender.send(Call("DELETE", where, Checkpoint))

    async def delete_checkpoint(self, job_id: str, checkpoint: str) -> None:
        """Delete a checkpoint.

        Raises:
            ConflictError: its job may still go on from it, another job needs it, or it is marked as best.
        """
        await delete(self._sender, path("/v1/jobs/{}/checkpoints/{}", job_id, checkpoint))

    async def download(
        self,
        job_id: str,
        target: str | Path,
        *,
        checkpoint: str | None = None,
        on_progress: Callable[[int, int | None], object] | None = None,
    ) -> Path:
        """Fetch a checkpoint, by default the finished student, into the new folder `target` (or a file `*.tar`).

        What an interrupted download has fetched stays beside the target (`.NAME.part`); the same call goes on there,
        also in a new process.

        Args:
            on_progress: sees the bytes that have come and those that there are (None = not known).

        Raises:
            SpecError: something is at `target` already.
            ConflictError: there is another download to `target`.
            CorruptError: what came is not what was sent.

        >>> client.jobs.download(job.id, "student").joinpath("config.json").exists()
        True
        """
        where = path("/v1/jobs/{}/checkpoints/{}/download", job_id, checkpoint or EXPORT)
        return await download(self._sender, Call("GET", where, bytes), Path(target), on_progress)

"""The step journal: what each optimizer step trains on, durable before it trains.

It is the ledger of the job, what `/samples` shows, and what a takeover replays. A file is one header and its samples,
each record as uint32 length, xxh3-128 and message; it appears complete or not at all (temp, fsync, rename).
Hidden states are not in it: a replay has them scored again.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from stillhouse.core.blobs import JobArtifacts, write_atomic
from stillhouse.core.errors import CorruptError
from stillhouse.core.queue.streams import Scope
from stillhouse.v1 import journal_pb2, rollout_pb2

SCHEMA_VERSION: Final = 1
_LENGTH: Final = struct.Struct("<I")
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class JournalledStep:
    """What a step trained on."""

    header: journal_pb2.StepHeader
    scores: list[rollout_pb2.Score]


def encode(header: journal_pb2.StepHeader, scores: Sequence[rollout_pb2.Score]) -> bytes:
    """The bytes of a journal file."""
    records = [header.SerializeToString()]
    records += [journal_pb2.JournalRecord(score=score).SerializeToString() for score in scores]
    return b"".join(_LENGTH.pack(len(record)) + xxhash.xxh3_128_digest(record) + record for record in records)


def read_step(path: Path) -> JournalledStep:
    """Read and verify a journal file.

    Raises:
        CorruptError: torn, altered, or not of this version.
    """
    records = list(_records(path))
    if not records:
        raise CorruptError(f"{path} is empty")
    header = journal_pb2.StepHeader.FromString(records[0])
    if header.schema_version != SCHEMA_VERSION:
        raise CorruptError(
            f"{path} has journal version {header.schema_version}, this program reads {SCHEMA_VERSION}; "
            "let a trainer of a newer Stillhouse go on with the job"
        )
    scores = [journal_pb2.JournalRecord.FromString(record).score for record in records[1:]]
    if len(scores) != header.num_samples:
        raise CorruptError(f"{path} holds {len(scores)} samples, its header says {header.num_samples}")
    return JournalledStep(header, scores)


def _records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    position = 0
    prefix = _LENGTH.size + _DIGEST_BYTES
    while position < len(data):
        if position + prefix > len(data):
            raise CorruptError(f"{path} ends inside a record at byte {position}")
        (length,) = _LENGTH.unpack_from(data, position)
        digest = data[position + _LENGTH.size : position + prefix]
        record = data[position + prefix : position + prefix + length]
        if len(record) != length or xxhash.xxh3_128_digest(record) != digest:
            raise CorruptError(f"{path}: the record at byte {position} does not verify")
        yield record
        position += prefix + length


class StepJournal:
    """Writes the journals of one epoch."""

    def __init__(self, artifacts: JobArtifacts, scope: Scope) -> None:
        self._artifacts = artifacts
        self._scope = scope

    async def write(
        self,
        step: int,
        scores: Sequence[rollout_pb2.Score],
        *,
        groups: Sequence[int],
        next_group: int,
        micro_batches: Sequence[journal_pb2.MicroBatchPlan],
        stage: int = 0,
    ) -> Path:
        """Write the journal of `step`; durable when it returns."""
        header = journal_pb2.StepHeader(
            schema_version=SCHEMA_VERSION,
            job_id=self._scope.job_id,
            epoch=self._scope.epoch,
            step=step,
            groups=groups,
            num_samples=len(scores),
            next_group=next_group,
            stage=stage,
            micro_batches=micro_batches,
            written_at=time.time(),
        )
        path = self._artifacts.journal(self._scope.epoch, step)
        await asyncio.to_thread(write_atomic, path, encode(header, scores))
        return path

"""No damaged file of a job goes unnoticed, and none stops the oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core.errors import NotFoundError
from stillhouse.core.oracle.safetensors import differing
from stillhouse.core.oracle.verify import verify_job
from tests.unit.oracle_cases import STEPS, Job, finished, save_tensors

SEED = 20261123


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def _truncate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def _extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 40)))


def _is_noticed(job: Job) -> bool:
    try:
        report = verify_job(job.artifacts, job.record)
    except NotFoundError:
        return not job.artifacts.job_json.exists()
    return not report.ok or bool(report.damage)


def test_no_damaged_file_goes_unnoticed(tmp_path: Path) -> None:
    """Bit flips, truncations, deletions and garbage at the end in every file but the histories."""
    job = finished(tmp_path)
    draw = random.Random(SEED)
    history = {job.artifacts.events, job.artifacts.metrics}
    files = [path for path in sorted(job.artifacts.root.rglob("*")) if path.is_file() and path not in history]
    kinds: list[Callable[[Path, random.Random], Any]] = [_flip, _truncate, _extend, lambda path, _: path.unlink()]
    unnoticed, number = [], 0
    for path in files:
        for kind in [*kinds, *[_flip] * 4, *[_truncate] * 2]:
            data = path.read_bytes()
            kind(path, draw)
            if not _is_noticed(job):
                unnoticed.append((path, kind))
            number += 1
            path.write_bytes(data)
    assert verify_job(job.artifacts, job.record).ok, "all was put back"
    assert number >= 200, number
    assert not unnoticed, f"seed {SEED}: {len(unnoticed)} of {number}: {unnoticed[:3]}"
    print(f"{number} damaged files, all noticed (seed {SEED})")


def test_a_damaged_history_never_stops_the_oracle(tmp_path: Path) -> None:
    """events.jsonl and metrics.jsonl are not hashed: they may be wrong, and the rest is still checked."""
    job = finished(tmp_path)
    draw = random.Random(SEED)
    for path in [job.artifacts.events, job.artifacts.metrics] * 40:
        data = path.read_bytes()
        draw.choice((_flip, _truncate, _extend))(path, draw)
        assert verify_job(job.artifacts, job.record).counts["steps"] == STEPS
        path.write_bytes(data)


def test_damage_on_which_nothing_rests_is_no_violation(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.open()
    job.run(4)
    assert job.last is not None
    (job.last.folder(job.artifacts) / "model.safetensors").write_bytes(b"x")
    assert verify_job(job.artifacts, job.record).broken_rules() == {"checkpoint"}, "a recovery would want it"
    job.open()
    job.run(STEPS)
    job.finish()
    report = verify_job(job.artifacts, job.record)
    assert report.ok, report.text()
    assert [finding.rule for finding in report.damage] == ["checkpoint"]


@pytest.mark.parametrize("bounds", [(0, 5), (0, 3, 5), (0, 2, 4, 5, 5)])
def test_files_split_by_rows_are_compared_as_one(tmp_path: Path, bounds: tuple[int, ...]) -> None:
    """As the ranks of a trainer write them; the last may hold no row."""
    matrix, norm = np.arange(15, dtype=np.float32).reshape(5, 3), np.ones(5, dtype=np.float32)
    save_tensors(tmp_path / "whole", {"matrix": matrix, "norm": norm, "only here": norm})
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        parts.append(tmp_path / f"part-{number}")
        save_tensors(parts[-1], {"norm": norm[start:stop], "matrix": matrix[start:stop]})
    assert differing(tmp_path / "whole", parts) == (2, [])
    assert differing(tmp_path / "whole", parts[:-1])[0] == (0 if bounds[-2] < 5 else 2)
    matrix[4, 2] = -1
    save_tensors(tmp_path / "whole", {"matrix": matrix, "norm": norm})
    assert differing(tmp_path / "whole", parts) == (2, ["matrix"])

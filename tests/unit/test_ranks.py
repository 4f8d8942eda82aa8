"""Several ranks compute what one does, and read what any number of them wrote. Real processes, gloo, tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.trainer.shards import Share, read
from tests.tiny import make_tiny_model
from tests.unit import ranks_cases
from tests.unit.learner_cases import learner
from tests.unit.ranks_cases import CASES

pytestmark = pytest.mark.timeout(240)
TIMEOUT_S = 180
"""Of a launch: three processes import torch, on a busy machine."""


def launch(size: int, *paths: Path) -> None:
    """Run ranks_cases on `size` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run(
        [*command, ranks_cases.__file__, *map(str, paths)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_tiny_model(root / "student", seed=1, vocab_pad=3)
    make_tiny_model(root / "teacher", seed=3, hidden_size=16)
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """What one rank saw."""
    return ranks_cases.run(learner, root, root / "alone")


@pytest.fixture(scope="module")
def together(root: Path) -> dict[str, Any]:
    """What two ranks saw."""
    launch(2, root, root / "together")
    return json.loads((root / "together" / "seen.json").read_text())


@pytest.mark.parametrize("name", [*CASES, "stages"])
def test_two_ranks_train_as_one_does(root: Path, alone: dict, together: dict, name: str) -> None:
    for one, two in zip(alone[name], together[name], strict=True):
        assert one.keys() == two.keys()
        assert abs(two["loss/total"] - one["loss/total"]) <= 1e-5 * max(1.0, abs(one["loss/total"]))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for stem in stems(root / "alone" / name):
        ones, twos = whole(root / "alone" / name, stem), whole(root / "together" / name, stem)
        assert ones.keys() == twos.keys()
        for key in ones:
            np.testing.assert_allclose(twos[key], ones[key], rtol=1e-3, atol=1e-5, err_msg=f"{stem} {key}")


def test_a_mishap_is_told_as_one_rank_tells_it(alone: dict, together: dict) -> None:
    """Non-finite numbers and unreadable files leave the ranks in step: what follows in ranks_cases would hang else."""
    assert together["errors"]["non_finite"] == alone["errors"]["non_finite"]
    assert "of sample 5/0" in together["errors"]["non_finite"]
    assert together["errors"]["reloaded"] == pytest.approx(alone["errors"]["reloaded"], rel=1e-4)
    assert "optimizer-00001-of-00002.safetensors is missing" in together["errors"]["torn"]


def whole(folder: Path, stem: str) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in read(folder, stem, Share()).items()}


def stems(folder: Path) -> set[str]:
    return {path.stem.partition("-")[0] for path in folder.glob("*.safetensors")}


def assert_same_state(one: Path, other: Path) -> None:
    assert stems(one) == stems(other) >= {"model", "optimizer"}
    for stem in stems(one):
        mine, theirs = whole(one, stem), whole(other, stem)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine), stem


@pytest.mark.parametrize("name", CASES)
def test_one_rank_reads_what_two_wrote(root: Path, together: dict, tmp_path: Path, name: str) -> None:
    ranks_cases.reload(learner, root, root / "together", tmp_path)
    assert_same_state(root / "together" / name, tmp_path / name)
    for file in ("published.st", "average.st", "followed.st"):
        assert (root / "together" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
    assert ("average" in stems(tmp_path / name)) == (name == "rounded")
    assert ("followed" in stems(tmp_path / name)) == (name == "policy")
    state = [json.loads((folder / name / "state.json").read_text()) for folder in (root / "together", tmp_path)]
    assert state[0] == state[1]


@pytest.mark.full
@pytest.mark.parametrize(("size", "writer"), [(2, "alone"), (3, "together")])
def test_any_number_of_ranks_reads_what_another_wrote(
    root: Path, alone: dict, together: dict, tmp_path: Path, size: int, writer: str
) -> None:
    launch(size, root, root / writer, tmp_path)
    for name in CASES:
        assert len(list((tmp_path / name).glob(f"model-*-of-{size:05d}.safetensors"))) == size
        assert_same_state(root / writer / name, tmp_path / name)

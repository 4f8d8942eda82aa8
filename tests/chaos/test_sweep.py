"""Every failpoint once, with an action that rotates with the seed; all cells are in `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.cells import ACTIONS, SWEPT, all_cells, diagonal
from tests.chaos.harness import Chaos
from tests.chaos.sweep import run_cells, table


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_diagonal_of_the_sweep(chaos: Chaos, chaos_seed: int, tmp_path: Path) -> None:
    cells = run_cells(chaos, diagonal(chaos_seed), chaos_seed, tmp_path / "results.jsonl")
    print(table(cells))
    bad = {f"{cell.point} {cell.action}": cell.violations or "not reached" for cell in cells if cell.is_bad}
    assert not bad, f"seed {chaos_seed}: {bad}"


def test_three_diagonals_are_the_whole_sweep() -> None:
    assert sorted(cell for seed in range(3) for cell in diagonal(seed)) == sorted(all_cells(0))
    assert len(all_cells(0)) == len(SWEPT) * len(ACTIONS)

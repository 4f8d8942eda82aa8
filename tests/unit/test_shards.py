"""Rows of tensors in files: whoever wrote them, whoever reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.core.errors import CorruptError
from stillhouse.trainer.shards import Share, read, write

SIZES = (1, 2, 3, 5)


def tensors() -> dict[str, Tensor]:
    return {"matrix": torch.randn(7, 3), "norm": torch.randn(2), "steps": torch.tensor(3.0)}


def part(whole: dict[str, Tensor], share: Share) -> dict[str, Tensor]:
    return {name: t if t.ndim == 0 else t[slice(*share.bounds(len(t)))] for name, t in whole.items()}


@pytest.mark.parametrize("readers", SIZES)
@pytest.mark.parametrize("writers", SIZES)
def test_every_reader_gets_its_rows(tmp_path: Path, writers: int, readers: int) -> None:
    """Also ranks that hold no row of a small tensor."""
    whole = tensors()
    for rank in range(writers):
        write(tmp_path, "model", part(whole, Share(rank, writers)), Share(rank, writers))
    for rank in range(readers):
        expected, found = part(whole, Share(rank, readers)), read(tmp_path, "model", Share(rank, readers))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", range(9))
def test_shares_are_those_of_torch(rows: int, size: int) -> None:
    """FSDP2 splits with torch.chunk."""
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(size)]
    chunks += [[]] * (size - len(chunks))
    assert [list(range(*Share(rank, size).bounds(rows))) for rank in range(size)] == chunks


def test_a_missing_part_and_parts_of_two_checkpoints_are_corrupt(tmp_path: Path) -> None:
    whole = tensors()
    write(tmp_path, "model", part(whole, Share(1, 2)), Share(1, 2))
    with pytest.raises(CorruptError, match=r"model-00001-of-00002\.safetensors is missing"):
        read(tmp_path, "model", Share())
    write(tmp_path, "model", {"other": torch.zeros(1)}, Share(0, 2))
    with pytest.raises(CorruptError, match="hold different tensors"):
        read(tmp_path, "model", Share())

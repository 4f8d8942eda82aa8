"""Tables of memory: shapes equal what is published, and more GPUs never need more of each."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.models import ModelEntry

PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
}
"""Parameters as the models' safetensors headers count them, tied heads once."""


@pytest.fixture(scope="module")
def sizing() -> Any:
    """scripts/sizing as a module."""
    loader = SourceFileLoader("sizing", str(Path(__file__).resolve().parents[2] / "scripts/sizing"))
    spec = spec_from_loader("sizing", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["sizing"] = module  # dataclasses look it up
    loader.exec_module(module)
    return module


def test_shapes_have_the_published_number_of_parameters(sizing: Any) -> None:
    found = {shape.name: shape.parameters() for shape in sizing.SHAPES}
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


def test_all_weights_cost_18_bytes_a_parameter_and_what_is_published(sizing: Any) -> None:
    """2 weights, 4 master, 4 gradients, 8 moments; 2 for each of the two versions that samplers may fetch."""
    entry: ModelEntry = sizing.SHAPES[0].entry()
    parts = sizing.needed(sizing.job("full_vocabulary"), entry, {"t": entry})
    split = sizing.split_by_ranks(parts, 2)
    device = ("weights", "float32 master weights", "gradients", "optimizer")
    assert sum(parts[name] for name in device) == 18 * entry.num_parameters
    assert sum(split[name] for name in device) == 9 * entry.num_parameters
    assert split["published weights"] == parts["published weights"] == 4 * entry.num_parameters


def test_more_ranks_need_less_of_each_and_larger_students_more(sizing: Any) -> None:
    table = [[sizing.trainer_gib(shape, ranks) for ranks in sizing.RANKS] for shape in sizing.SHAPES]
    assert all(row == sorted(row, reverse=True) for row in table)
    assert all(list(column) == sorted(column) for column in zip(*table, strict=True))


def test_what_does_not_fit_is_said(sizing: Any) -> None:
    assert sizing.fewest(sizing.SHAPES[-1], 24) == "no"
    assert sizing.fewest(sizing.SHAPES[0], 80) == "1 GPU"

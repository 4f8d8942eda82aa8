"""One deployment of real processes for all tests that hurt it; each leaves it working."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.chaos.harness import Chaos, deployment


@pytest.fixture(scope="session")
def chaos_seed() -> int:
    """CHAOS_SEED, or a new one; printed, and in the message of what fails."""
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    return seed


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with deployment(tmp_path_factory.mktemp("chaos")) as running:
        yield running


@pytest.fixture
def chaos(whole: Chaos) -> Iterator[Chaos]:
    """The deployment, with all of its services there and nothing armed."""
    whole.disarm()
    whole.wait_ready(sampler=2, teacher=2, trainer=2)
    yield whole
    whole.disarm()

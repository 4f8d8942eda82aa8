"""How a trainer of several ranks is started, and what is refused before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.cli.deployment import Deployment
from stillhouse.cli.up import UpOptions, plan
from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError, PreflightError
from stillhouse.core.launch import Launch
from stillhouse.core.spec import JobSpec
from stillhouse.trainer.app import build
from stillhouse.trainer.validate import check_ranks
from tests.cluster import job_spec

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


def test_torchrun_says_who_we_are_and_whom_a_supervisor_knows() -> None:
    assert Launch.read({}) == Launch(0, 1, False)
    assert Launch.read({}).pid() == os.getpid()
    assert Launch.read(TORCHRUN) == Launch(1, 2, True)
    assert Launch.read(TORCHRUN).pid() == os.getppid()


@pytest.mark.parametrize(("option", "setting", "ranks"), [(0, 1, 1), (0, 3, 3), (2, 3, 2), (1, 3, 1)])
def test_up_starts_torchrun_for_several_ranks(tmp_path: Path, option: int, setting: int, ranks: int) -> None:
    deployment = Deployment(tmp_path)
    deployment.prepare()
    settings = Settings(home=tmp_path, trainer_ranks=setting, drain_s=7.5).resolved()
    specs = plan(deployment, settings, UpOptions(trainer_ranks=option, threads=1), 1, 2)
    trainer = next(spec for spec in specs if spec.role == "trainer")
    assert trainer.argv[-2:] == ("-m", "stillhouse.trainer")
    assert ("torch.distributed.run" in trainer.argv) == (ranks > 1)
    if ranks > 1:
        assert {f"--nproc-per-node={ranks}", "--shutdown-timeout=8"} <= set(trainer.argv)
    assert trainer.env["STILLHOUSE_TRAINER_RANKS"] == str(ranks)
    assert all("torch.distributed.run" not in spec.argv for spec in specs if spec.role != "trainer")


def test_cores_are_shared_out_between_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    deployment = Deployment(tmp_path)
    deployment.prepare()
    specs = plan(deployment, Settings(home=tmp_path).resolved(), UpOptions(trainer_ranks=2), 1, 2)
    assert {spec.env["STILLHOUSE_THREADS"] for spec in specs} == {"3"}  # sampler, teacher, two ranks


def test_a_trainer_whose_number_of_ranks_is_not_the_setting_is_refused() -> None:
    ctx: Any = SimpleNamespace(settings=Settings(trainer_ranks=2))
    with pytest.raises(ConfigError, match="trainer_ranks is 2, and this trainer runs as 1 processes"):
        build(ctx)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"model": "student", "lora": {"rank": 2}}}, "low-rank adapter.*trainer_ranks 2"),
        ({"deterministic": True}, "deterministic.*trainer_ranks 2"),
    ],
)
def test_what_several_ranks_do_not_do_is_refused_with_both_sides(changes: dict, said: str) -> None:
    spec = JobSpec.model_validate(job_spec(**changes))
    for number in (1, 2):
        start: Any = SimpleNamespace(spec=spec, learner=SimpleNamespace(num_ranks=number))
        if number == 1:
            check_ranks(start)
        else:
            with pytest.raises(PreflightError, match=said):
                check_ranks(start)

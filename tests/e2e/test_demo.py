"""The main job of the README, whole and real: SmolLM2 on a CPU, with a sampler and a teacher killed midway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.deployment import Stillhouse, wait_until

pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[2]


def kill_midway(stillhouse: Stillhouse, killed: list[str]) -> None:
    """kill -9 the sampler after a few steps, the teacher after a few more."""
    wait_until(lambda: (stillhouse.home / "client.json").is_file(), "the deployment", 120)
    for at_step, victim in ((5, "sampler-0"), (12, "teacher-0")):

        def reached(at_step: int = at_step) -> bool:
            with suppress(httpx.HTTPError):  # the gateway still starts
                return any(job["progress"]["step"] >= at_step for job in stillhouse.get("/v1/jobs")["data"])
            return False

        wait_until(reached, f"step {at_step}", 600)
        os.kill(stillhouse.services()[victim]["pid"], signal.SIGKILL)
        killed.append(victim)


def test_the_demo_makes_a_better_student_although_services_die(tmp_path: Path, smollm2: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "models").symlink_to(smollm2)  # its first step, done once for all tests
    stillhouse = Stillhouse(out / "home")
    demo = subprocess.Popen([sys.executable, str(ROOT / "examples/quickstart/demo.py"), "--out", str(out)])
    killed: list[str] = []
    killer = threading.Thread(target=kill_midway, args=(stillhouse, killed), daemon=True)
    killer.start()
    try:
        assert demo.wait(timeout=1200) == 0
    finally:
        demo.terminate()
        demo.wait()
        stillhouse("down")  # it ends what an interrupted demo leaves
    assert killed == ["sampler-0", "teacher-0"]

    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["steps"] == 36
    assert report["heldout_reverse_kl_after"] <= 0.5 * report["heldout_reverse_kl_before"]
    assert report["teacher_nll_greedy_after"] < report["teacher_nll_greedy_before"]
    assert report["repeated_4grams_after"] <= report["repeated_4grams_before"]
    assert report["stages"]["train"]["tokens"] > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert stillhouse.processes() == []

    export = Path(report["export_dir"])
    assert "smollm2-135m-instruct" in (export / "README.md").read_text()
    model: Any = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer("Why is the sky blue?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]

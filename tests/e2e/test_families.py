"""A SmolLM2 job of every family of objectives, through real processes: the files of examples/families, shortened.

Three of the six files by default, for each takes most of a minute: of the policy gradient the one with a reward, of
top-k the one with all of it, and texts by the teacher; the demo is the full vocabulary's job. FAMILIES=all runs every
file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.client.client import Client
from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.schemas import Job
from tests.e2e.deployment import Stillhouse

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ROOT / "examples" / "families"
STUDENT, TEACHER = "smollm2-23l", "smollm2-135m-instruct"
FILES = sorted(path.stem for path in FAMILIES.glob("*.yaml"))
CHOSEN = FILES if os.environ.get("FAMILIES") == "all" else ("reward", "seq_kd", "top_k_union_lora")
SHORT = {
    "schedule": {"steps": 4, "prompts_per_step": 3},
    "sampling": {"max_tokens": 12},
    "optimizer": {"warmup_steps": 1},
    "evaluation": {"num_prompts": 6, "max_tokens": 12, "show": 0},
    "checkpoint": {"every_steps": 100, "max_redo_s": 600},
}
"""Parts of a job that replace those of the file: the least that shows that a family learns. Most of the time goes into
loading, publishing, a checkpoint and the export, hence no command line and no download here: test_up.py and the demo
have them."""
NOISE = 0.5
"""Nats per token by which held-out reverse KL may rise in so few steps. It starts near 5, and the 72 tokens that it is
measured on are sampled anew."""
LEARNS = {"full_vocabulary": 0.5, "top_k": 0.5, "top_k_union_lora": 0.0, "seq_kd": 0.0}
"""Families whose signal is dense: by how much reverse KL must fall at least, nats per token."""


@pytest.fixture(scope="module")
def stillhouse(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stillhouse]:
    """A deployment that knows both models."""
    command = Stillhouse(tmp_path_factory.mktemp("families") / "home")
    command("up", "--detach", "--port", "0", "--threads", "1")
    try:
        for name in (STUDENT, TEACHER):
            command("models", "add", name, str(smollm2 / name))
        yield command
    finally:
        command("down")


def shortened(family: str, folder: Path) -> Path:
    """The family's job file, fewer and shorter steps."""
    document: dict[str, Any] = yaml.safe_load((FAMILIES / f"{family}.yaml").read_text())
    stage, evaluation = document["stages"][0], document["evaluation"]
    for part in ("schedule", "sampling", "optimizer"):
        stage[part] |= SHORT[part]
    if "lora" in document["student"]:
        stage["schedule"]["steps"] = 6  # an adapter begins at nothing
    if stage["schedule"].get("group_size", 1) > 1:
        stage["schedule"] |= {"prompts_per_step": 2, "group_size": 3}
    evaluation |= SHORT["evaluation"]
    document["checkpoint"] = SHORT["checkpoint"]
    for data in (stage["data"], evaluation["data"]):
        data["path"] = str((FAMILIES / data["path"]).resolve())
    file = folder / f"{family}.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def run(stillhouse: Stillhouse, family: str, folder: Path) -> tuple[Client, Job]:
    """Submit and wait for the end, whatever it is. Gives a client and the job."""
    shown = stillhouse("submit", str(shortened(family, folder))).splitlines()
    job_id = next(line.split()[0] for line in shown if line.startswith("job_"))
    entrance = json.loads((stillhouse.home / "client.json").read_text())
    client = Client(entrance["url"], entrance["api_key"])
    return client, client.jobs.wait(job_id, timeout_s=600)


@pytest.mark.parametrize("family", CHOSEN)
def test_a_job_of_the_family_ends_with_a_student_that_is_no_worse(
    stillhouse: Stillhouse, smollm2: Path, family: str, tmp_path: Path
) -> None:
    client, job = run(stillhouse, family, tmp_path)
    assert job["status"] == "succeeded", job["error"]
    job_id, steps = job["id"], job["spec"]["stages"][0]["schedule"]["steps"]
    points = client.jobs.metrics(job_id)
    assert len(points) == job["progress"]["step"] == steps
    for point in points:
        bad = {name: value for name, value in point["values"].items() if value is None or not math.isfinite(value)}
        assert bad == {}, f"step {point['step']}"

    before, after = (evaluation["reverse_kl"] for evaluation in client.jobs.evaluations(job_id))
    assert after < before + (-LEARNS[family] if family in LEARNS else NOISE)
    print(f"{family}: held-out reverse KL {before:.3f} -> {after:.3f}")
    artifacts = JobArtifacts(stillhouse.home / "artifacts" / "jobs" / job_id)
    report = verify_job(artifacts, None)
    assert (report.violations, report.damage) == ([], [])
    check_model(artifacts.root / job["result"]["export_path"], smollm2 / STUDENT)
    shutil.rmtree(artifacts.epochs)  # six jobs of 3.5 GB each are too much for a small disk


def check_model(folder: Path, base: Path) -> None:
    """transformers loads it, and it writes; an adapter on the student's first weights is the same model, says peft."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Why is the sky blue?", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > ids["input_ids"].shape[1]
    if (folder / "adapter").is_dir():
        start = AutoModelForCausalLM.from_pretrained(base)
        adapted = PeftModel.from_pretrained(start, str(folder / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(adapted(**ids).logits, model(**ids).logits, rtol=1e-3, atol=1e-3)

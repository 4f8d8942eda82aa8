"""Jobs whose teacher has another tokenizer, through real services: the student gets closer to it in what it writes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core.models import inspect_model
from stillhouse.core.oracle.verify import verify_job
from stillhouse.core.spelling import Spelling
from stillhouse.core.tensors import from_tensor, ids_list
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import Cluster, cluster, job_spec
from tests.spellings import END_ID, as_pretrained, byte_level
from tests.tiny import EOS_ID, make_tiny_model

LOSS: dict[str, Any] = {"objective": "policy_gradient", "cross_tokenizer": True}


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, redis_url, "sampler", "teacher", "trainer") as made:
        made.add_model("student", seed=1)
        tokenizer = as_pretrained(byte_level(tmp_path / "tokenizer.json"))
        folder = make_tiny_model(made.settings.home / "models" / "teacher", seed=2, tokenizer=tokenizer)
        made.models.add(inspect_model("teacher", folder))
        yield made


async def test_the_student_gets_closer_to_a_teacher_with_another_tokenizer(deployment: Cluster) -> None:
    held_out = [{"prompt": f"tell me about {word}"} for word in ("tea", "rain", "bread", "maps", "salt", "wood")]
    job_id = await deployment.submit(
        job_spec(
            stages__0__loss={**LOSS, "advantage_clip": 20},
            stages__0__schedule={"steps": 12, "prompts_per_step": 5, "group_size": 16, "max_staleness": 0},
            stages__0__optimizer__lr=2e-2,
            evaluation={"data": {"rows": held_out}, "num_prompts": 6, "max_tokens": 8, "show": 1},
        )
    )
    record = await deployment.ended(job_id)
    assert (record.status, record.step) == ("succeeded", 12), record.error
    assert record.result is not None
    kl = record.result["evaluation"]["reverse_kl"]
    print("held-out KL of spans, nats per token:", kl)
    assert kl["after"] < 0.8 * kl["before"]
    artifacts = deployment.ctx.artifacts.job(job_id)
    report = verify_job(artifacts, record)
    assert report.ok, report
    spellings = [Spelling(Path(deployment.models.get(name).path) / "tokenizer.json") for name in ("student", "teacher")]
    for score in read_step(artifacts.journal(1, 0)).scores:
        check_texts(score, *spellings)


def check_texts(score: pb.Score, student: Spelling, teacher: Spelling) -> None:
    """What the teacher read is what the student wrote, up to its end."""
    ids, read = ids_list(score.rollout.completion_ids), ids_list(score.spans.teacher_ids)
    is_ended = score.rollout.finish_reason == pb.FINISH_REASON_STOP
    assert (ids[-1] == EOS_ID) == is_ended
    if is_ended:
        assert read.pop() == END_ID
        ids.pop()
        assert score.spans.student_ends.shape == score.spans.teacher_ends.shape
        assert from_tensor(score.spans.student_ends)[-1] == len(ids) + 1
    text = b"".join(student.spell(ids)).decode(errors="replace")
    assert text.startswith(b"".join(teacher.spell(read)).decode())


async def test_with_one_tokenizer_it_is_the_policy_gradient_bit_for_bit(deployment: Cluster) -> None:
    deployment.add_model("cousin", seed=3)
    metrics = []
    for fields in ({}, {"cross_tokenizer": True}):
        job_id = await deployment.submit(
            job_spec(
                teachers__main__model="cousin",
                stages__0__loss={"objective": "policy_gradient", **fields},
                stages__0__schedule={"steps": 3, "prompts_per_step": 3, "group_size": 2, "max_staleness": 0},
                deterministic=True,
            )
        )
        record = await deployment.ended(job_id)
        assert record.status == "succeeded", record.error
        points = [point["values"] for point in await deployment.ctx.jobs.metrics(job_id)]
        metrics.append([{k: v for k, v in p.items() if "time/" not in k and "_per_s" not in k} for p in points])
    assert metrics[0] == metrics[1]


async def test_two_teachers_one_with_the_students_tokenizer(deployment: Cluster) -> None:
    deployment.add_model("cousin", seed=3)
    rows = [{"prompt": f"row {index}", "teacher": "near" if index % 2 else "main"} for index in range(6)]
    job_id = await deployment.submit(
        job_spec(
            teachers__near={"model": "cousin"},
            stages__0__data={"rows": rows, "shuffle": False},
            stages__0__loss=LOSS,
            stages__0__schedule={"steps": 1, "prompts_per_step": 6},
        )
    )
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    for score in read_step(deployment.ctx.artifacts.job(job_id).journal(1, 0)).scores:
        length = len(ids_list(score.rollout.completion_ids))
        if score.rollout.teacher == "near":
            assert from_tensor(score.spans.student_ends).tolist() == list(range(1, length + 1))
            assert not score.rollout.HasField("teacher_prompt_ids")
        else:
            prompt = ids_list(score.rollout.teacher_prompt_ids)
            assert prompt != ids_list(score.rollout.prompt_ids)
            assert np.isfinite(from_tensor(score.spans.teacher_logprobs)).all()


async def test_other_losses_refuse_such_a_teacher_and_name_the_one_that_does_not(deployment: Cluster) -> None:
    record = await deployment.ended(await deployment.submit(job_spec()))
    assert record.status == "failed"
    assert record.error is not None
    for word in ("different tokenizers", "cross_tokenizer"):
        assert word in record.error["message"]

"""Jobs that read completions, ask verifiers or have no teacher: what of their rows is refused, and what is let be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.spec import JobSpec
from stillhouse.gateway import judging, validation
from stillhouse.gateway.references import NamedModels
from stillhouse.gateway.rows import Rows
from tests.gateway_kit import Gateway, add_model, make_spec, open_gateway

TWO = [{"prompt": "one"}, {"prompt": "two"}]
BOTH = {"main": {"model": "big"}, "b": {"model": "big"}}


@pytest.fixture
async def gateway(tmp_path: Path, redis_url: str) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


def job(loss: dict[str, Any], rows: list[dict[str, Any]], *, teachers: Any = None, **stage: Any) -> dict[str, Any]:
    spec = make_spec(teachers={"main": {"model": "big"}} if teachers is None else teachers)
    spec["stages"][0] |= {"loss": loss, "data": {"rows": rows}, **stage}
    return spec


def sft(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return job({"objective": "cross_entropy"}, [*rows], on_policy_fraction=0, **{"teachers": {}, **changes})


def grpo(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    loss = {"objective": "policy_gradient", "teacher_weight": 0, "reward": {}} | changes
    return job(loss, [*rows], teachers={}, schedule={"steps": 2, "group_size": 2})


def mixed(mix: dict[str, float], *domains: str) -> dict[str, Any]:
    rows = [{"prompt": f"row {number}", "teacher": name} for number, name in enumerate(domains)]
    teachers = {"a": {"model": "big"}, "b": {"model": "big"}}
    return job({"objective": "policy_gradient"}, [], teachers=teachers, data={"rows": rows, "mix": mix})


@pytest.mark.parametrize(
    "spec",
    [
        sft({"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "2"}),
        sft(*TWO, teachers={"main": {"model": "big"}}, off_policy_source="teacher"),
        grpo({"prompt": "1 + 1", "verifier": "numeric", "answer": "2"}),
        grpo({"prompt": "1 + 1", "answer": "2"}, reward={"verifier": "exact"}),
        job({"objective": "policy_gradient"}, [{"prompt": "x", "completion": "y", "verifier": "nobody"}]),
        mixed({"a": 2, "b": 1}, "a", "b", "b"),
        job({"objective": "policy_gradient"}, [{"prompt": "x", "teacher": {"main": 2, "b": 1}}], teachers=BOTH),
    ],
    ids=["sft", "seq_kd", "grpo", "grpo, verifier of the loss", "columns that nothing reads", "a mix", "a mixture"],
)
async def test_these_are_accepted(gateway: Gateway, spec: dict[str, Any]) -> None:
    answer = await gateway.submit(spec)
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize(
    ("spec", "param", "words"),
    [
        (sft({"prompt": "one", "completion": "1"}, {"prompt": "two"}), "stages.0.data.rows.1", ["row 1", "missing"]),
        (sft({"prompt": "one", "completion": " "}), "stages.0.data.rows.0", ["empty", "off_policy_source"]),
        (
            sft({"prompt": "one", "completion": "1"}, teachers={"main": {"model": "big"}}),
            "teachers.main",
            ["asks no teacher", "evaluation.data"],
        ),
        (
            sft({"prompt": "x", "completion": "y"}, schedule={"steps": 1, "group_size": 4}),
            "stages.0",
            ["group_size 4", "copies"],
        ),
        (
            job({"objective": "policy_gradient"}, TWO, off_policy_source="teacher"),
            "stages.0",
            ["off_policy_source", "never read"],
        ),
        (grpo({"prompt": "x", "answer": "y"}), "stages.0.data.rows.0", ["no verifier", "loss.reward.verifier"]),
        (grpo({"prompt": "x", "verifier": "exakt"}), "stages.0.data.rows.0", ["unknown verifier 'exakt'", "exact"]),
        (grpo({"prompt": "x", "verifier": "exact"}), "stages.0.data.rows.0", ["row 0", "'answer'"]),
        (mixed({"a": 1, "b": 1}, "a"), "stages.0.data.mix.b", ["routed to 'b'", "rows for a", "remove its share"]),
        (mixed({"a": 1}, "a", "b"), "teachers.b", ["no share for this teacher", "give it a share"]),
        (
            job({"objective": "policy_gradient"}, [{"prompt": "x", "teacher": {"main": 2, "b": 1}}]),
            "stages.0.data.rows.0",
            ["unknown teacher 'b'"],
        ),
        (
            job({"objective": "policy_gradient"}, [{"prompt": "x", "teacher": {"main": 2, "b": -1}}], teachers=BOTH),
            "stages.0.data.rows.0.teacher.b",
            ["-1"],
        ),
        (
            sft({"prompt": "x", "teacher": {"main": 2, "b": 1}}, teachers=BOTH, off_policy_source="teacher"),
            "stages.0.data.rows.0",
            ["asks none for scores", "name one"],
        ),
    ],
    ids=[
        "no completion",
        "an empty completion",
        "a teacher that nothing asks",
        "copies of a completion",
        "a source that is never read",
        "no verifier",
        "an unknown verifier",
        "no answer",
        "a share without rows",
        "a teacher without a share",
        "a mixture with an unknown teacher",
        "a mixture with a negative weight",
        "a mixture that nothing asks",
    ],
)
async def test_these_are_refused_with_their_fix(
    gateway: Gateway, spec: dict[str, Any], param: str, words: list[str]
) -> None:
    body = await gateway.refused(spec)
    assert body["param"] == param, body
    for word in words:
        assert word in body["detail"], body


def test_slow_patterns_are_left_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling has a budget: 300 of these would take minutes. What is quick to see is still refused."""
    slow = "(?i)" + "[!-\U0010ffff]" * 30

    def found(*answers: str) -> list[str | None]:
        rows = [{"prompt": "x", "verifier": "regex", "answer": answer} for answer in answers]
        rows.append({"prompt": "x", "verifier": "numeric", "answer": "none"})
        spec = JobSpec.model_validate(grpo(*rows))
        stage = spec.stages[0]
        assert stage.data.rows is not None
        source = validation.Source("data", stage.data, Rows(stage.data.rows, range(len(rows))), 10, stage)
        case = validation.Case(spec, NamedModels(), [source], None, [])
        return [finding.param for finding in judging.check_verifiers(case)]

    assert found("(", slow) == ["data.rows.0", "data.rows.2"]
    monkeypatch.setattr(judging, "COMPILE_S", 0.001)
    assert found(slow + ".", "(") == ["data.rows.2"]


async def test_rows_without_a_teacher_name_none(gateway: Gateway) -> None:
    """Of a file: in the spec itself the format refuses it."""
    data = b'{"prompt": "x", "completion": "y", "teacher": "main"}'
    upload = await gateway.http.post("/v1/files", content=data, headers={"Content-Type": "application/jsonl"})
    spec = sft()
    spec["stages"][0]["data"] = {"file": upload.json()["id"]}
    body = await gateway.refused(spec)
    assert "routed to 'main', the job has none" in body["detail"]


async def test_what_the_sampler_records_must_fit_into_a_queue_entry(gateway: Gateway) -> None:
    """512 token ids of 4 bytes at each of 400 positions leave room for a prompt of (921,600 - 819,200) / 16 - 400."""
    add_model(gateway.home, "long", max_length=1_000_000)
    add_model(gateway.home, "long-teacher", max_length=1_000_000, size=8)

    def spec(length: int) -> dict[str, Any]:
        loss = {"objective": "top_k", "support": "student", "k": 512}
        made = job(loss, [{"prompt": "x" * length}], teachers={"main": {"model": "long-teacher"}})
        made["student"]["model"] = "long"
        made["stages"][0]["sampling"] = {"max_tokens": 400}
        return made

    assert (await gateway.submit(spec(6_000))).status_code == 201
    body = await gateway.refused(spec(6_001))
    assert "of 6400" in body["detail"]
    assert "loss.k" in body["detail"]

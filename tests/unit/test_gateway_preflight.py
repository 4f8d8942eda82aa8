"""`POST /v1/jobs/validate`: the report of what hashes, configurations and rows say about a job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.blobs import sealed, write_json
from stillhouse.core.schemas import Check, Preflight
from stillhouse.gateway.validation import CHECKS
from tests.gateway_kit import Gateway, add_model, make_spec, open_gateway, problem


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as made:
        yield made


async def look(gateway: Gateway, spec: dict[str, Any]) -> Preflight:
    answer = await gateway.http.post("/v1/jobs/validate", json=spec)
    assert answer.status_code == 200, answer.text
    return Preflight.model_validate(answer.json())


def named(report: Preflight, name: str) -> list[Check]:
    return [check for check in report.checks if check.name == name]


async def only(gateway: Gateway, spec: dict[str, Any], name: str, verdict: str) -> Check:
    """The one check that does not say ok."""
    report = await look(gateway, spec)
    assert report.verdict == verdict
    odd = [check for check in report.checks if check.verdict != "ok"]
    assert [(check.name, check.verdict) for check in odd] == [(name, verdict)], odd
    return odd[0]


async def test_a_good_job_passes_every_check_and_is_counted(gateway: Gateway) -> None:
    report = await look(gateway, make_spec())
    assert report.verdict == "ok"
    assert not report.is_live
    assert [check.name for check in report.checks] == [name for name, _, _ in CHECKS]
    assert report.estimate is not None
    # 3 steps of 2 prompts with 8 tokens, 4 bytes for each score; nothing was made of the job
    assert report.estimate.sampled_tokens.at_most == 48
    assert report.estimate.trained_tokens.at_most == 48
    assert report.estimate.sampled_tokens.expected is None
    assert report.estimate.bytes["scores"] == 4 * 48
    assert (await gateway.http.get("/v1/jobs")).json()["data"] == []


async def test_everything_that_is_wrong_is_in_the_report_and_refuses_the_job(gateway: Gateway) -> None:
    spec = make_spec(teachers={"main": {"model": "big"}, "idle": {"model": "nobody"}})
    spec["stages"][0]["data"] = {
        "rows": [{"prompt": "one", "teacher": "main"}, {"prompt": "x" * 300, "teacher": "main"}]
    }
    report = await look(gateway, spec)
    wrong = {check.name: check for check in report.checks if check.verdict == "error"}
    assert wrong.keys() == {"models", "teachers_used", "lengths"}
    assert wrong["models"].param == "teachers.idle.model"
    assert wrong["lengths"].param == "stages.0.data.rows.1"
    assert all(check.fix for check in wrong.values())
    refused = await gateway.refused(spec)
    found = {check.message for check in report.checks if check.verdict == "error"}
    assert {error["message"] for error in refused["errors"]} == found


async def test_errors_of_the_format_are_checks_too(gateway: Gateway) -> None:
    spec = make_spec()
    spec["stages"][0]["schedule"] = {"steps": 0, "prompts_per_stepp": 2}
    report = await look(gateway, spec)
    assert report.verdict == "error"
    assert {check.param for check in named(report, "format")} == {
        "stages.0.schedule.steps",
        "stages.0.schedule.prompts_per_stepp",
    }
    assert named(report, "tokenizers")[0].verdict == "skipped"
    assert report.estimate is None
    refused = await gateway.http.post("/v1/jobs/validate?live=true", json=spec)
    assert len(problem(refused, 422)["errors"]) == 2


@pytest.mark.parametrize(
    ("body", "status"), [("{", 400), ("[]", 422), ("", 422), ('{"student": null}', 200), ('{"stages": [1]}', 200)]
)
async def test_only_what_is_no_json_object_is_refused(gateway: Gateway, body: str, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await gateway.http.post("/v1/jobs/validate", content=body, headers=headers)
    assert answer.status_code == status, answer.text


async def test_an_other_tokenizer_is_named_by_its_first_token(gateway: Gateway) -> None:
    add_model(gateway.home, "other", extra_token="Ω")
    report = await look(gateway, make_spec(teachers={"main": {"model": "other"}}))
    (check,) = named(report, "tokenizers")
    assert check.verdict == "error"
    assert check.param == "teachers.main.model"
    assert "token 256 is nothing for 'small' and 'Ω' for 'other'" in check.message


async def test_a_missing_end_is_an_error(gateway: Gateway) -> None:
    add_model(gateway.home, "endless", eos_token_id=None)
    check = await only(gateway, make_spec(student={"model": "endless"}), "ends", "error")
    assert "'endless' names no end-of-sequence token" in check.message
    assert "eos_token_id" in check.fix


async def test_a_padded_head_is_told_with_both_sizes(gateway: Gateway) -> None:
    add_model(gateway.home, "padded", vocab_pad=64)
    check = await only(gateway, make_spec(teachers={"main": {"model": "padded"}}), "heads", "warning")
    assert "'padded' has 320 rows, the student's 256" in check.message
    assert check.evidence["teacher main"] == {"head_rows": 320, "tokens": 256, "padding_rows": 64}
    assert (await gateway.submit(make_spec(teachers={"main": {"model": "padded"}}))).status_code == 201


async def test_a_head_with_too_few_rows_is_an_error(gateway: Gateway) -> None:
    add_model(gateway.home, "short", vocab_pad=-6)
    check = await only(gateway, make_spec(teachers={"main": {"model": "short"}}), "heads", "error")
    assert "no probability for those from 250 on" in check.message


async def test_an_other_chat_template_shows_the_first_place(gateway: Gateway) -> None:
    add_model(gateway.home, "chatty", template="{{ messages | tojson }}")
    check = await only(gateway, make_spec(teachers={"main": {"model": "chatty"}}), "chat_template", "warning")
    assert check.evidence == {"character": 12, "student": "{{ messages }}", "teacher": "{{ messages | tojson }}"}


async def test_a_teacher_of_another_family_is_a_warning(gateway: Gateway) -> None:
    add_model(gateway.home, "foreign", architecture="GPT2LMHeadModel")
    check = await only(gateway, make_spec(teachers={"main": {"model": "foreign"}}), "lineage", "warning")
    assert "GPT2LMHeadModel" in check.message


@pytest.mark.parametrize(("temperature", "verdict"), [(0.29, "warning"), (0.3, "ok"), (1.5, "ok"), (1.6, "warning")])
async def test_unusual_temperatures_are_told(gateway: Gateway, temperature: float, verdict: str) -> None:
    spec = make_spec()
    spec["stages"][0]["sampling"]["temperature"] = temperature
    assert (await look(gateway, spec)).verdict == verdict


async def test_a_live_preflight_is_a_job(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/jobs/validate?live=true", json=make_spec(), headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["status"]) == ("preflight", "queued")
    assert (await gateway.ctx.jobs.get(job["id"])).kind == "preflight"
    again = await gateway.http.post("/v1/jobs/validate?live=true", json=make_spec(), headers={"Idempotency-Key": "k"})
    assert (again.json(), again.headers["Idempotent-Replayed"]) == (job, "true")
    # the same key does not stand for the job itself
    problem(await gateway.submit(key="k"), 422)


async def test_the_trainers_report_is_shown_once_it_is_there(gateway: Gateway) -> None:
    job_id = (await gateway.submit()).json()["id"]
    path = f"/v1/jobs/{job_id}/preflight"
    assert "queued" in problem(await gateway.http.get(path), 404)["detail"]
    report = Preflight(is_live=True, verdict="ok", checks=[Check(name="memory", verdict="ok", message="fits")])
    write_json(gateway.ctx.artifacts.job(job_id).preflight, sealed(report.model_dump(mode="json")))
    assert Preflight.model_validate((await gateway.http.get(path)).json()) == report

"""Job files: what is refused before anything is sent, and how `path` becomes `file`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.cli import jobfile
from stillhouse.cli.console import EXIT_USAGE, CliError
from stillhouse.core.spec import JobSpec

JOB: dict[str, Any] = {
    "name": "from the file",
    "student": {"model": "small"},
    "teachers": {"main": {"model": "large"}},
    "stages": [
        {"data": {"path": "prompts.jsonl"}, "loss": {"objective": "policy_gradient"}, "schedule": {"steps": 4}},
        {
            "name": "second",
            "data": {"path": "sub/../prompts.jsonl", "shuffle": False},
            "loss": {"objective": "full_vocabulary"},
            "schedule": {"steps": 2},
        },
    ],
    "evaluation": {"data": {"path": "heldout.jsonl"}},
}


def write(folder: Path, job: Any, name: str = "job.yaml") -> Path:
    (folder / "sub").mkdir(exist_ok=True)
    for prompts in ("prompts.jsonl", "heldout.jsonl"):
        (folder / prompts).write_text('{"prompt": "Hello"}\n')
    path = folder / name
    path.write_text(json.dumps(job) if name.endswith(".json") else yaml.safe_dump(job))
    return path


def changed(**values: Any) -> dict[str, Any]:
    """JOB with fields replaced: `stages__0__schedule__steps=0`."""
    job = copy.deepcopy(JOB)
    for where, value in values.items():
        *parents, last = where.split("__")
        node: Any = job
        for part in parents:
            node = node[int(part)] if part.isdigit() else node[part]
        node[last] = value
    return job


def refusal(folder: Path, job: Any) -> CliError:
    with pytest.raises(CliError) as caught:
        jobfile.load(write(folder, job))
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value


@pytest.mark.parametrize("name", ["job.yaml", "job.json"])
def test_prompts_are_uploaded_once_and_replaced_by_their_id(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    path = write(folder, JOB, name)
    monkeypatch.chdir(tmp_path)  # paths are relative to the job file, not to where one stands
    sent: list[Path] = []

    def send(prompts: Path) -> str:
        sent.append(prompts)
        return f"file_{prompts.stem}00"

    job_file = jobfile.load(path)
    ready = job_file.upload(send)
    assert sent == [folder / "prompts.jsonl", folder / "heldout.jsonl"]
    assert ready["stages"][0]["data"] == {"file": "file_prompts00"}
    assert ready["stages"][1]["data"] == {"file": "file_prompts00", "shuffle": False}
    assert ready["evaluation"]["data"] == {"file": "file_heldout00"}
    assert job_file.document["stages"][0]["data"] == {"path": "prompts.jsonl"}, "the input stays as it was"
    assert JobSpec.model_validate(ready).name == "from the file"


def test_name_overrides_the_file(tmp_path: Path) -> None:
    assert jobfile.load(write(tmp_path, JOB), name="mine").upload(lambda _: "file_00000000")["name"] == "mine"


def test_inline_rows_need_no_upload(tmp_path: Path) -> None:
    job = changed(
        stages__0__data={"rows": [{"prompt": "Hi"}]}, stages__1__data={"file": "file_12345678"}, evaluation={}
    )
    job_file = jobfile.load(write(tmp_path, job))
    assert job_file.uploads == {}
    assert job_file.upload(lambda _: pytest.fail("nothing to send")) == job


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"stages__0__schedule__steps": 0},
            "stages.0.schedule.steps: 0 is out of range; use a value >= 1",
        ),
        ({"stages__0__schedule__stepps": 4}, "stages.0.schedule.stepps: unknown key 'stepps'; did you mean 'steps'?"),
        (
            {"stages__0__loss__advantage_clip": -1},
            "stages.0.loss.advantage_clip: -1 is out of range; use a value > 0",
        ),
        ({"stages__0__loss": {"objective": "magic"}}, "stages.0.loss.objective: unknown value"),
        ({"student": {}}, "student.model: is required; add it"),
        ({"samplers": {"min": 3, "max": 1}}, "samplers.max 1 is below samplers.min 3"),
        ({"stages__0__data__path": "nowhere.jsonl"}, "stages.0.data.path: "),
        ({"stages__0__data__path": 7}, "stages.0.data.path: must be the name of a JSONL file, got 7"),
        ({"stages__0__data__rows": []}, "stages.0.data: give exactly one of 'path', 'file' and 'rows'"),
        ({"stages": {"not": "a list"}}, "stages: Input should be a valid tuple"),
    ],
)
def test_every_refusal_names_the_field(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    error = refusal(tmp_path, changed(**change))
    assert expected in error.message
    assert "job.yaml" in error.message


def test_all_problems_are_shown_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, changed(stages__0__schedule__steps=0, student={}, colour="red")).message
    assert "has 3 problems" in message
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "student.model",
        "stages.0.schedule.steps",
        "colour",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "must hold `key: value` lines, got list"), ("", "got NoneType")],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(CliError, match=expected):
        jobfile.load(path)
    with pytest.raises(CliError, match=r"cannot read .*No such file"):
        jobfile.load(tmp_path / "none.yaml")
    (tmp_path / "job.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CliError, match="not UTF-8"):
        jobfile.load(tmp_path / "job.bin")


def test_empty_prompts_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, JOB)
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(CliError, match=r"stages.0.data.path: .* is empty"):
        jobfile.load(path)

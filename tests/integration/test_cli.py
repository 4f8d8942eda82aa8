"""Every verb of the command, against a real gateway and a job that really ran: tables, --json, errors, exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli_kit import Deployment, Shell, deployment
from tests.cluster import Cluster, job_spec
from tests.conftest import start_valkey, stop_valkey
from tests.waiting import wait_until

WORDS = {"prompts": ("one", "two", "three"), "heldout": ("four", "five")}


def models(made: Cluster) -> None:
    made.add_model("student", seed=1)
    made.add_model("teacher", seed=2)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    process, url = start_valkey(tmp_path_factory.mktemp("valkey"))
    try:
        with deployment(tmp_path_factory.mktemp("home"), url, "sampler", "teacher", "trainer", prepare=models) as made:
            yield made
    finally:
        stop_valkey(process)


@pytest.fixture(scope="module")
def stillhouse(deployed: Deployment) -> Shell:
    return deployed.shell


def write_job(folder: Path, **changes: Any) -> Path:
    """A job file with its prompts in files beside it."""
    spec = job_spec(**{"name": "tiny", "stages__0__loss": {"objective": "policy_gradient"}, **changes})
    for name, words in WORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'prompt': f'say {word}'})}\n" for word in words))
    spec["stages"][0]["data"] = {"path": "prompts.jsonl"}
    spec["evaluation"] = {"data": {"path": "heldout.jsonl"}, "max_tokens": 8}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module")
def job(stillhouse: Shell, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that ran to its end, submitted and watched by the command."""
    said = stillhouse("submit", str(write_job(tmp_path_factory.mktemp("job"))), "--watch")
    assert "uploaded prompts.jsonl: 3 rows" in said.out
    assert "step 4/4" in said.out
    assert "succeeded after 4 steps; held-out reverse KL" in said.out
    return next(line.split()[0] for line in said.out.splitlines() if line.startswith("job_"))


def test_the_list_filters_and_the_job_shows_all(stillhouse: Shell, job: str) -> None:
    assert job in stillhouse("jobs").out
    assert job in stillhouse("jobs", "--status", "succeeded", "--oldest-first").out
    assert stillhouse("jobs", "--status", "failed").out == "no such jobs\n"
    assert job in [one["id"] for one in stillhouse("jobs", "--json").json()]
    shown = stillhouse("job", job).out
    for part in ("tiny", "succeeded", "4/4", "held out", "checkpoints", "ckpt_export", "tester"):
        assert part in shown, shown
    assert stillhouse("show", job, "--json").json()["evaluations"][0]["step"] == 0
    assert "status" in stillhouse("jobs", "--status", "odd", code=2).err


def test_what_happened(stillhouse: Shell, job: str) -> None:
    types = [event["type"] for event in stillhouse("events", job, "--json").lines()]
    assert len(stillhouse("events", job, "--follow").out.splitlines()) == len(types)
    assert types == [event["type"] for event in stillhouse("events", job, "--json", "--follow").lines()]
    assert "evaluation" in types
    assert stillhouse("dead-letters", job).out == f"{job} has given up no sample\n"
    assert stillhouse("dead-letters", "retry", job, "--json").json() == []
    assert stillhouse("dead-letters", "ls", job, "--json").json() == []
    lines = stillhouse("logs", job, "--service", "trainer", "--json").lines()
    assert {line["service"] for line in lines} <= {"trainer"}
    assert len(stillhouse("logs", job, "-n", "2").out.splitlines()) <= 2


def test_what_was_measured(stillhouse: Shell, job: str) -> None:
    table = stillhouse("metrics", job).out
    assert "loss/reverse_kl/mean" in table
    assert "1-2" in stillhouse("metrics", job, "--points", "2").out, "two steps a row"
    points = stillhouse("metrics", job, "--names", "lr,loss/total", "--from", "2", "--to", "3", "--json").lines()
    assert [(point["step"], set(point["values"])) for point in points] == [
        (2, {"lr", "loss/total"}),
        (3, {"lr", "loss/total"}),
    ]
    assert "staleness/max" in stillhouse("metrics", job, "--names", "all").out
    assert "--names all" in stillhouse("metrics", job, "--names", "los", code=2).err
    evaluations = stillhouse("evaluations", job, "--json").json()
    assert [found["step"] for found in evaluations] == [0, 4]
    assert "reverse KL" in stillhouse("evaluations", job).out


def test_the_report_is_text_a_page_and_json(stillhouse: Shell, job: str, tmp_path: Path) -> None:
    text = stillhouse("report", job).out
    for part in ("held out", "reverse_kl", "before", "teacher", "report.html"):
        assert part in text, text
    assert stillhouse("report", job, "--json").json()["job_id"] == job
    stillhouse("report", job, "-o", str(tmp_path / "report.html"))
    assert "<html" in (tmp_path / "report.html").read_text()[:500].lower()
    stillhouse("report", job, "-o", str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text())["job_id"] == job
    assert ".html or .json" in stillhouse("report", job, "-o", str(tmp_path / "report.txt"), code=2).err


def test_samples_are_readable_without_colours_and_coloured_on_a_terminal(stillhouse: Shell, job: str) -> None:
    (first, *_) = samples = stillhouse("samples", job, "--step", "2", "--json").lines()
    assert {sample["step"] for sample in samples} == {2}
    plain = stillhouse("samples", job, "--step", "2", "--limit", "1", "--top", "2").out
    assert f"sample {first['id']}  step 2" in plain
    assert "\x1b" not in plain
    assert "in nats" in plain.splitlines()[0]
    kls = [token["kl"] for token in first["tokens"]]
    marked = sum(abs(kl) >= 1 for kl in kls)
    largest = max(kls, key=abs)
    assert f"{largest:+.2f}" in plain
    assert plain.count("]") >= marked
    assert "no such sample" in stillhouse("samples", job, "--step", "99").out


def test_checkpoints_are_listed_marked_deleted_and_fetched(stillhouse: Shell, job: str, tmp_path: Path) -> None:
    found = stillhouse("checkpoints", job, "--json").json()
    assert found[-1]["id"] == "ckpt_export"
    first = found[0]["id"]
    assert first in stillhouse("checkpoints", "ls", job).out
    stillhouse("checkpoints", "best", job, first)
    (marked,) = (one for one in stillhouse("checkpoints", job, "--json").json() if one["id"] == first)
    assert marked["is_pinned"]
    assert "best, kept" in stillhouse("checkpoints", job).out
    assert not stillhouse("checkpoints", "best", job, first, "--undo", "--json").json()["is_pinned"]
    assert "say so with --yes" in stillhouse("checkpoints", "delete", job, first, code=2).err
    said = stillhouse("download", job, "-o", str(tmp_path / "student"))
    assert "use it in jobs" in said.out
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert "exists already" in stillhouse("download", job, "-o", str(tmp_path / "student"), code=2).err
    one = stillhouse("download", job, "-o", str(tmp_path / "one.tar"), "--checkpoint", first, "--json").json()
    assert one["size_bytes"] == (tmp_path / "one.tar").stat().st_size
    stillhouse("download", job, "-o", str(tmp_path / "none"), "--checkpoint", "ckpt_1-00000009-00000000", code=1)


def test_files(stillhouse: Shell, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    file = stillhouse("files", "upload", str(prompts), "--json").json()
    assert f"file: {file['id']}" in stillhouse("files", "upload", str(prompts)).out
    assert file["id"] in stillhouse("files").out
    assert "2" in stillhouse("files", "get", file["id"]).out
    assert stillhouse("files", "get", file["id"], "-o", "-").out == prompts.read_text()
    stillhouse("files", "get", file["id"], "-o", str(tmp_path / "back.jsonl"))
    assert (tmp_path / "back.jsonl").read_text() == prompts.read_text()
    assert "exists already" in stillhouse("files", "get", file["id"], "-o", str(prompts), code=2).err
    prompts.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert "line 2" in stillhouse("files", "upload", str(prompts), code=2).err
    assert stillhouse("files", "delete", file["id"], "--yes", "--json").json() == {"id": file["id"], "is_deleted": True}
    assert "not_found" in stillhouse("files", "get", file["id"], code=1).err


def test_the_deployment(stillhouse: Shell, deployed: Deployment) -> None:
    table = stillhouse("services").out
    for instance in ("sampler-0", "teacher-0", "trainer-0"):
        assert instance in table
    assert {one["role"] for one in stillhouse("services", "--json").json()["services"]} == {
        "sampler",
        "teacher",
        "trainer",
    }
    assert "teacher" in stillhouse("models", "ls").out
    elsewhere = stillhouse("models", "ls", "--json", env=stillhouse.from_elsewhere()).json()
    assert {one["id"] for one in elsewhere} == {"student", "teacher"}


def test_keys_are_made_shown_once_and_revoked(stillhouse: Shell, job: str) -> None:
    assert "admin" in stillhouse("keys", "me").out
    made = stillhouse("keys", "create", "reader", "--limit", "active_jobs=2", "--json").json()
    assert made["limits"]["active_jobs"] == 2
    listed = stillhouse("keys").out
    assert "reader" in listed
    assert made["key"] not in listed
    theirs = stillhouse.from_elsewhere() | {"STILLHOUSE_API_KEY": made["key"]}
    assert stillhouse("keys", "me", "--json", env=theirs).json()["owner"] == "reader"
    assert job not in stillhouse("jobs", env=theirs).out, "others' jobs do not exist"
    assert "no job" in stillhouse("job", job, code=1, env=theirs).err
    assert "no job" in stillhouse("chat", job, "-m", "hello", code=1, env=theirs).err
    assert "admin" in stillhouse("keys", code=1, env=theirs).err
    assert "--limit active_jobs=2" in stillhouse("keys", "create", "x", "--limit", "2", code=2).err
    stillhouse("keys", "delete", "reader", "--yes")
    assert "unauthorized" in stillhouse("jobs", code=1, env=theirs).err


def test_a_model_writes_and_a_checkpoint_answers_beside_its_teacher(stillhouse: Shell, job: str) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "6")
    first = stillhouse("generate", "teacher", "-m", "hello", *greedy, "--json").json()
    said = stillhouse("generate", "teacher", "-m", "hello", *greedy)
    assert "--seed" in said.err
    assert (
        stillhouse("generate", "teacher", "--prompt", first["prompt"], *greedy, "--json").json()["data"]
        == first["data"]
    )
    (turn,) = stillhouse("chat", job, "-m", "hello", *greedy, "--json").lines()
    assert turn["teacher"]["data"] == first["data"]
    assert turn["student"]["model"] == f"{job}/ckpt_export"
    talk = stillhouse("chat", job, *greedy, "--json", stdin="hello\nand then?\n/reset\nhello\n/quit\nnever\n").lines()
    assert len(talk) == 3
    assert "and then?" in talk[1]["student"]["prompt"]
    assert talk[1]["student"]["prompt"].startswith(talk[0]["student"]["prompt"]), "it remembers"
    said = [[turn[name]["data"] for name in ("student", "teacher")] for turn in talk]
    assert said[2] == said[0], "and forgets"
    shown = stillhouse("chat", job, "-m", "hello", *greedy).out
    assert "student" in shown
    assert "teacher" in shown
    assert "teacher" not in stillhouse("chat", job, "-m", "hello", "--teacher", "-", *greedy).out
    assert "either a message or a prompt" in stillhouse("generate", "teacher", code=2).err
    assert "unknown model" in stillhouse("generate", "nobody", "-m", "x", code=1).err


@pytest.mark.full
def test_a_committed_checkpoint_is_made_a_model_on_the_gateways_machine(stillhouse: Shell, job: str) -> None:
    committed = stillhouse("checkpoints", job, "--json").json()[0]["id"]
    ask = ("generate", f"{job}/{committed}", "-m", "hello", "--max-tokens", "2")
    elsewhere = stillhouse.from_elsewhere()
    assert "is no model yet" in stillhouse(*ask, code=1, env=elsewhere).err
    assert f"making a model of {job}/{committed}" in stillhouse(*ask).err
    stillhouse(*ask, env=elsewhere)


def test_validate_says_what_is_wrong_first(stillhouse: Shell, tmp_path: Path) -> None:
    good = stillhouse("validate", str(write_job(tmp_path)))
    assert "in order:" in good.out
    assert "tokens      sampled" in good.out
    report = stillhouse("validate", str(write_job(tmp_path)), "--json").json()
    assert report["verdict"] in ("ok", "warning")
    bad = stillhouse("validate", str(write_job(tmp_path, teachers__main__model="nobody")), code=1)
    assert bad.out.splitlines()[0].startswith("✗ ")
    assert "nobody" in bad.out
    assert "fix: " in bad.out
    broken = write_job(tmp_path)
    broken.write_text("stages: 3")
    stillhouse("validate", str(broken), code=2)


def test_two_jobs_compared_and_on_one_figure(stillhouse: Shell, job: str, tmp_path: Path) -> None:
    path = write_job(tmp_path, stages__0__optimizer__lr=5e-4)
    other = stillhouse("submit", str(path), "--json").json()["id"]
    stillhouse("watch", other)
    found = stillhouse("compare", job, other, "--json").json()
    assert found["spec"] == {"stages.0.optimizer.lr": [1e-3, 5e-4]}
    assert found["held_out"]["reverse_kl"][0][0] == found["held_out"]["reverse_kl"][1][0], "both began alike"
    table = stillhouse("compare", job, other).out
    for part in ("stages.0.optimizer.lr", "reverse_kl", "sampled_tokens", "B / A"):
        assert part in table
    assert "both were asked for the same" in stillhouse("compare", job, job).out
    stillhouse("plot", job, other, "--names", "lr", "-o", str(tmp_path / "both.png"))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "--names all" in stillhouse("plot", job, "--names", "odd", "-o", str(tmp_path / "no.svg"), code=2).err


async def has_status(deployed: Deployment, job_id: str, status: str) -> bool:
    return (await deployed.cluster.ctx.jobs.get(job_id)).status == status


@pytest.mark.full
def test_a_job_is_steered(stillhouse: Shell, deployed: Deployment, job: str, tmp_path: Path) -> None:
    running = stillhouse("submit", str(write_job(tmp_path, stages__0__schedule__steps=5000)), "--json").json()["id"]
    deployed.run(deployed.cluster.at_step(running, 1))
    assert f"stillhouse resume {running}" in stillhouse("pause", running).out
    deployed.run(wait_until(lambda: has_status(deployed, running, "paused"), timeout_s=50, what="the pause"))
    assert running in stillhouse("jobs", "--status", "paused").out
    step = stillhouse("job", running, "--json").json()["progress"]["step"]
    assert stillhouse("resume", running, "--json").json()["id"] == running
    deployed.run(deployed.cluster.at_step(running, step + 1))
    assert stillhouse("cancel", running, "--json").json()["id"] == running
    stillhouse("watch", running, code=2)
    assert "error" in stillhouse("cancel", job, code=1).err


def test_the_shell_is_told_ids(stillhouse: Shell, job: str) -> None:
    from stillhouse.cli import completion

    for shell in completion.SHELLS:
        assert completion.VARIABLE in stillhouse("completion", shell).out
    assert "take bash, zsh or fish" in stillhouse("completion", "csh", code=2).err

    def proposed(words: str, place: int) -> str:
        ask = {completion.VARIABLE: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        return stillhouse(env=ask).out  # as the shell calls it: no arguments

    assert "checkpoints" in proposed("stillhouse che", 1)
    assert job in proposed("stillhouse watch job_", 2)
    assert "ckpt_export" in proposed(f"stillhouse checkpoints best {job} ck", 4)
    assert {"best", "delete", job} <= set(proposed("stillhouse checkpoints ", 2).split())
    assert "teacher" in proposed("stillhouse chat te", 2)
    assert f"{job}/ckpt_export" in proposed(f"stillhouse chat {job}/", 2)


def test_errors_name_the_fix(stillhouse: Shell, job: str) -> None:
    gone = "job_00000000000000000000"
    for command in (["job", gone], ["events", gone], ["metrics", gone], ["samples", gone], ["checkpoints", gone]):
        assert f"no job '{gone}'" in stillhouse(*command, code=1).err
    assert "cannot watch" in stillhouse("watch", gone, code=4).err
    refused = stillhouse("jobs", code=1, env=stillhouse.from_elsewhere() | {"STILLHOUSE_API_KEY": "wrong"})
    assert "fix: set STILLHOUSE_API_KEY" in refused.err
    for verb in ("cancel", "pause", "resume"):
        assert "conflict" in stillhouse(verb, job, code=1).err

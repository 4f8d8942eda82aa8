"""doctor, models, plot and healthcheck against real files and a real gRPC server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli import doctor, healthcheck, models, plot
from stillhouse.cli.console import CliError
from stillhouse.cli.deployment import Deployment
from stillhouse.core.config import Settings
from stillhouse.core.models import ModelRegistry
from stillhouse.core.rpc import Server
from tests.tiny import make_tiny_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_models_are_added_listed_replaced_and_forgotten(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    models.add("small", str(folder), "made by a test")
    assert capsys.readouterr().out.startswith("added small: ")
    models.add("small", str(folder), "")
    assert capsys.readouterr().out.startswith("unchanged small: ")
    models.show(as_json=True)
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "small"
    assert entry["path"] == str(folder.resolve())
    models.show(as_json=False)
    assert entry["sha256"][:12] in capsys.readouterr().out
    models.remove("small")
    assert models.registry().all() == {}
    assert folder.is_dir(), "its files stay"


def test_models_of_another_machine_are_listed_over_rest(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stillhouse.client.client import Models

    row = {"id": "far", "architecture": "A", "num_parameters": 7, "num_layers": 2, "size_bytes": 9}
    monkeypatch.setattr(Models, "list", lambda _: [{**row, "tokenizer_sha256": "t" * 64, "sha256": "s" * 64}])
    monkeypatch.setenv("STILLHOUSE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("STILLHOUSE_API_KEY", "k")
    models.show(as_json=False)
    assert "far" in capsys.readouterr().out
    with pytest.raises(CliError, match="STILLHOUSE_URL"):
        models.add("m", "/nowhere", "")


def test_torn_lines_of_a_history_are_skipped_and_spoil_no_others(tmp_path: Path) -> None:
    from stillhouse.core.blobs import append_jsonl, read_jsonl

    path = tmp_path / "events.jsonl"
    append_jsonl(path, [{"n": 1}])
    with path.open("ab") as stream:
        stream.write(b'{"n": 2, "tex')
    append_jsonl(path, [{"n": 3}, {"n": 4}])
    assert [line["n"] for line in read_jsonl(path)] == [1, 3, 4]


def test_doctor_finds_changed_models_and_names_the_command(home: Path, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    models.add("small", str(folder), "")
    deployment = Deployment(home)
    checks = {check.what: check for check in doctor.examine(deployment)}
    assert checks["model small"].verdict == "ok"
    assert checks["settings"].verdict == checks["home"].verdict == checks["protos"].verdict == "ok"
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    changed = {check.what: check for check in doctor.examine(deployment)}["model small"]
    assert changed.verdict == "warning"
    assert "config.json changed" in changed.detail
    assert changed.fix == f"stillhouse models add small {folder.resolve()}"


def test_doctor_fails_when_something_needed_is_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(doctor.REQUIRED, "no-such-package", "this test")
    with pytest.raises(CliError, match="no-such-package") as caught:
        doctor.doctor(Deployment(home), as_json=False)
    assert caught.value.exit_code == 1
    shown = capsys.readouterr().out
    assert "MISSING" in shown
    assert "pip install -e '.[local]'" in shown


def test_doctor_is_content_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(Deployment(home), as_json=True)
    findings = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["verdict"] == "ok"
    assert not [row for row in findings.values() if row["verdict"] == "missing"]


def points(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": 1,
            "values": {
                "loss/reverse_kl/mean": 1 / step,
                "loss/total": None if step == 3 else 2 / step,
                "lr": 1e-5,
                "sample/tokens_per_s": 230.0,
                "time/train_s": 2.0,
            },
        }
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_plot_draws_jobs_of_any_length(tmp_path: Path, steps: int) -> None:
    target = tmp_path / "curves.png"
    job = {"id": "job_1", "name": r"costs $5, not $\frac", "status": "running"}
    plot.plot([plot.make_run(job, points(steps), [])], target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size > 20_000


def test_plot_draws_jobs_over_each_other_each_in_its_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    lines: list[tuple[str, str]] = []
    draw = Axes.plot

    def note(axes: Axes, *data: Any, **look: Any) -> Any:
        lines.append((axes.get_title(), look["color"]))
        return draw(axes, *data, **look)

    monkeypatch.setattr(Axes, "plot", note)
    runs = [plot.make_run({"id": f"job_{n}", "status": "succeeded"}, points(5 + n), []) for n in range(2)]
    plot.plot(runs, tmp_path / "both.png", ["lr", "time/train_s"])
    assert len(lines) == 4
    assert len({colour for _, colour in lines}) == 2
    with pytest.raises(CliError, match="no step has the metric 'odd'"):
        plot.plot(runs, tmp_path / "none.png", ["odd"])


def test_plot_draws_every_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[str, ...]] = {}
    draw = plot._draw
    monkeypatch.setattr(
        plot,
        "_draw",
        lambda axes, panel, picture: (drawn.update({panel.title: panel.curves}), draw(axes, panel, picture)),
    )
    steps = points(30)
    for point in steps:
        for number in range(12):
            name = f"teacher-{number}"
            point["values"] |= {f"loss/reverse_kl/{name}": 1.0 * number, f"tokens/share/{name}": 1 / 12}
        point["values"]["reward/mean"] = 0.5
    by_teacher = {"teacher-0": {"reverse_kl": 1.0, "accuracy": 0.5}, "teacher-1": {"reverse_kl": 2.0}}
    evaluations = [{"step": step, "reverse_kl": 1.5, "accuracy": 0.5, "by_teacher": by_teacher} for step in (0, 30)]
    plot.plot([plot.make_run({"id": "job_1", "status": "succeeded"}, steps, evaluations)], tmp_path / "curves.png")
    assert len(drawn["reverse KL by teacher"]) == 13, "and their mean"
    assert len(drawn["share of the trained tokens"]) == 12
    assert [label for _, label in drawn["held-out accuracy"]] == ["mean", "teacher-0"]
    assert [label for _, label in drawn["held-out reverse KL"]] == ["mean", "teacher-0", "teacher-1"]
    assert {"reward", "loss"} <= drawn.keys()
    assert "reward by teacher" not in drawn


def test_plot_explains_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="no finished step"):
        plot.make_run({"id": "job_1", "status": "queued"}, [], [])
    with pytest.raises(CliError, match="cannot write"):
        plot.plot([plot.make_run({"id": "job_1", "status": "running"}, points(2), [])], tmp_path / "curves.docx")


def test_running_mean_ignores_gaps_and_keeps_constants() -> None:
    assert plot.running_mean([2.0, math.nan, 2.0, 2.0], 1) == [2.0, 2.0, 2.0, 2.0]
    assert plot.running_mean([0.0, 3.0, 6.0], 1) == [1.5, 3.0, 4.5]
    assert math.isnan(plot.running_mean([math.nan], 1)[0])


async def test_healthcheck_asks_a_real_server(home: Path) -> None:
    import asyncio

    server = Server(Settings(internal_token="t" * 16).resolved())
    server.add(lambda servicer, server: None, None, "stillhouse.v1.Sampler")
    address = await server.start()
    try:
        assert await asyncio.to_thread(healthcheck.check, address, "", 5.0) == "SERVING"
        with pytest.raises(CliError, match="is NOT_SERVING"):
            await asyncio.to_thread(healthcheck.check, address, "stillhouse.v1.Sampler", 5.0)
        await server.set_ready(True)
        assert await asyncio.to_thread(healthcheck.check, address, "stillhouse.v1.Sampler", 5.0) == "SERVING"
        with pytest.raises(CliError, match="does not know"):
            await asyncio.to_thread(healthcheck.check, address, "stillhouse.v1.Nothing", 5.0)
    finally:
        await server.stop(0.1)


def test_registry_of_the_command_is_the_one_of_the_services(home: Path, tmp_path: Path) -> None:
    models.add("small", str(make_tiny_model(tmp_path / "tiny")), "")
    assert ModelRegistry(home / "models.yaml").get("small").name == "small"

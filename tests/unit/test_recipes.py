"""Recipes: what their files promise, how a preset goes under what a user writes, what the command line makes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stillhouse.cli import jobfile
from stillhouse.cli.console import EXIT_USAGE, CliError
from stillhouse.cli.jobtemplate import job_file
from stillhouse.cli.recipes import init, show
from stillhouse.core.blobs import Artifacts
from stillhouse.core.checkpoints import Models
from stillhouse.core.models import inspect_model
from stillhouse.core.recipes import FOLDER, Setting, described, find_preset, presets, recipes, with_preset
from stillhouse.core.spec import JobSpec, StageSpec
from stillhouse.gateway.auth import Caller
from stillhouse.gateway.reach import Reach
from stillhouse.gateway.validation import preflight
from tests.gateway_kit import make_model

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {key: preset for name in recipes() for key, preset in presets(name).items()}
VARIATIONS = [(key, number) for key, preset in PRESETS.items() for number in range(len(preset.variations))]
NAMES = (
    "thinking_machines qwen3/off_policy qwen3/on_policy glm5 mimo_v2 mopd deepseek_v4 gkd opsd recovery sft seq_kd grpo"
)


def leaves(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part] if isinstance(tree, Mapping) else getattr(tree, part)
    return tree


def minimal(key: str, **changes: Any) -> dict[str, Any]:
    """The least that a stage with a preset says."""
    return {"recipe": key, "data": {"rows": list(PRESETS[key].rows)}, **changes}


def test_all_recipes_are_there() -> None:
    assert set(PRESETS) == set(NAMES.split())
    assert [name for name, recipe in recipes().items() if recipe.is_baseline] == ["grpo", "seq_kd", "sft"]


@pytest.mark.parametrize("key", PRESETS)
def test_a_preset_alone_makes_a_stage(key: str) -> None:
    stage = StageSpec.model_validate(minimal(key))
    for path, setting in PRESETS[key].values.items():
        found = at(stage, path)
        assert found == setting.value
        assert type(found) is type(setting.value), f"{path}: write {found!r}, the file has {setting.value!r}"
    assert stage.recipe == key
    assert not {path.partition(".")[0] for path in PRESETS[key].values} & {"name", "data", "recipe"}


@pytest.mark.parametrize(("key", "number"), VARIATIONS)
def test_variations_go_over_their_preset(key: str, number: int) -> None:
    variation = PRESETS[key].variations[number]
    stage = StageSpec.model_validate(
        minimal(key, **variation.stage, data={"rows": list(variation.rows or PRESETS[key].rows)})
    )
    for path, value in leaves(variation.stage):
        assert at(stage, path) == value


@pytest.mark.parametrize("name", recipes())
def test_every_value_has_a_source_that_the_recipe_names(name: str) -> None:
    recipe = recipes()[name]
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    settings = [setting for preset in raw["presets"].values() for setting in preset["values"].values()]
    assert len(settings) >= 8
    for setting in settings:
        assert setting.keys() == {"value", "source"}
        if not setting["source"].startswith("ours: "):
            assert setting["source"].partition(", ")[0] in recipe.sources, setting
    settings += [preset["mix"] for preset in raw["presets"].values() if "mix" in preset]
    cited = {setting["source"].partition(", ")[0] for setting in settings}
    assert recipe.is_baseline or cited & set(recipe.sources)


@pytest.mark.parametrize("source", ["", "somewhere", "ours", "ours: ", "arXiv:2306.13649", "arXiv:23, section 1"])
def test_a_value_without_a_proper_source_is_refused(source: str) -> None:
    with pytest.raises(ValidationError, match="source"):
        Setting(value=1, source=source)


def test_no_code_of_the_services_knows_a_recipe() -> None:
    names = "|".join(name for name in recipes() if name not in ("recovery", "sft", "grpo"))
    literal = re.compile(rf"""['"](?:{names})(?:/\w+)?['"]""")
    for file in (ROOT / "services").rglob("*.py"):
        assert not literal.search(file.read_text()), f"{file} names a recipe"


@pytest.mark.parametrize("key", PRESETS)
def test_what_the_user_writes_wins_value_by_value(key: str) -> None:
    mine = object()
    whole = PRESETS[key].stage()
    for path, value in leaves(whole):
        *sections, last = path.split(".")
        user: Any = {last: mine}
        for section in reversed(sections):
            user = {section: user}
        merged = with_preset({"recipe": key, **user})
        if path == "loss.objective":  # another loss: nothing of the preset's stays
            assert merged["loss"] == {"objective": mine}
            continue
        assert at(merged, path) is mine
        others = {other: value for other, value in leaves(whole) if other != path}
        assert {other: at(merged, other) for other in others} == others


@pytest.mark.parametrize("key", PRESETS)
def test_merging_again_changes_nothing(key: str) -> None:
    for stage in (minimal(key), minimal(key, loss={"objective": "top_k"}), minimal(key, schedule=None, name="x")):
        once = with_preset(stage)
        assert with_preset(once) == once
    assert PRESETS[key].stage() == find_preset(key).stage()
    once = with_preset(minimal(key))
    once["schedule"]["steps"] = -1
    assert find_preset(key).stage()["schedule"]["steps"] > 0, "a merge gives a stage of its own"


@pytest.mark.parametrize("key", PRESETS)
def test_a_stored_job_with_a_recipe_reads_as_it_was(key: str) -> None:
    routes = {row["teacher"] for row in PRESETS[key].rows if "teacher" in row} or {"main"}
    stages = [StageSpec.model_validate(minimal(key))]
    teachers = {name: {"model": "m"} for name in routes} if stages[0].needs_teacher() else {}
    job = JobSpec.model_validate({"student": {"model": "m"}, "teachers": teachers, "stages": [minimal(key)]})
    stored = job.model_dump(mode="json")
    assert job.stages[0] == stages[0]
    assert JobSpec.model_validate(stored) == job
    assert JobSpec.model_validate_json(json.dumps(stored)) == job
    assert stored["stages"][0]["recipe"] == key


def test_a_loss_of_another_objective_takes_nothing_of_the_presets() -> None:
    stage = StageSpec.model_validate(minimal("mopd", loss={"objective": "top_k"}))
    alone = StageSpec.model_validate({**stage.model_dump(), "recipe": None, "loss": {"objective": "top_k"}})
    assert stage.loss == alone.loss
    assert stage.schedule.prompts_per_step == 2048
    same = StageSpec.model_validate(minimal("mopd", loss={"objective": "policy_gradient", "advantage_clip": 2}))
    assert (at(same, "loss.advantage_clip"), at(same, "loss.ratio_gate")) == (2, "icepop")


def test_null_takes_a_value_back() -> None:
    stage = StageSpec.model_validate(minimal("mimo_v2", loss={"reward": None}, schedule={"group_size": 1}))
    assert at(stage, "loss.reward") is None
    assert at(stage, "loss.ratio_gate") == "icepop"


@pytest.mark.parametrize("stage", [None, [], {"loss": {}}, {"recipe": 3}, {"recipe": "nope"}, {"recipe": "../spec"}])
def test_what_names_no_preset_is_left_alone(stage: Any) -> None:
    assert with_preset(stage) is stage


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"recipe": "gdk"}, ["stages.0.recipe: unknown recipe 'gdk'; there are deepseek_v4, gkd, "]),
        ({"recipe": "gdk", "loss": {"beta": 0.3}}, ["stages.0.recipe: unknown recipe 'gdk'"]),
        (
            {"recipe": "qwen3"},
            ["stages.0.recipe: recipe 'qwen3' has a preset for each of its stages: name qwen3/off_policy or qwen3/on"],
        ),
        ({"recipe": "qwen3/both"}, ["stages.0.recipe: unknown preset 'qwen3/both': name qwen3/off_policy or qwen3/on"]),
        ({"recipe": "gkd/main"}, ["stages.0.recipe: unknown preset 'gkd/main': name gkd"]),
        ({"recipe": 7}, ["stages.0.recipe: Input should be a valid string"]),
        ({"recipe": "mopd", "loss": {"advantage_clip": -1}}, ["stages.0.loss.advantage_clip: -1 is out of range"]),
        ({"recipe": "mopd", "loss": {"clip": 1}}, ["stages.0.loss.clip: unknown key 'clip'; remove it"]),
        ({"recipe": "mopd", "schedule": {"steps": 0}}, ["stages.0.schedule.steps: 0 is out of range"]),
        (
            {"recipe": "glm5", "loss": {"ratio_gate": "is"}},
            ["stages.0.loss: 'gate_low' and 'gate_high' belong to tis, icepop and seq_mask, not to is; change it "],
        ),
        (
            {"recipe": "gkd", "loss": {"objective": "policy_gradient"}},
            ["stages.0: policy_gradient is taken over the student's own tokens; set on_policy_fraction to 1"],
        ),
    ],
)
def test_refusals_name_the_field_that_the_user_wrote(stage: dict[str, Any], expected: list[str]) -> None:
    document = {"student": {"model": "s"}, "teachers": {"t": {"model": "m"}}}
    document["stages"] = [{"data": {"rows": [{"prompt": "p"}]}, **stage}]
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(document)
    found = jobfile.describe(caught.value, document)
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
    is_contradiction = "ratio_gate" in str(stage) or "objective" in str(stage)  # with what the preset says
    origin = f"(what you did not write is from recipe '{stage['recipe']}')"
    assert found[0].endswith(origin) == is_contradiction


def filled_in(folder: Path, name: str) -> Path:
    """The job file that `init` writes, with models and prompts named as its comments say."""
    path = folder / f"{name}.yaml"
    init(name, path, is_forced=False)
    path.write_text(re.sub(r"YOUR-([A-Z-]+)", lambda found: found[1].lower(), path.read_text()))
    rows = [row for preset in recipes()[name].presets.values() for row in preset.rows]
    for file in ("prompts.jsonl", "heldout.jsonl"):
        (folder / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("name", recipes())
def test_a_new_job_file_is_accepted_once_models_and_prompts_are_named(tmp_path: Path, name: str) -> None:
    document = jobfile.load(filled_in(tmp_path, name)).document
    assert "YOUR" not in json.dumps(document)
    for stage, (key, preset) in zip(document["stages"], presets(name).items(), strict=True):
        assert stage["recipe"] == key
        written = {field: value for field, value in stage.items() if field not in ("name", "recipe", "data")}
        assert written == preset.stage()
        assert dict(leaves(written)) == {path: setting.value for path, setting in preset.values.items()}


@pytest.mark.parametrize("name", recipes())
def test_the_gateway_accepts_it_too(tmp_path: Path, name: str) -> None:
    document = jobfile.load(filled_in(tmp_path, name)).document
    models = Models(tmp_path / "models.yaml", Artifacts(tmp_path / "artifacts"))
    for model in {document["student"]["model"], *(each["model"] for each in document.get("teachers", {}).values())}:
        folder = make_model(tmp_path / "models" / model, max_length=8192)
        (folder / "chat_template.jinja").write_text("{{ messages }} {{ enable_thinking }}")
        models.add(inspect_model(model, folder))
    for stage, preset in zip(document["stages"], recipes()[name].presets.values(), strict=True):
        stage["data"] = {key: value for key, value in stage["data"].items() if key != "path"} | {"rows": preset.rows}
        held_out = [{**row, "prompt": f"Not trained on: {row['prompt']}"} for row in preset.rows]
        if "evaluation" in document:
            document["evaluation"]["data"] = {"rows": held_out}
    preflight(JobSpec.model_validate(document), models, Reach(models.artifacts, Caller("")))


@pytest.mark.parametrize("name", recipes())
def test_a_new_job_file_comments_every_value(name: str) -> None:
    text = job_file(name, recipes()[name])
    plain = " ".join(line.strip().removeprefix("#").strip() for line in text.splitlines())
    for preset in recipes()[name].presets.values():
        for setting in preset.values.values():
            assert " ".join(setting.source.split()) in plain
    assert "Fill in: your prompts" in text
    assert max(map(len, text.splitlines())) <= 160


def test_init_replaces_no_file_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("mine")
    with pytest.raises(CliError, match="exists") as caught:
        init("gkd", path, is_forced=False)
    assert (caught.value.exit_code, path.read_text()) == (EXIT_USAGE, "mine")
    assert "--force" in caught.value.fix
    init("gkd", path, is_forced=True)
    capsys.readouterr()
    init("gkd", Path("-"), is_forced=False)
    assert capsys.readouterr().out == path.read_text()
    with pytest.raises(CliError, match=r"cannot write .*No such file"):
        init("gkd", tmp_path / "none" / "job.yaml", is_forced=False)
    with pytest.raises(CliError, match="unknown recipe 'qwen'; there are deepseek_v4") as caught:
        init("qwen", path, is_forced=True)
    assert caught.value.exit_code == EXIT_USAGE


def test_the_command_shows_all_and_explains_one(capsys: pytest.CaptureFixture[str]) -> None:
    show("", as_json=False)
    table = capsys.readouterr().out
    assert all(key in table for key in PRESETS)
    assert "doi:10.64434/tml.20251026" in table
    show("qwen3", as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    for expected in ("recipe: qwen3/off_policy", "recipe: qwen3/on_policy", "enable_thinking", "loss.divergence"):
        assert expected in text
    assert "ours: the direction is not published" in text
    show("mopd", as_json=True)
    assert json.loads(capsys.readouterr().out) == described("mopd")
    show("", as_json=True)
    assert [item["id"] for item in json.loads(capsys.readouterr().out)] == list(recipes())
    with pytest.raises(CliError, match="unknown recipe 'qwen3/on_policy'"):
        show("qwen3/on_policy", as_json=False)


def test_examples_use_the_recipe_whose_name_they_have() -> None:
    folders = [folder for folder in (ROOT / "examples").iterdir() if folder.name in recipes()]
    assert {folder.name for folder in folders} == recipes().keys() - {"sft", "seq_kd", "grpo"}
    for folder in folders:
        jobs = [yaml.safe_load(file.read_text()) for file in folder.glob("*.yaml")]
        used = {stage.get("recipe", "").partition("/")[0] for job in jobs for stage in job["stages"]}
        assert folder.name in used, folder


def test_the_wheel_takes_the_files_along() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    core = FOLDER.parent
    packed = {path for pattern in patterns["stillhouse.core"] for path in core.glob(pattern)}
    assert set(FOLDER.iterdir()) <= packed
    assert len(packed) == len(recipes())


def test_the_page_about_recipes_is_current() -> None:
    script = ROOT / "scripts" / "recipe-docs"
    answer = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr

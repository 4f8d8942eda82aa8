"""Recipes as data: the settings that published methods use, each with its source, for `recipe: NAME` in a stage.

A recipe is a YAML file in the folder `recipes` beside this module. It has one preset for each of its stages; `gkd`
names the preset of a recipe with one, `qwen3/on_policy` one of several. A preset is the values of a part of a stage and
nothing else: they stand where the user's stage says nothing. No code of any service knows a recipe.

Nothing here is taken away again: stored jobs name their presets, and reading one looks them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator

from stillhouse.core.errors import NotFoundError
from stillhouse.core.spec_base import Closed, Name

FOLDER: Final = Path(__file__).with_suffix("")
Source = Annotated[str, Field(pattern=r"^(arXiv:\d{4}\.\d{5}, |doi:10\.\d+/\S+, |code: \S+ at [0-9a-f]{7}, |ours: )\S")]
"""Publication and place in it, or `ours: ` and the reason."""
_FROM_PRESETS: Final = ("loss", "schedule")
"""Fields of a stage that every preset has, so that they need not be written beside one."""


class Setting(Closed):
    """One value, and where it is from."""

    value: bool | int | float | str
    """As in a job."""
    source: Source
    """Where it is from."""


class Mix(Closed):
    """Shares of the teachers' prompts, for a new job file: only the user's job has teachers to give them to."""

    shares: dict[Name, float]
    """By teacher, as `data.mix` takes them."""
    source: Source
    """Where they are from."""


class Variation(Closed):
    """Another form of a preset that its source has, or that is worth knowing."""

    about: str
    """What it is."""
    stage: dict[str, Any] = Field(default_factory=dict)
    """What a stage says beside `recipe`; nothing where only rows differ."""
    rows: tuple[dict[str, Any], ...] = ()
    """Rows that it needs, where they differ from the preset's."""


class Preset(Closed):
    """What a recipe gives one stage."""

    about: str
    """What happens in the stage."""
    rows: tuple[dict[str, Any], ...] = Field(min_length=1)
    """Rows of the kind it trains on."""
    mix: Mix | None = None
    """Shares of its teachers' prompts; none = as the rows come."""
    values: dict[str, Setting]
    """By path in the stage: `loss.objective`."""
    variations: tuple[Variation, ...] = ()
    """Other forms."""

    def stage(self) -> dict[str, Any]:
        """The values as a part of a stage; a new object each time."""
        return nested({path: setting.value for path, setting in self.values.items()})


class Slot(Closed):
    """A teacher that the user names."""

    about: str
    """Which model belongs here."""
    model: str
    """Stands in a new job file until the user's own is there."""


class Recipe(Closed):
    """A published method, or a baseline."""

    title: str
    """One line."""
    problem: str
    """What it is for."""
    sends: str
    """What teachers send and what is stored, in bytes a token."""
    when: str
    """When to choose it."""
    paper: str
    """What its source does, and reports."""
    ours: str
    """What the preset does."""
    differences: tuple[str, ...]
    """What differs, and why."""
    sources: tuple[str, ...]
    """Publications and code; none for a baseline."""
    is_baseline: bool = False
    """Something to compare with."""
    student: str = "The model that learns."
    """Which model is the student."""
    teachers: dict[Name, Slot]
    """Teachers as a new job file names them."""
    presets: dict[str, Preset] = Field(min_length=1)
    """By the name of the stage; `main` where there is one."""


def nested(paths: Mapping[str, Any]) -> dict[str, Any]:
    """{"loss.k": 8} as {"loss": {"k": 8}}."""
    tree: dict[str, Any] = {}
    for path, value in paths.items():
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return tree


@cache
def recipe_names() -> tuple[str, ...]:
    """All recipes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def _read(name: str) -> Recipe:
    return Recipe.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def recipe(name: str) -> Recipe:
    """A recipe.

    Raises:
        NotFoundError: there is none of this name.
    """
    if name not in recipe_names():
        raise NotFoundError(f"unknown recipe '{name}'; there are {', '.join(recipe_names())}")
    return _read(name)


def recipes() -> dict[str, Recipe]:
    """All recipes by name, baselines last."""
    found = {name: _read(name) for name in recipe_names()}
    return dict(sorted(found.items(), key=lambda item: item[1].is_baseline))


def presets(name: str) -> dict[str, Preset]:
    """Presets of a recipe by the name that `recipe:` in a stage takes."""
    found = recipe(name).presets
    return {name if len(found) == 1 else f"{name}/{stage}": preset for stage, preset in found.items()}


def find_preset(name: str) -> Preset:
    """The preset that `recipe: name` means.

    Raises:
        NotFoundError: it means none, with what there is.
    """
    family = name.partition("/")[0]
    known = presets(family)
    if name not in known:
        offered = " or ".join(known)
        if name == family:
            raise NotFoundError(f"recipe '{name}' has a preset for each of its stages: name {offered}")
        raise NotFoundError(f"unknown preset '{name}': name {offered}")
    return known[name]


def described(name: str) -> dict[str, Any]:
    """A recipe as JSON, for programs: its texts, and its presets with every value and its source."""
    found = recipe(name)
    facts = found.model_dump(mode="json", exclude={"presets", "student", "teachers"})
    stages = [
        {"id": key, **preset.model_dump(mode="json"), "stage": preset.stage()} for key, preset in presets(name).items()
    ]
    return {"id": name, "object": "recipe", **facts, "presets": stages}


def with_preset(stage: Any) -> Any:
    """A stage as a user wrote it, over the values of the preset that it names.

    Key by key: what the user wrote stays, null included. Lists are replaced whole, and so is a loss of another
    `objective`. What names no preset that there is comes back as it was; the check of the field says what is wrong.
    """
    if not isinstance(stage, Mapping) or not isinstance(stage.get("recipe"), str):
        return stage
    try:
        preset = find_preset(stage["recipe"])
    except NotFoundError:
        return stage
    return _over(preset.stage(), stage)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if _is_same_kind(below[key], above[key]):
            merged[key] = _over(below[key], above[key])
    return merged


def _is_same_kind(below: Any, above: Any) -> bool:
    """Two sections that go together: the settings of one objective mean nothing to another."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return False
    return above.get("objective", below.get("objective")) == below.get("objective")


def with_presets(job: Any) -> Any:
    """A job as a user wrote it, with the values that its stages take from presets."""
    stages = job.get("stages") if isinstance(job, Mapping) else None
    return {**job, "stages": [with_preset(stage) for stage in stages]} if isinstance(stages, list) else job


def named_in(job: Any, path: tuple[Any, ...]) -> str:
    """The recipe of the stage that a path in a job leads into; "" = there is none."""
    stages = job.get("stages") if isinstance(job, Mapping) else None
    if len(path) < 2 or path[0] != "stages" or not isinstance(stages, list):
        return ""
    stage = stages[path[1]] if isinstance(path[1], int) and path[1] < len(stages) else None
    name = stage.get("recipe") if isinstance(stage, Mapping) else None
    return name if isinstance(name, str) else ""


def _not_required(schema: dict[str, Any]) -> None:
    schema["required"] = [name for name in schema.get("required", ()) if name not in _FROM_PRESETS]


class FromRecipe(Closed):
    """A stage, as far as recipes are concerned."""

    model_config = ConfigDict(json_schema_extra=_not_required)

    recipe: str | None = Field(default=None, max_length=129)
    """Preset whose values stand where this stage says nothing, for example `gkd` or `qwen3/on_policy`
    (`stillhouse recipes`). `loss` and `schedule` may then be left out. A `loss` of another objective takes none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, stage: Any) -> Any:
        return with_preset(stage)

    @field_validator("recipe")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                find_preset(name)
            except NotFoundError as error:
                raise ValueError(error.message) from None
        return name

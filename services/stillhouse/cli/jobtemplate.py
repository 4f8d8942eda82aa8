"""The job file that `stillhouse init` writes: a recipe's values, each below its source, and what the user fills in."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final

import yaml

from stillhouse.core.recipes import Preset, Recipe, Setting, nested, presets

WIDTH: Final = 110
"""Columns, at most, unless an example needs more."""
STUDENT: Final = "YOUR-STUDENT"
"""Stands for the student until the user's own is there; recipes name it where the teacher is the same model."""


def job_file(name: str, recipe: Recipe) -> str:
    """A job of a recipe as commented YAML. It parses; its models and prompts are for the user to name."""
    lines = [*_head(name, recipe), "", *_models(recipe), "", "stages:"]
    for (key, preset), stage in zip(presets(name).items(), recipe.presets, strict=True):
        lines += [*_stage(stage, key, preset), ""]
    return "\n".join([*lines, *_evaluation(recipe)]).rstrip() + "\n"


def _head(name: str, recipe: Recipe) -> Iterator[str]:
    yield from _comment(recipe.title)
    for text in (recipe.problem, *(f"Differs from its source: {text}" for text in recipe.differences)):
        yield "#"
        yield from _comment(text)
    yield "#"
    yield from _comment(
        f"Made by `stillhouse init {name}`. Every value is the preset's: change what you like; what you delete comes "
        "back from `recipe:`. Sizes are for models of billions of weights. All fields: docs/configuration.md."
    )
    yield f"name: {name}"


def _models(recipe: Recipe) -> Iterator[str]:
    yield "student:"
    yield from _comment(f"Fill in (`stillhouse models ls`): {recipe.student}", 2)
    yield f"  model: {STUDENT}"
    if recipe.teachers:
        yield from ("", "teachers:")
        yield from _comment(
            "By names of your own. A model is a registered one, or a checkpoint of a job: docs/teachers.md.", 2
        )
    for name, slot in recipe.teachers.items():
        yield f"  {name}:"
        yield from _comment(f"Fill in: {slot.about}", 4)
        yield f"    model: {slot.model}"


def _stage(stage: str, key: str, preset: Preset) -> Iterator[str]:
    yield from _comment(preset.about, 2)
    yield f"  - name: {stage}"
    yield f"    recipe: {key}"
    yield "    data:"
    yield from _comment("Fill in: your prompts, beside this file. JSON lines, one row each, for example", 6)
    yield from (f"      # {json.dumps(row, ensure_ascii=False)}" for row in preset.rows)
    yield "      path: prompts.jsonl"
    if preset.mix is not None:
        yield from _comment(preset.mix.source, 6)
        yield f"      mix: {{{', '.join(f'{name}: {scalar(share)}' for name, share in preset.mix.shares.items())}}}"
    yield from _values(nested(dict(preset.values)), 4)
    for variation in preset.variations:
        yield from _comment(f"Or: {variation.about}", 4)
        yield from (f"    #   {line}" for line in _block(variation.stage))
        yield from (f"    # with rows like {json.dumps(row, ensure_ascii=False)}" for row in variation.rows)


def _values(tree: dict[str, Any], indent: int) -> Iterator[str]:
    """Settings by section, each below its source."""
    margin = " " * indent
    for key, node in tree.items():
        if isinstance(node, Setting):
            yield from _comment(node.source, indent)
            yield f"{margin}{key}: {scalar(node.value)}"
        else:
            yield f"{margin}{key}:"
            yield from _values(node, indent + 2)


def _evaluation(recipe: Recipe) -> Iterator[str]:
    rows = [row for preset in recipe.presets.values() for row in preset.rows]
    verifier = next((row["verifier"] for row in rows if "verifier" in row), None)
    if not recipe.teachers and verifier is None:
        return  # nothing that could be measured
    yield "evaluation:"
    yield "  data:"
    what = "The reverse KL to their teachers is measured on them." if recipe.teachers else "Greedy answers are judged."
    yield from _comment(f"Fill in: prompts that are not trained on. {what}", 4)
    yield "    path: heldout.jsonl"
    if not recipe.teachers:
        yield f"  verifier: {verifier}"


def scalar(value: Any) -> str:
    """A value as YAML reads it back: 2e-06 would be text."""
    return yaml.safe_dump(value).partition("\n")[0]


def _block(section: dict[str, Any]) -> list[str]:
    return yaml.safe_dump(section, sort_keys=False).splitlines() if section else []


def _comment(text: str, indent: int = 0) -> list[str]:
    margin = f"{' ' * indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)

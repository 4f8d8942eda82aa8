"""`stillhouse recipes`: what there is, and one recipe explained; `stillhouse init`: a job file to fill in."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, Final

from stillhouse.cli.console import EXIT_USAGE, CliError, print_json, print_table, say
from stillhouse.cli.jobtemplate import job_file, scalar
from stillhouse.core.errors import NotFoundError
from stillhouse.core.recipes import Preset, Recipe, described, presets, recipe, recipes
from stillhouse.core.spec import StageSpec

WIDTH: Final = 100
"""Columns of running text."""


def show(name: str, *, as_json: bool) -> None:
    """All recipes as a table, or one in full."""
    found = {name: _known(name)} if name else recipes()
    if as_json:
        answer = [described(name) for name in found]
        print_json(answer[0] if name else answer)
    elif name:
        _explain(name, found[name])
    else:
        columns = ("recipe:", "bytes a token", "what", "source")
        print_table(columns, [_row(name, item) for name, item in found.items()])
        say("\n`stillhouse recipes NAME` explains one, `stillhouse init NAME` writes a job file for it.")


def init(name: str, output: Path, *, is_forced: bool) -> None:
    """Write the job file of a recipe; `-` prints it."""
    text = job_file(name, _known(name))
    if str(output) == "-":
        print(text, end="")
        return
    try:
        with output.open("w" if is_forced else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        fix = "choose another name with -o, or replace it with --force"
        raise CliError(f"{output} exists", fix=fix, exit_code=EXIT_USAGE) from None
    except OSError as error:
        raise CliError(f"cannot write {output}: {error.strerror}", exit_code=EXIT_USAGE) from None
    say(f"wrote {output}: do what its comments say after 'Fill in', then\n  stillhouse submit {output} --watch")


def _known(name: str) -> Recipe:
    try:
        return recipe(name)
    except NotFoundError as error:
        fix = "`stillhouse recipes` lists them; a job file holds all stages of a recipe" if "/" in name else ""
        raise CliError(error.message, fix=fix, exit_code=EXIT_USAGE) from None


def _row(name: str, item: Recipe) -> tuple[str, ...]:
    found = presets(name)
    return "\n".join(found), "\n".join(sent(key, preset) for key, preset in found.items()), item.title, _sources(item)


def sent(key: str, preset: Preset) -> str:
    """What the teacher sends of each token, bytes; D is its width."""
    loss = StageSpec.model_validate({"recipe": key, "data": {"rows": preset.rows}}).loss
    return {"none": "0", "sampled": "4", "top_k": f"8 x {getattr(loss, 'k', 0)}", "hidden": "2 D"}[loss.payload()]


def _explain(name: str, item: Recipe) -> None:
    say(f"{item.title}\n{_sources(item)}\n")
    texts = {"for": item.problem, "when": item.when, "sends": item.sends, "source": item.paper, "here": item.ours}
    for label, text in texts.items():
        _paragraph(label, text)
    for text in item.differences:
        _paragraph("differs", text)
    for key, preset in presets(name).items():
        say(f"\nrecipe: {key}\n  {preset.about}\n")
        values = preset.values.items()
        print_table(("value", "", "from"), [(path, scalar(setting.value), setting.source) for path, setting in values])
        _explain_use(preset)
    say(f"\n`stillhouse init {name}` writes a job file with these values.")


def _explain_use(preset: Preset) -> None:
    say("\n  rows like")
    for row in preset.rows:
        say(f"    {json.dumps(row, ensure_ascii=False)}")
    if preset.mix is not None:
        say("")
        _paragraph("mix", f"{_flow(preset.mix.shares)}, {preset.mix.source}")
    for variation in preset.variations:
        say("")
        _paragraph("or", variation.about)
        if variation.stage:
            say(f"          {_flow(variation.stage)}")
        for row in variation.rows:
            say(f"          rows like {_flow(row)}")


def _paragraph(label: str, text: str) -> None:
    say(textwrap.fill(text, WIDTH, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10))


def _flow(stage: dict[str, Any]) -> str:
    """A part of a stage on one line."""
    return json.dumps(stage, ensure_ascii=False)


def _sources(item: Recipe) -> str:
    return ", ".join(item.sources) or "baseline"

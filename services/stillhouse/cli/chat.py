"""`stillhouse generate` and `stillhouse chat`: what a model, or a checkpoint next to its teacher, has to say."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from stillhouse.cli import models
from stillhouse.cli.console import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    CliError,
    console,
    number,
    print_error,
    print_json,
    print_json_line,
    printable,
    say,
)
from stillhouse.client.client import Client
from stillhouse.client.errors import ApiError
from stillhouse.core.checkpoints import parse
from stillhouse.core.errors import StillhouseError
from stillhouse.core.schemas import Generation
from stillhouse.core.spec_base import STAGE_PREFIX

if TYPE_CHECKING:
    from rich.console import RenderableType

NO_TEACHER: Final = "-"
COLUMNS_FROM: Final = 100
"""Columns of a terminal in which two answers stand side by side."""
HELP: Final = "Say something. /reset forgets what was said, /quit or Ctrl-D ends."


@dataclass(slots=True)
class Speaker:
    """A model and what was said with it: each goes on with its own answers."""

    name: str
    """What people call it."""
    model: str
    said: list[dict[str, str]] = field(default_factory=list)


def generate(
    model: str, message: str, prompt: str, system: str, n: int, options: Mapping[str, Any], *, as_json: bool
) -> None:
    """Have a model write once."""
    if bool(message) == bool(prompt):
        raise CliError("give either a message or a prompt", fix="-m 'Why is the sky blue?'", exit_code=EXIT_USAGE)
    source: dict[str, Any] = {"prompt": prompt} if prompt else {"messages": [*_opening(system), _user(message)]}
    with Client() as client:
        found = _ask(client, model, n=n, **source, **options)
    if as_json:
        print_json(found)
        return
    for text in found.data:
        say(printable(text.text))
        if n > 1:
            say("")
    facts = [f"{text.num_tokens} tokens ({text.finish_reason}), {number(text.logprob)} nats" for text in found.data]
    print(f"{found.model}: {'; '.join(facts)}; again with --seed {found.seed}", file=sys.stderr)


def chat(model: str, message: str, teacher: str, system: str, options: Mapping[str, Any], *, as_json: bool) -> None:
    """Ask both, once or until the end of the input."""
    with Client() as client:
        speakers = [Speaker("student" if parse(model) else model, model)]
        beside = teacher or _teacher_of(client, model)
        if beside and beside != NO_TEACHER:
            speakers.append(Speaker("teacher", beside))
        for speaker in speakers:
            speaker.said = _opening(system)
        if message:
            _turn(client, speakers, message, options, as_json=as_json)
        else:
            _converse(client, speakers, system, options, as_json=as_json)


def _converse(
    client: Client, speakers: Sequence[Speaker], system: str, options: Mapping[str, Any], *, as_json: bool
) -> None:
    is_person = sys.stdin.isatty() and not as_json
    if is_person:
        with suppress(ImportError):
            import readline  # noqa: F401  (importing it gives `input` arrow keys and a history)
        say(f"{' and '.join(f'{speaker.name} ({speaker.model})' for speaker in speakers)}. {HELP}")
    try:
        while True:
            said = input("\nyou> " if is_person else "").strip()
            if said in ("/quit", "/exit"):
                return
            if said == "/reset":
                for speaker in speakers:
                    speaker.said = _opening(system)
            elif said:
                try:
                    _turn(client, speakers, said, options, as_json=as_json)
                except StillhouseError as error:
                    if not is_person:
                        raise
                    print_error(error.message)  # a person says it again, or something shorter
    except EOFError:
        return
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _turn(client: Client, speakers: Sequence[Speaker], said: str, options: Mapping[str, Any], *, as_json: bool) -> None:
    """The same words to all, at the same time; a conversation that failed stays as it was."""
    asked = [[*speaker.said, _user(said)] for speaker in speakers]
    with ThreadPoolExecutor(len(speakers)) as pool:
        calls = [
            pool.submit(_ask, client, speaker.model, messages=messages, **options)
            for speaker, messages in zip(speakers, asked, strict=True)
        ]
        answers: list[Generation] = [call.result() for call in calls]
    for speaker, messages, answer in zip(speakers, asked, answers, strict=True):
        speaker.said = [*messages, {"role": "assistant", "content": answer.data[0].text}]
    if as_json:
        print_json_line({speaker.name: answer.to_dict() for speaker, answer in zip(speakers, answers, strict=True)})
    else:
        console().print(_beside(speakers, answers))


def _beside(speakers: Sequence[Speaker], answers: Sequence[Generation]) -> RenderableType:
    """Two columns where there is room, else one below the other."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colours = ("cyan", "magenta")
    heads = [Text(speaker.name, f"bold {colour}") for speaker, colour in zip(speakers, colours, strict=False)]
    texts = [Text(printable(answer.data[0].text).strip() + _cut(answer)) for answer in answers]
    if len(speakers) == 1 or console().width < COLUMNS_FROM:
        return Group(*(part for pair in zip(heads, texts, strict=True) for part in pair))
    table = Table.grid(padding=(0, 4), expand=True)
    for _ in speakers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*heads)
    table.add_row(*texts)
    return table


def _cut(answer: Generation) -> str:
    return " ... (cut off at --max-tokens)" if answer.data[0].finish_reason == "length" else ""


def _ask(client: Client, model: str, **question: Any) -> Generation:
    """A checkpoint that is no model yet is made one, if that can be done here: beside the gateway."""
    try:
        return client.generate(model, **question)
    except ApiError as error:
        if error.status != 409 or not parse(model) or models.is_remote():
            raise
    return client.generate(models.made(model), **question)


def _teacher_of(client: Client, model: str) -> str:
    """The first teacher of the job that a checkpoint is of; '' = none that could be asked."""
    reference = parse(model)
    if reference is None:
        return ""
    teachers = client.jobs.get(reference[0]).spec["teachers"]
    names = [teacher["model"] for teacher in teachers.values() if not teacher["model"].startswith(STAGE_PREFIX)]
    return names[0] if names else ""


def _opening(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}

"""Chat templates without transformers: a conversation becomes the text that a model reads.

Templates are Jinja and come with models, so they run in its sandbox; what they may use is what transformers gives them
(`apply_chat_template`), and tests compare the texts. Needs `jinja2`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stillhouse.core.errors import SpecError
from stillhouse.core.models import ModelEntry, read_chat_template

SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens of tokenizer_config.json that templates may name."""


def render(entry: ModelEntry, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """The conversation up to where the assistant speaks. The first time it reads files: call it in a thread.

    Raises:
        SpecError: the model has no chat template, or it refuses the conversation.
    """
    if not entry.has_chat_template:
        raise SpecError(
            f"'{entry.name}' has no chat template; send `prompt`, which it reads as it is, or add chat_template.jinja "
            "to its folder and register it again",
            param="messages",
        )
    template, special = _load(entry.path, entry.sha256)
    names: dict[str, Any] = {**special, "tools": None, "documents": None, "add_generation_prompt": True, **arguments}
    try:
        return template.render(messages=[dict(message) for message in messages], **names)
    except (TemplateError, TypeError, ValueError) as error:  # what templates raise, themselves or by accident
        raise SpecError(f"the chat template of '{entry.name}' refuses it: {error}", param="messages") from None


@lru_cache(maxsize=8)
def _load(path: str, sha256: str) -> tuple[Template, dict[str, str]]:
    """A model's template, and its special tokens by name; `sha256` makes one that was registered again a new one."""
    folder = Path(path)
    try:
        template = _environment().from_string(read_chat_template(folder) or "")
    except TemplateError as error:
        raise SpecError(f"the chat template in {folder.name} is no Jinja: {error}", param="messages") from None
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    return template, {name: _content(config[name]) for name in SPECIAL if config.get(name)}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


class _Generation(Extension):
    """`{% generation %}` marks for training what the assistant says; here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
):
    """As transformers has it: jinja2's own would escape < and >."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)

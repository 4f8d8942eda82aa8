"""Chat templates without transformers say what transformers says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stillhouse.core import chat
from stillhouse.core.errors import SpecError
from stillhouse.core.models import ModelEntry, inspect_model
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

TALK = [
    {"role": "system", "content": "Be brief, <b>&</b> kind."},
    {"role": "user", "content": "  Grüße?\n"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
]
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "blocks": "{{ bos_token }}{% for m in messages %}\n  {%- if loop.first %}\n    [S]\n  {% endif %}\n"
    "{{ m.content | trim }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}\n>> {% endif %}",
    "json and loops": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
    "{{ m | tojson }}{{ m.content.split() | length }}{% endfor %}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    "arguments": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% if tools %}T{% endif %}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ pad_token }}",
    "date": "{{ strftime_now('%Y') }} {{ messages[0]['content'][:3] }} {{ messages[::-1][0].role | upper }}",
}


def model(folder: Path, template: str) -> ModelEntry:
    made = make_tiny_model(folder)
    (made / "chat_template.jinja").write_text(template)
    config = json.loads((made / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "<|endoftext|>", "__type": "AddedToken", "special": True}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return inspect_model("m", made)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}], ids=["plain", "argument"])
def test_it_renders_as_transformers_does(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    entry = model(tmp_path / "m", TEMPLATES[name])
    oracle: Any = AutoTokenizer.from_pretrained(entry.path)
    for talk in (TALK, TALK[:2], TALK[1:2]):
        expected = oracle.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **arguments)
        assert chat.render(entry, talk, arguments) == expected


def test_what_a_template_refuses_or_tries_is_an_error_with_its_words(tmp_path: Path) -> None:
    talk = TALK[1:2]
    cases = {
        "{{ raise_exception('no system turns, please') }}": "no system turns, please",
        "{{ messages.append(1) }}": "refuses it",
        "{{ ''.__class__.__mro__ }}": "refuses it",
        "{% for %}": "no Jinja",
    }
    for number, (template, says) in enumerate(cases.items()):
        with pytest.raises(SpecError, match=says):
            chat.render(model(tmp_path / str(number), template), talk, {})
    bare = model(tmp_path / "bare", "x").model_copy(update={"has_chat_template": False})
    with pytest.raises(SpecError, match="has no chat template; send `prompt`"):
        chat.render(bare, talk, {})

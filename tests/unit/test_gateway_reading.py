"""How student and teachers read, as the gateway checks it: tokenizers, templates, their arguments, stop tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from stillhouse.core.models import ModelEntry, inspect_model
from stillhouse.core.vocabulary import difference
from tests.gateway_kit import Gateway, add_model, make_model, make_spec, open_gateway


@pytest.fixture
async def gateway(tmp_path: Path, redis_url: str) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def test_other_tokenizers_are_refused_with_the_first_difference(gateway: Gateway) -> None:
    add_model(gateway.home, "stranger", extra_token="zz")
    body = await gateway.refused(make_spec(teachers={"main": {"model": "stranger"}}))
    assert body["param"] == "teachers.main.model"
    first = "token 256 is nothing for 'small' and 'zz' for 'stranger' (256 and 257 tokens; ids that differ: 1)"
    assert first in body["detail"]
    assert "pick models with the same tokenizer, or take objective policy_gradient with cross_tok" in body["detail"]


async def test_a_loss_that_compares_texts_takes_any_tokenizer_with_a_template(gateway: Gateway) -> None:
    crossing = make_spec(teachers={"main": {"model": "stranger"}})
    crossing["stages"][0]["loss"] = {"objective": "policy_gradient", "cross_tokenizer": True}
    add_model(gateway.home, "stranger", extra_token="zz")
    assert (await gateway.submit(crossing)).status_code == 201
    add_model(gateway.home, "base", extra_token="zz", has_template=False)
    body = await gateway.refused({**crossing, "teachers": {"main": {"model": "base"}}})
    assert body["param"] == "teachers.main.model"
    assert "'base' has no chat template" in body["detail"]


async def test_lengths_that_only_the_teachers_tokens_tell_are_no_reason_to_refuse(gateway: Gateway) -> None:
    add_model(gateway.home, "stranger", extra_token="zz", max_length=16)
    add_model(gateway.home, "short", max_length=16)
    spec = make_spec(teachers={"main": {"model": "short"}})
    spec["stages"][0]["loss"] = {"objective": "policy_gradient", "cross_tokenizer": True}
    spec["stages"][0]["data"]["rows"] = [{"prompt": "z" * 12}]
    assert "the max_sequence_length of the teacher 'main' (short) of 16" in (await gateway.refused(spec))["detail"]
    assert (await gateway.submit({**spec, "teachers": {"main": {"model": "stranger"}}})).status_code == 201


async def test_a_student_without_chat_template_is_refused(gateway: Gateway) -> None:
    add_model(gateway.home, "base", has_template=False)
    body = await gateway.refused(make_spec(student={"model": "base"}))
    assert body["param"] == "student.model"
    assert "chat template" in body["detail"]


async def test_arguments_that_the_template_does_not_read_are_refused(gateway: Gateway) -> None:
    (make_model(gateway.home / "thinker") / "chat_template.jinja").write_text("{% if enable_thinking %}{% endif %}")
    gateway.ctx.models.add(inspect_model("thinker", gateway.home / "thinker"))
    spec = make_spec(student={"model": "thinker"})
    spec["stages"][0]["data"]["chat_template_kwargs"] = {"enable_thinking": False}
    spec["stages"][0]["data"]["rows"][1]["chat_template_kwargs"] = {"enable_thinking": True}
    assert (await gateway.submit(spec)).status_code == 201

    spec["stages"][0]["data"]["rows"][1]["chat_template_kwargs"] = {"thinking": True}
    spec["teachers"] = {"main": {"model": "big", "chat_template_kwargs": {"enable_thinking": True}}}
    body = await gateway.refused(spec)
    assert [error["param"] for error in body["errors"]] == [
        "stages.0.data.rows.1",
        "teachers.main.chat_template_kwargs",
    ]
    assert "the chat template of 'thinker' reads no argument 'thinking'" in body["detail"]


async def test_stop_tokens_exist(gateway: Gateway) -> None:
    spec = make_spec()
    spec["stages"][0]["sampling"]["stop_token_ids"] = [255, 256]
    body = await gateway.refused(spec)
    assert body["param"] == "stages.0.sampling.stop_token_ids"
    assert "'small' has no token 256, its last is 255" in body["detail"]


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"min_p": 1}, "min_p"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["a\ufffd"]}, "stop"),
        ({"temperature": 0}, "temperature"),
    ],
    ids=str,
)
async def test_sampling_that_means_nothing_is_refused(gateway: Gateway, sampling: dict[str, Any], param: str) -> None:
    spec = make_spec()
    spec["stages"][0]["sampling"] = sampling
    assert (await gateway.refused(spec))["param"] == f"stages.0.sampling.{param}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: None, None),
        (lambda document: document.update(truncation=None), None),
        (
            lambda document: document["model"]["vocab"].update({"a": 65, "b": 64}),
            "token 64 is 'a' for 'small' and 'b' for 'other' (256 tokens each; ids that differ: 2)",
        ),
        (
            lambda document: document["added_tokens"].append(_special(256, "<end>")),
            "special token 256 is nothing for 'small' and '<end>' for 'other'",
        ),
        (
            lambda document: document.update(normalizer={"type": "Lowercase"}),
            "becomes other tokens: from position 0 on [51, 71, 68, 220] for 'small' and [83,",
        ),
        (
            lambda document: document.update(decoder={"type": "Fuse"}),
            "for 'small' and \"TheĠquickĠbrown",
        ),
    ],
    ids=["copy", "other bytes", "token", "special token", "rules", "text"],
)
def test_the_difference_of_two_tokenizers_has_a_name(tmp_path: Path, change: Any, words: str | None) -> None:
    student = _registered(
        tmp_path / "small", lambda document: document.update(decoder={"type": "ByteLevel", **BYTE_LEVEL})
    )
    teacher = _registered(
        tmp_path / "other",
        lambda document: (document.update(decoder={"type": "ByteLevel", **BYTE_LEVEL}), change(document)),
    )
    found = difference(student, teacher)
    assert found is None if words is None else words in (found or ""), found


BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _special(index: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **flags}


def _registered(folder: Path, change: Any) -> ModelEntry:
    path = make_model(folder) / "tokenizer.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document, indent=1))
    assert Tokenizer.from_file(str(path)).get_vocab_size() >= len(pre_tokenizers.ByteLevel.alphabet())
    return inspect_model(folder.name, folder)

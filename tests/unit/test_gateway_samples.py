"""What a job trained on, token by token: texts of tokens, every kind of score, pages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stillhouse.core.queue.streams import Scope
from stillhouse.core.rollouts import add_further
from stillhouse.core.schemas import Sample
from stillhouse.core.tensors import to_tensor
from stillhouse.core.token_texts import token_texts, whole_text
from stillhouse.gateway.samples import sample_view
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import StepJournal
from stillhouse.v1 import rollout_pb2 as pb
from tests.gateway_kit import Gateway, make_spec, open_gateway, problem


def byte_tokenizer() -> Tokenizer:
    """One token per byte, in the order of the bytes' stand-ins."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentence_tokenizer() -> Tokenizer:
    """Words with the space before them, and bytes for what is no word, as SentencePiece models have them."""
    words = ["<unk>", "▁tea", "▁is", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


BYTES, SENTENCES = byte_tokenizer(), sentence_tokenizer()


def as_bytes(character: str) -> list[int]:
    """A character as SENTENCES writes it when it is in no word."""
    return [5 + byte for byte in character.encode("utf-8", "replace")]


@given(st.text(max_size=40))
def test_texts_of_tokens_are_the_text(text: str) -> None:
    ids = BYTES.encode(text).ids
    texts = token_texts(BYTES, ids)
    assert "".join(texts) == whole_text(BYTES, ids) == text
    starts = np.cumsum([0, *(len(part) for part in texts)])
    for index, part in enumerate(texts):  # nothing is shown before its last byte is there
        assert len(text[: starts[index + 1]].encode()) <= index + 1
        assert len(part) <= 1


@given(st.lists(st.integers(0, 255), max_size=60))
def test_texts_of_any_bytes_are_what_the_tokenizer_reads(ids: list[int]) -> None:
    assert "".join(token_texts(BYTES, ids)) == whole_text(BYTES, ids)


@given(st.lists(st.one_of(st.just([1]), st.just([2]), st.just([4]), st.characters().map(as_bytes)), max_size=20))
def test_spaces_and_bytes_of_other_tokenizers_stay_where_they_are(parts: list[list[int]]) -> None:
    ids = [token for part in parts for token in part]
    assert "".join(token_texts(SENTENCES, ids)) == whole_text(SENTENCES, ids)


def test_a_character_is_its_last_tokens() -> None:
    assert token_texts(BYTES, BYTES.encode("aé😀").ids) == ["a", "", "é", "", "", "", "😀"]
    assert token_texts(BYTES, BYTES.encode("😀").ids[:2]) == ["\ufffd", ""], "it was cut off in the middle"
    assert token_texts(SENTENCES, [1, 2, 3, 1]) == ["tea", " is", "s", " tea"]


# -- one sample --------------------------------------------------------------------------------------------------------


def floats(*values: float) -> Any:
    return to_tensor(np.array(values, dtype=np.float32))


def ids(*values: Any) -> Any:
    return to_tensor(np.array(values, dtype=np.int32))


def text(words: str) -> Any:
    return ids(*BYTES.encode(words).ids)


def rollout(group: int = 0, index: int = 0, words: str = "abc", **fields: Any) -> pb.Rollout:
    made: dict[str, Any] = {
        "teacher": "main",
        "spans": [pb.Span(policy_version=4), pb.Span(first_token=1, policy_version=5)],
    }
    if words:
        made |= {"completion_ids": text(words), "finish_reason": pb.FINISH_REASON_LENGTH}
        made |= {"rollout_logprobs": floats(*(-1.0 - t for t in range(len(words))))}
    return pb.Rollout(
        sample_id=f"{group}/{index}",
        group=group,
        index=index,
        row=group + 100,
        prompt_ids=text("say:"),
        **{**made, **fields},
    )


def view(score: pb.Score, **options: Any) -> Sample:
    return sample_view(score, BYTES, step=1, epoch=1, stage="", **{"top": 5, **options})


def test_a_sample_says_who_thought_what_of_each_token() -> None:
    mask = to_tensor(np.array([1, 1, 0], dtype=np.uint8))
    score = pb.Score(rollout=rollout(loss_mask=mask), reward=0.5, reward_note="half right")
    score.sampled.teacher_logprobs.CopyFrom(floats(-0.5, -2.5, -np.inf))
    sample = view(score)
    assert (sample.prompt, sample.completion, sample.finish_reason) == ("say:", "abc", "length")
    assert (sample.row, sample.teacher, sample.teachers, sample.origin) == (100, "main", ["main"], "student")
    assert (sample.reward, sample.reward_note, sample.policy_version) == (0.5, "half right", 4)
    assert [token.text for token in sample.tokens] == ["a", "b", "c"]
    assert [token.student_logprob for token in sample.tokens] == [-1.0, -2.0, -3.0]
    assert [token.teacher_logprob for token in sample.tokens] == [-0.5, -2.5, None], "null = forbidden outright"
    assert [token.kl for token in sample.tokens] == [-0.5, 0.5, None], "log p - log q: where the student is too sure"
    assert [token.is_trained for token in sample.tokens] == [True, True, False]
    assert (sample.kl, sample.failure) == (0.0, None)


@pytest.mark.parametrize("kind", ["hidden", "targets", "topk"])
def test_every_kind_of_score_has_the_teachers_word_on_each_token(kind: str) -> None:
    score = pb.Score(rollout=rollout())
    getattr(score, kind).teacher_logprobs.CopyFrom(floats(-1.5, -2.5, -3.5))
    if kind == "topk":
        score.topk.teacher_topk_ids.CopyFrom(ids([65, 66], [67, 68], [69, 70]))
        score.topk.teacher_topk_logprobs.CopyFrom(to_tensor(np.full((3, 2), -0.25, dtype=np.float16)))
    assert [token.kl for token in view(score).tokens] == [0.5, 0.5, 0.5]


def test_alternatives_are_shown_where_they_were_stored() -> None:
    one, two, three = BYTES.encode("xyz").ids
    listed = ids([one, two], [two, three])
    score = pb.Score(rollout=rollout(words="ab", target_ids=listed))
    score.topk.teacher_logprobs.CopyFrom(floats(-1, -1))
    score.topk.teacher_topk_ids.CopyFrom(ids([three, one], [one, two]))
    score.topk.teacher_topk_logprobs.CopyFrom(to_tensor(np.array([[-0.5, -1.5], [-0.25, -2]], dtype=np.float32)))
    score.topk.target_logprobs.CopyFrom(to_tensor(np.array([[-3, -4], [-5, -np.inf]], dtype=np.float32)))
    first, second = view(score).tokens
    assert [(choice.text, choice.logprob) for choice in first.top] == [("z", -0.5), ("x", -1.5)]
    assert [(choice.text, choice.logprob) for choice in second.student_top] == [("y", -5.0), ("z", None)]
    assert [len(token.top) for token in view(score, top=1).tokens] == [1, 1]
    assert view(score, top=0).tokens[0].top == []


def test_texts_without_a_student_or_a_teacher_show_what_is_known() -> None:
    given_text = rollout(origin=pb.ORIGIN_DATA, teacher="", spans=[])
    given_text.ClearField("rollout_logprobs")
    sample = view(pb.Score(rollout=given_text, none=pb.NoScore()))
    assert (sample.origin, sample.teacher, sample.teachers, sample.policy_version) == ("data", "", [], None)
    assert {(token.student_logprob, token.teacher_logprob, token.kl) for token in sample.tokens} == {(None, None, None)}
    assert (sample.completion, sample.kl) == ("abc", None)


def test_a_sample_that_failed_says_why() -> None:
    failed = pb.Failure(reason="exhausted", message="nobody could write it", service="sampler", attempts=5)
    sample = view(pb.Score(rollout=rollout(words="", spans=[]), failed=failed))
    assert sample.failure is not None
    assert (sample.failure.reason, sample.failure.service, sample.failure.attempts) == ("exhausted", "sampler", 5)
    assert (sample.prompt, sample.completion, sample.tokens, sample.finish_reason) == ("say:", "", [], "")


def test_each_teacher_of_a_mixture_has_its_say() -> None:
    score = pb.Score(rollout=rollout())
    score.sampled.teacher_logprobs.CopyFrom(floats(-1, -1, -1))
    other = pb.Score(rollout=rollout(teacher="other"))
    other.sampled.teacher_logprobs.CopyFrom(floats(-2, -2, -2))
    add_further(score, other)
    assert (view(score).teacher, view(score).teachers) == ("main", ["main", "other"])
    assert view(score, teacher="other").teacher == "other"
    assert [token.teacher_logprob for token in view(score, teacher="other").tokens] == [-2.0] * 3
    assert view(score, teacher="other").completion == "abc"


def test_a_teacher_with_another_tokenizer_judges_pieces_of_text() -> None:
    score = pb.Score(rollout=rollout(words="abcd"))
    score.spans.teacher_logprobs.CopyFrom(floats(-1, -2, -4))
    score.spans.student_ends.CopyFrom(ids(1, 3))
    score.spans.teacher_ends.CopyFrom(ids(2, 3))
    sample = view(score)
    assert [(span.text, span.first_token, span.num_teacher_tokens) for span in sample.spans] == [
        ("a", 0, 2),
        ("bc", 1, 1),
    ]
    assert [(span.student_logprob, span.teacher_logprob, span.kl) for span in sample.spans] == [
        (-1.0, -3.0, 2.0),
        (-5.0, -4.0, -1.0),
    ]
    assert [token.is_trained for token in sample.tokens] == [True, True, True, False], "the rest has no score"
    assert sample.kl == pytest.approx(1 / 3)


# -- pages -------------------------------------------------------------------------------------------------------------

PER_STEP = 2


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, tmp_path) as opened:
        yield opened


async def trained(gateway: Gateway, steps: int = 3) -> str:
    """A job with a journal of two samples for each step; teacher `other` judges the second one of them."""
    spec = make_spec(teachers={"main": {"model": "big"}, "other": {"model": "big"}})
    spec["stages"][0]["data"]["rows"] = [{"prompt": "one", "teacher": "main"}, {"prompt": "two", "teacher": "other"}]
    answer = await gateway.submit(spec)
    assert answer.status_code == 201, answer.text
    scope = Scope(answer.json()["id"], await gateway.ctx.jobs.claim(answer.json()["id"], "trainer-a", 60.0, 0))
    artifacts = gateway.ctx.artifacts.job(scope.job_id)
    manifests.open_epoch(artifacts, 1, "a")
    for step in range(steps):
        scores = [
            pb.Score(rollout=rollout(step * PER_STEP + n, teacher=name), sampled=pb.SampledScore())
            for n, name in enumerate(("main", "other"))
        ]
        await StepJournal(artifacts, scope).write(step, scores, groups=[], next_group=0, micro_batches=[])
    return scope.job_id


async def page(gateway: Gateway, job_id: str, **query: Any) -> tuple[list[str], bool]:
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/samples", params=query)
    assert answer.status_code == 200, answer.text
    return [sample["id"] for sample in answer.json()["data"]], answer.json()["has_more"]


async def test_the_newest_step_comes_first_and_pages_join(gateway: Gateway) -> None:
    job_id = await trained(gateway)
    assert await page(gateway, job_id) == (["4/0", "5/0", "2/0", "3/0", "0/0", "1/0"], False)
    assert await page(gateway, job_id, order="asc", limit=3) == (["0/0", "1/0", "2/0"], True)
    for order in ("asc", "desc"):
        whole, _ = await page(gateway, job_id, order=order)
        joined: list[str] = []
        more = True
        while more:
            part, more = await page(gateway, job_id, order=order, limit=1, after=joined[-1] if joined else "")
            joined += part
        assert joined == whole
    assert await page(gateway, job_id, step=2) == (["2/0", "3/0"], False)
    assert await page(gateway, job_id, teacher="other") == (["5/0", "3/0", "1/0"], False)
    assert await page(gateway, job_id, step=9) == ([], False)


async def test_steps_count_as_in_the_metrics(gateway: Gateway) -> None:
    job_id = await trained(gateway, 1)
    sample = (await gateway.http.get(f"/v1/jobs/{job_id}/samples")).json()["data"][0]
    assert (sample["step"], sample["epoch"], sample["id"]) == (1, 1, "0/0")


async def test_a_job_without_steps_has_no_samples(gateway: Gateway) -> None:
    job_id = (await gateway.submit()).json()["id"]
    assert await page(gateway, job_id) == ([], False)


async def test_wrong_questions_are_refused(gateway: Gateway) -> None:
    job_id = await trained(gateway, 1)
    url = f"/v1/jobs/{job_id}/samples"

    async def ask(**query: Any) -> httpx.Response:
        return await gateway.http.get(url, params=query)

    for unknown in ("99/0", "0/7"):
        body = problem(await ask(after=unknown), 404)
        assert (body["param"], unknown in body["detail"]) == ("after", True)
    assert "it has main, other" in problem(await ask(teacher="nobody"), 404)["detail"]
    assert problem(await ask(limit=101), 422)["param"] == "limit"
    assert problem(await ask(after="../../etc"), 422)["param"] == "after"


async def test_tokens_of_another_tokenizer_are_never_shown_as_text(gateway: Gateway) -> None:
    job_id = await trained(gateway, 1)
    artifacts = gateway.ctx.artifacts.job(job_id)
    other = pb.Score(rollout=rollout(0, tokenizer_sha256="ab" * 32), sampled=pb.SampledScore())
    await StepJournal(artifacts, Scope(job_id, 1)).write(0, [other], groups=[], next_group=0, micro_batches=[])
    body = problem(await gateway.http.get(f"/v1/jobs/{job_id}/samples"), 409)
    assert "abababababab" in body["detail"]

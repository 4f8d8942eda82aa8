"""Scores for people who want a scoring server and nothing else: tokens here, log-probabilities from a teacher.

    request -> tokenized and counted (in a thread) -> a teacher loads the model -> scores -> sums, token strings

The teachers are those of the jobs; a request waits for its turn between their batches. Nothing is stored.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from stillhouse.core.errors import (
    AuthError,
    DeadlineError,
    EngineStartError,
    NotFoundError,
    OverloadedError,
    SpecError,
    StillhouseError,
    UnavailableError,
    UnimplementedError,
    WireError,
)
from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.rpc import Peer
from stillhouse.core.schemas import ScoreError, Scores, ScoreUsage, TextScore
from stillhouse.core.service import Context
from stillhouse.core.spec_score import MAX_ALTERNATIVES, MAX_TOKENS, ScoreItem, ScoreRequest
from stillhouse.core.tensors import DTYPE_NAMES, from_tensor, ids_tensor
from stillhouse.core.token_texts import texts_alone
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.gateway.problems import InvalidError
from stillhouse.v1 import rollout_pb2, teacher_pb2, teacher_pb2_grpc, tensor_pb2

LOAD_S: Final = 25.0
"""Time for a teacher to load the model; it goes on loading, so that whoever asks again finds it further."""
SCORE_S: Final = 60.0
"""Time for the scores. With LOAD_S it is less than our client waits for an answer."""
MAX_RUNNING: Final = 8
"""Requests that wait for teachers at once in one gateway: they take turns with the jobs, whom they must not starve."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """An item as the model reads it."""

    prompt_ids: list[int]
    """[P] only read, at least one: nothing can be said about a token with nothing before it."""
    token_ids: list[int]
    """[T] scored."""


class Slots:
    """How many requests wait for the services of jobs now."""

    def __init__(self, number: int = MAX_RUNNING, what: str = "score") -> None:
        self._free = number
        self._number = number
        self._what = what

    def __enter__(self) -> None:
        if self._free == 0:
            raise OverloadedError(f"{self._number} {self._what} requests are running here; try again")
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1


async def score(ctx: Context, slots: Slots, request: ScoreRequest) -> Scores:
    """The answer to a request.

    Raises:
        NotFoundError: no such model.
        InvalidError: texts that the model cannot read, or too many.
        SpecError: the engine of no teacher gives such scores.
        UnavailableError: no teacher is there, or the model is still being loaded, or no engine starts with it.
        OverloadedError: too many requests run, or the model does not fit into a teacher's memory.
        DeadlineError: the scores took longer than SCORE_S.
    """
    entry = ctx.models.get(request.model)
    tokenizer = await asyncio.to_thread(tokenizer_of, entry)
    items = await asyncio.to_thread(tokenize, tokenizer, entry, request)
    task = _task(entry, request)
    with slots:
        peer, teacher = await _ready_teacher(ctx, task)
        try:
            scores = await _scores(peer, task, _rollouts(items, task.asks[0]))
        except DeadlineError:
            raise DeadlineError(
                f"{teacher} did not score {sum(len(item.token_ids) for item in items)} tokens within {SCORE_S:g} s; "
                "send less at once, or try when it has less to do"
            ) from None
    data = await asyncio.to_thread(
        lambda: [_text_score(index, tokenizer, *pair) for index, pair in enumerate(zip(items, scores, strict=True))]
    )
    return Scores(
        model=entry.name,
        model_sha256=entry.sha256,
        temperature=request.temperature,
        teacher=teacher,
        data=data,
        usage=ScoreUsage(
            prompt_tokens=sum(len(item.prompt_ids) for item in items),
            scored_tokens=sum(text.num_tokens for text in data if text.error is None),
        ),
    )


# -- tokens ------------------------------------------------------------------------------------------------------------


def tokenize(tokenizer: Tokenizer, entry: ModelEntry, request: ScoreRequest) -> list[Tokens]:
    """Every item as token ids.

    Raises:
        InvalidError: an item is too short or too long or holds unknown ids, or all together are too long.
    """
    items = [_tokens(tokenizer, item) for item in request.items]
    known = entry.num_usable_ids
    findings: list[Finding] = []
    for index, item in enumerate(items):
        length = len(item.prompt_ids) + len(item.token_ids)
        if not item.token_ids:
            message = "one token is nothing to score: it is only read, since nothing comes before it"
            findings.append(Finding(f"items.{index}", message, "add a prompt, or more text"))
        elif length > entry.max_sequence_length:
            message = f"{length} tokens are more than the max_sequence_length {entry.max_sequence_length} of "
            findings.append(Finding(f"items.{index}", message + f"'{entry.name}'", "shorten or split it"))
        odd = [token for token in (*item.prompt_ids, *item.token_ids) if not 0 <= token < known]
        if odd:
            message = f"'{entry.name}' has no token id {odd[0]}, its last is {known - 1}"
            findings.append(Finding(f"items.{index}", message, "use ids of its tokenizer"))
    total = sum(len(item.prompt_ids) + len(item.token_ids) for item in items)
    if total > MAX_TOKENS:
        findings.append(Finding("items", f"{total} tokens in one request, at most {MAX_TOKENS}", "send several"))
    alternatives = request.top_k * sum(len(item.token_ids) for item in items)
    if alternatives > MAX_ALTERNATIVES:
        message = f"top_k {request.top_k} for {alternatives // request.top_k} tokens asks for {alternatives} "
        findings.append(
            Finding("top_k", message + f"alternatives, at most {MAX_ALTERNATIVES}", "lower it, or send less at once")
        )
    if findings:
        raise InvalidError(findings)
    return items


def _tokens(tokenizer: Tokenizer, item: ScoreItem) -> Tokens:
    if item.text is None:
        prompt_ids, token_ids = item.prompt_ids, item.token_ids or []
    else:
        # what the tokenizer puts before every text (a beginning-of-sequence token) belongs before the prompt
        prompt_ids = tokenizer.encode(item.prompt).ids if item.prompt else []
        token_ids = tokenizer.encode(item.text, add_special_tokens=not item.prompt).ids
    if not prompt_ids:
        return Tokens(token_ids[:1], token_ids[1:])
    return Tokens(prompt_ids, token_ids)


# -- the teacher -------------------------------------------------------------------------------------------------------


def stranger(info: ServiceInfo) -> UnavailableError:
    """The error for a service that takes our credential for wrong."""
    return UnavailableError(f"{info.instance} does not know this gateway: set the same internal_token for both")


async def _ready_teacher(ctx: Context, task: rollout_pb2.TeacherTask) -> tuple[Peer, str]:
    """A teacher that has the model in memory and can do what `task` asks for, and its name."""
    wanted = teacher_pb2.EnsureModelRequest(task=task)
    failure: StillhouseError | None = None
    refusal: StillhouseError | None = None
    for info in in_turn(await ctx.registry.services("teacher"), task.model_sha256):
        peer = ctx.peers.get(info.address, teacher_pb2_grpc.TeacherServiceStub, f"teacher {info.instance}")
        try:
            await peer.unary("EnsureModel", wanted, timeout_s=LOAD_S)
            return peer, info.instance
        except DeadlineError:
            raise UnavailableError(
                f"{info.instance} did not have '{task.model}' ready within {LOAD_S:g} s: it loads it, or works for "
                "jobs; try again"
            ) from None
        except AuthError:  # not the caller's, who has shown a key
            raise stranger(info) from None
        except (OverloadedError, UnavailableError) as error:
            failure = error
        except EngineStartError as error:
            failure = UnavailableError(error.message)
        except UnimplementedError as error:
            refusal = SpecError(f"no teacher that runs gives such scores: {error.message}")
        except NotFoundError as error:  # teachers may have registries of their own
            failure = failure or UnavailableError(f"{info.instance} does not have the model: {error.message}")
    # one that may yet score comes first: a refusal is for good
    raise (
        failure
        or refusal
        or UnavailableError(
            "no teacher service answers, and they score; `stillhouse up` starts one, "
            "`stillhouse services` shows what runs"
        )
    )


def in_turn(teachers: Sequence[ServiceInfo], model_sha256: str) -> list[ServiceInfo]:
    """Teachers in the order in which to ask them: for one model always the same, so that it is loaded once."""
    return sorted(teachers, key=lambda info: hashlib.sha256(f"{info.instance}/{model_sha256}".encode()).digest())


def _task(entry: ModelEntry, request: ScoreRequest) -> rollout_pb2.TeacherTask:
    """Of no job."""
    wanted = rollout_pb2.ScoreSpec(
        kind=rollout_pb2.SCORE_KIND_TOPK if request.top_k else rollout_pb2.SCORE_KIND_SAMPLED,
        top_k=request.top_k,
        temperature=request.temperature,
        dtype=tensor_pb2.DATA_TYPE_FLOAT32,
    )
    return rollout_pb2.TeacherTask(
        schema_version=1,
        model=entry.name,
        model_sha256=entry.sha256,
        dtype=DTYPE_NAMES[request.dtype],
        tokenizer_sha256=entry.tokenizer_sha256,
        asks=[wanted],
    )


def _rollouts(items: Sequence[Tokens], wanted: rollout_pb2.ScoreSpec) -> list[rollout_pb2.Rollout]:
    return [
        rollout_pb2.Rollout(
            schema_version=1,
            sample_id=f"items.{index}",
            prompt_ids=ids_tensor(item.prompt_ids),
            completion_ids=ids_tensor(item.token_ids),
            origin=rollout_pb2.ORIGIN_DATA,
            score=wanted,
        )
        for index, item in enumerate(items)
    ]


async def _scores(
    peer: Peer, task: rollout_pb2.TeacherTask, rollouts: Sequence[rollout_pb2.Rollout]
) -> list[rollout_pb2.Score]:
    call = peer.stream("Score", teacher_pb2.ScoreRequest(task=task, rollouts=rollouts), timeout_s=SCORE_S)
    scores = [answer.score async for answer in call]
    if len(scores) != len(rollouts):
        raise WireError(f"{peer.what} gave {len(scores)} scores for {len(rollouts)} items")
    return scores


# -- the answer --------------------------------------------------------------------------------------------------------


def _text_score(index: int, tokenizer: Tokenizer, item: Tokens, score: rollout_pb2.Score) -> TextScore:
    """What is said about an item. Log-probabilities of -inf (a token that the model forbids) become null."""
    facts: dict[str, Any] = {
        "index": index,
        "num_prompt_tokens": len(item.prompt_ids),
        "num_tokens": len(item.token_ids),
        "token_ids": item.token_ids,
        "tokens": texts_alone(tokenizer, item.token_ids),
    }
    kind = score.WhichOneof("result")
    if kind == "failed":
        return TextScore(**facts, error=ScoreError(code=score.failed.reason, message=score.failed.message))
    if kind not in ("sampled", "topk"):
        raise WireError(f"items.{index}: the teacher answered with '{kind}', asked for a score")
    result = getattr(score, kind)
    logprobs = from_tensor(result.teacher_logprobs).astype(np.float64)
    if len(logprobs) != len(item.token_ids):
        raise WireError(f"items.{index}: got {len(logprobs)} log-probabilities for {len(item.token_ids)} tokens")
    if kind == "topk":
        ids = from_tensor(result.teacher_topk_ids)
        facts["top_token_ids"] = ids.tolist()
        facts["top_tokens"] = [texts_alone(tokenizer, row) for row in ids.tolist()]
        facts["top_logprobs"] = [_finite(row) for row in from_tensor(result.teacher_topk_logprobs)]
        facts["rest_logprobs"] = _finite(from_tensor(result.tail_logprobs))
    total = float(logprobs.sum())
    return TextScore(
        **facts,
        logprobs=_finite(logprobs),
        logprob=_finite([total])[0],
        perplexity=_finite([np.exp(-total / len(logprobs))])[0],
    )


def _finite(values: Any) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]

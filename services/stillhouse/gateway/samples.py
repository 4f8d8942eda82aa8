"""What a job trained on, token by token: its step journals as answers. No torch here.

Letters: T completion tokens, K tokens that a score names at each position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from tokenizers import Tokenizer

from stillhouse.core.rollouts import scores_of
from stillhouse.core.schemas import Sample, SampleFailure, SampleSpan, SampleToken, TokenChoice
from stillhouse.core.tensors import from_tensor, ids_list
from stillhouse.core.token_texts import texts_alone, token_texts, whole_text
from stillhouse.v1 import rollout_pb2, tensor_pb2

ORIGINS: Final[dict[int, Literal["student", "data", "teacher"]]] = {
    rollout_pb2.ORIGIN_UNSPECIFIED: "student",
    rollout_pb2.ORIGIN_STUDENT: "student",
    rollout_pb2.ORIGIN_DATA: "data",
    rollout_pb2.ORIGIN_TEACHER: "teacher",
}
FINISH_REASONS: Final[dict[int, Literal["stop", "length", "abort", ""]]] = {
    rollout_pb2.FINISH_REASON_UNSPECIFIED: "",
    rollout_pb2.FINISH_REASON_STOP: "stop",
    rollout_pb2.FINISH_REASON_LENGTH: "length",
    rollout_pb2.FINISH_REASON_ABORT: "abort",
}


def teachers_of(score: rollout_pb2.Score) -> list[str]:
    """Names of the teachers that judged a sample, the first one's first; none in a job without."""
    return [name for each in scores_of(score) if (name := each.rollout.teacher)]


def sample_view(
    score: rollout_pb2.Score,
    tokenizer: Tokenizer,
    *,
    step: int,
    epoch: int,
    stage: str,
    teacher: str = "",
    top: int = 0,
) -> Sample:
    """A journalled sample in the words of one of its teachers ('' = the first), with up to `top` tokens a position.

    Raises:
        WireError: a tensor does not fit its shape.
    """
    rollout = score.rollout
    said = next((each for each in scores_of(score) if each.rollout.teacher == teacher), score)
    prompt_ids, ids = _ids(rollout.prompt_ids), _ids(rollout.completion_ids)
    is_students = ORIGINS[rollout.origin] == "student"
    tokens = _tokens(tokenizer, ids, rollout, said, top)
    spans = _spans(tokenizer, ids, rollout, said) if said.WhichOneof("result") == "spans" else []
    return Sample(
        id=rollout.sample_id,
        step=step,
        epoch=epoch,
        stage=stage,
        row=rollout.row,
        teacher=said.rollout.teacher,
        teachers=teachers_of(score),
        origin=ORIGINS[rollout.origin],
        prompt=whole_text(tokenizer, prompt_ids),
        num_prompt_tokens=len(prompt_ids),
        completion=whole_text(tokenizer, ids),
        finish_reason=FINISH_REASONS[rollout.finish_reason],
        policy_version=min((s.policy_version for s in rollout.spans), default=None) if is_students else None,
        reward=_number(score.reward) if score.HasField("reward") else None,
        reward_note=score.reward_note,
        kl=_mean(spans) if spans else _mean(tokens),
        num_tokens=len(ids),
        tokens=tokens,
        spans=spans,
        failure=_failure(said),
    )


def _ids(tensor: tensor_pb2.Tensor) -> list[int]:
    """[] where there are none: a sample that failed has no completion."""
    return ids_list(tensor) if tensor.data else []


def _failure(score: rollout_pb2.Score) -> SampleFailure | None:
    if score.WhichOneof("result") != "failed":
        return None
    failed = score.failed
    return SampleFailure(reason=failed.reason, message=failed.message, service=failed.service, attempts=failed.attempts)


def _tokens(
    tokenizer: Tokenizer, ids: list[int], rollout: rollout_pb2.Rollout, score: rollout_pb2.Score, top: int
) -> list[SampleToken]:
    log_p = _floats(rollout.rollout_logprobs, len(ids))
    log_q = _floats(_teacher_logprobs(score), len(ids))
    is_trained = _is_trained(rollout, score, len(ids))
    top_tokens, student_top = _choices(tokenizer, rollout, score, len(ids), top)
    texts = token_texts(tokenizer, ids)
    return [
        SampleToken(
            id=ids[t],
            text=texts[t],
            is_trained=bool(is_trained[t]),
            student_logprob=_number(log_p[t]),
            teacher_logprob=_number(log_q[t]),
            kl=_number(log_p[t] - log_q[t]),
            top=top_tokens[t],
            student_top=student_top[t],
        )
        for t in range(len(ids))
    ]


def _teacher_logprobs(score: rollout_pb2.Score) -> tensor_pb2.Tensor:
    kind = score.WhichOneof("result")
    scored = kind in ("sampled", "topk", "targets", "hidden")
    return getattr(score, kind).teacher_logprobs if scored else tensor_pb2.Tensor()


def _floats(tensor: tensor_pb2.Tensor, length: int) -> np.ndarray:
    """[T] float64, NaN where nothing is recorded."""
    found = from_tensor(tensor) if tensor.data else np.empty(0)
    return found.astype(np.float64) if len(found) == length else np.full(length, np.nan)


def _is_trained(rollout: rollout_pb2.Rollout, score: rollout_pb2.Score, length: int) -> np.ndarray:
    """[T] bool: not masked out, and within what was scored."""
    kind = score.WhichOneof("result")
    if kind == "failed":
        return np.zeros(length, dtype=bool)
    mask = from_tensor(rollout.loss_mask) != 0 if rollout.HasField("loss_mask") else np.ones(length, dtype=bool)
    if kind == "spans":
        ends = _ids(score.spans.student_ends)
        mask = mask & (np.arange(length) < (ends[-1] if ends else 0))
    return mask


def _choices(
    tokenizer: Tokenizer, rollout: rollout_pb2.Rollout, score: rollout_pb2.Score, length: int, top: int
) -> tuple[list[list[TokenChoice]], list[list[TokenChoice]]]:
    """[T] up to `top` likeliest tokens of the teacher, and of the student, as far as the score names any."""
    kind = score.WhichOneof("result")
    none: list[list[TokenChoice]] = [[] for _ in range(length)]
    theirs = ours = none
    if kind == "topk" and top:
        theirs = _named(tokenizer, score.topk.teacher_topk_ids, score.topk.teacher_topk_logprobs, top)
    if kind in ("topk", "targets") and rollout.HasField("target_ids") and top:
        ours = _named(tokenizer, rollout.target_ids, getattr(score, kind).target_logprobs, top)
    return theirs or none, ours or none


def _named(
    tokenizer: Tokenizer, ids: tensor_pb2.Tensor, logprobs: tensor_pb2.Tensor, top: int
) -> list[list[TokenChoice]]:
    ids_TK, logprobs_TK = from_tensor(ids)[:, :top], from_tensor(logprobs)[:, :top]
    known = np.unique(ids_TK).tolist()
    texts = dict(zip(known, texts_alone(tokenizer, known), strict=True))
    return [
        [
            TokenChoice(id=token, text=texts[token], logprob=_number(logprob))
            for token, logprob in zip(*pair, strict=True)
        ]
        for pair in zip(ids_TK.tolist(), logprobs_TK.astype(np.float64).tolist(), strict=True)
    ]


def _spans(
    tokenizer: Tokenizer, ids: list[int], rollout: rollout_pb2.Rollout, score: rollout_pb2.Score
) -> list[SampleSpan]:
    """What a teacher with another tokenizer says, piece by piece."""
    said = score.spans
    ends, teacher_ends = _ids(said.student_ends), _ids(said.teacher_ends)
    texts = token_texts(tokenizer, ids)
    log_p, log_q = _floats(rollout.rollout_logprobs, len(ids)), from_tensor(said.teacher_logprobs).astype(np.float64)
    is_trained = _is_trained(rollout, score, len(ids))
    found = []
    for first, last, theirs, their_last in zip([0, *ends], ends, [0, *teacher_ends], teacher_ends, strict=False):
        p, q = float(log_p[first:last].sum()), float(log_q[theirs:their_last].sum())
        found.append(
            SampleSpan(
                first_token=first,
                num_tokens=last - first,
                text="".join(texts[first:last]),
                num_teacher_tokens=their_last - theirs,
                is_trained=bool(is_trained[first:last].any()),
                student_logprob=_number(p),
                teacher_logprob=_number(q),
                kl=_number(p - q),
            )
        )
    return found


def _mean(parts: Sequence[SampleToken] | Sequence[SampleSpan]) -> float | None:
    """Nats per token of the student, over what has a number."""
    known = [(part.kl, getattr(part, "num_tokens", 1)) for part in parts if part.kl is not None]
    return sum(kl for kl, _ in known) / sum(count for _, count in known) if known else None


def _number(value: Any) -> float | None:
    """Float32 as people write it; null = not finite."""
    return round(float(value), 6) if math.isfinite(value) else None

"""Scores of spans of text, as the learner takes them: by token of the student. No torch here."""

from __future__ import annotations

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.core.tensors import from_tensor
from stillhouse.trainer.batch import MIN_LOG_Q, TrainSample
from stillhouse.v1 import rollout_pb2


def span_arrays(score: rollout_pb2.Score, num_tokens: int) -> dict[str, np.ndarray]:
    """`spans` and `teacher_logprobs` of a `TrainSample` with T = `num_tokens`: see there.

    log q(span) is the sum over the teacher's tokens, each of them at least MIN_LOG_Q, and MIN_LOG_Q less where the
    student's tokenizer writes the text otherwise: no text of the teacher becomes these tokens.

    Raises:
        WireError: the spans are none.
    """
    message = score.spans
    logprobs = from_tensor(message.teacher_logprobs)
    student, teacher = from_tensor(message.student_ends), from_tensor(message.teacher_ends)
    _check(score.rollout.sample_id, "student", student, num_tokens)
    _check(score.rollout.sample_id, "teacher", teacher, len(logprobs))
    shapes = {"teacher_ids": len(logprobs), "teacher_ends": len(student), "is_canonical": len(student)}
    for name, length in shapes.items():
        if (shape := list(getattr(message, name).shape)) != [length] and (shape or name != "is_canonical"):
            raise WireError(
                f"sample {score.rollout.sample_id}: {name} of shape {shape} for {len(logprobs)} teacher_logprobs and "
                f"{len(student)} student_ends"
            )
    spans = np.full(num_tokens, -1, dtype=np.int32)
    of_tokens = np.full(num_tokens, np.nan, dtype=np.float32)
    if len(student):
        bounded = np.maximum(logprobs, MIN_LOG_Q).astype(np.float64)
        of_spans = np.add.reduceat(bounded[: teacher[-1]], [0, *teacher[:-1]])
        if message.HasField("is_canonical"):
            of_spans += MIN_LOG_Q * (from_tensor(message.is_canonical) == 0)
        counts = np.diff(student, prepend=0)
        spans[: student[-1]] = np.repeat(np.arange(len(student)), counts)
        of_tokens[: student[-1]] = np.repeat(of_spans, counts)
    return {"spans": spans, "teacher_logprobs": of_tokens}


def sums(sample: TrainSample) -> tuple[float, float, int]:
    """(log p, log q, tokens) of all spans of a completion, nats: log p is that of the weights which sampled it."""
    assert sample.spans is not None, "a score of spans came first"
    is_in = sample.spans >= 0
    is_first = is_in & (np.diff(sample.spans, prepend=-1) != 0)
    log_p = sample.rollout_logprobs[is_in].sum(dtype=np.float64)
    return float(log_p), float(sample.teacher_logprobs[is_first].sum(dtype=np.float64)), int(is_in.sum())


def _check(sample_id: str, whose: str, ends: np.ndarray, length: int) -> None:
    if len(ends) and not (ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] <= length):
        raise WireError(f"sample {sample_id}: spans end at {ends.tolist()[:8]}... of {length} tokens of the {whose}")

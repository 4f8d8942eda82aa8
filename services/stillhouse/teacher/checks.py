"""Every result of an engine is looked at before it counts: as many as asked for, of the right shapes, finite.

Engines find such things themselves where they can; an engine that is wrong must end a sample, not a job.
Axes: T completion tokens, K top-k or targets, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stillhouse.teacher.engines.base import Scored, ScoreItem, Unscored
from stillhouse.v1 import rollout_pb2 as pb


def checked(items: Sequence[ScoreItem], results: Sequence[Scored | Unscored]) -> list[Scored | Unscored]:
    """The results, with those that cannot be right replaced by their failure.

    Raises:
        ValueError: not one result per item, in order: nobody knows whose they are.
    """
    asked, given = [item.key for item in items], [result.key for result in results]
    if asked != given:
        sizes = f"asked for {len(asked)} scores ({asked[:2]}...), the engine gave {len(given)} ({given[:2]}...)"
        raise ValueError(sizes)
    return [_checked(item, result) for item, result in zip(items, results, strict=True)]


def _checked(item: ScoreItem, result: Scored | Unscored) -> Scored | Unscored:
    if isinstance(result, Unscored):
        return result
    for name, shape in _shapes(item).items():
        array = getattr(result, name)
        if array is None or not _is_shape(array, shape):
            got = "nothing" if array is None else list(array.shape)
            wanted = [size if size is not None else "?" for size in shape]
            return Unscored(item.key, "wrong_length", f"the engine gave {got} as {name}, expected {wanted}")
        if not _is_finite(name, array):
            return Unscored(item.key, "non_finite", f"NaN or infinity in {name} of the teacher")
    return result


def _shapes(item: ScoreItem) -> dict[str, tuple[int | None, ...]]:
    """Fields of `Scored` that the item asks for; None = any size."""
    tokens = len(item.completion_ids)
    shapes: dict[str, tuple[int | None, ...]] = {"teacher_logprobs": (tokens,)}
    if item.kind == pb.SCORE_KIND_HIDDEN:
        shapes["hidden"] = (tokens, None)
    if item.kind == pb.SCORE_KIND_TOPK:
        shapes |= {"topk_ids": (tokens, item.top_k), "topk_logprobs": (tokens, item.top_k), "tail_logprobs": (tokens,)}
    if item.target_ids is not None and item.kind in (pb.SCORE_KIND_TARGETS, pb.SCORE_KIND_TOPK):
        shapes["target_logprobs"] = tuple(item.target_ids.shape)
    return shapes


def _is_shape(array: np.ndarray[Any, Any], shape: tuple[int | None, ...]) -> bool:
    return len(array.shape) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )


def _is_finite(name: str, array: np.ndarray[Any, Any]) -> bool:
    """-inf is an answer where a log-probability is asked for: a token that the teacher forbids outright."""
    if name == "hidden":
        return bool(np.isfinite(array).all())
    return array.dtype.kind in "iu" or bool((array < np.inf).all())

"""What samples must bring for an objective; refused before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stillhouse.core.errors import WireError
from stillhouse.core.spec import LossSpec, PolicyGradientLoss, TopKLoss
from stillhouse.trainer.batch import TeacherHead, TrainSample


def require_hidden(samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> None:
    """Refuse samples without what the exact divergences need."""
    for sample in samples:
        if sample.hidden is None:
            raise WireError(
                f"sample {sample.sample_id}: no hidden states of teacher '{sample.teacher}'; its distribution over the "
                "whole vocabulary needs scores of kind hidden"
            )
        if sample.teacher not in heads:
            raise WireError(
                f"sample {sample.sample_id}: no output head of teacher '{sample.teacher}'; got those of {sorted(heads)}"
            )


def require_spans(samples: Sequence[TrainSample]) -> None:
    """Refuse samples that say nothing about spans of text."""
    for sample in samples:
        if sample.spans is None:
            raise WireError(
                f"sample {sample.sample_id}: teacher '{sample.teacher}' scored tokens; with cross_tokenizer scores of "
                "kind spans are needed"
            )


def require_lists(samples: Sequence[TrainSample], loss: LossSpec) -> None:
    """Refuse samples without the likeliest tokens that the objective looks at: the teacher's, the student's or both."""
    teachers = loss.k if loss.payload() == "top_k" and isinstance(loss, TopKLoss | PolicyGradientLoss) else 0
    students = loss.record_top_k()
    for sample in samples:
        found = [0 if ids is None else ids.shape[1] for ids in (sample.topk_ids, sample.target_ids)]
        if found != [teachers, students]:
            raise WireError(
                f"sample {sample.sample_id}: {found[0]} likeliest tokens of teacher '{sample.teacher}' and {found[1]} "
                f"of the student per position; the objective needs {teachers} and {students}"
            )

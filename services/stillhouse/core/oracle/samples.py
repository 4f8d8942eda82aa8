"""One journalled sample: its seed, its row, which weights wrote it, and whether its numbers can be."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np

from stillhouse.core.errors import WireError
from stillhouse.core.oracle.lineage import Lineage
from stillhouse.core.oracle.report import Report
from stillhouse.core.oracle.stages import StagePlan
from stillhouse.core.rollouts import scores_apart, scores_of
from stillhouse.core.spec import JobSpec, PolicyGradientLoss, StageSpec
from stillhouse.core.tensors import from_tensor
from stillhouse.v1 import rollout_pb2

STUDENTS: Final = (rollout_pb2.ORIGIN_UNSPECIFIED, rollout_pb2.ORIGIN_STUDENT)
"""Origins of what the student wrote."""
RESULTS: Final = {name: name for name in ("none", "sampled", "spans", "targets", "hidden")} | {"top_k": "topk"}
"""Payload that a loss needs -> field of the score."""
EPSILON: Final = 1e-3
"""A log-probability may lie so far above 0, by rounding in bfloat16 or float32."""


class SampleCheck:
    """Checks the samples of a stage one by one; remembers what must agree between them."""

    def __init__(self, spec: JobSpec, stage: StagePlan, lineage: Lineage, report: Report) -> None:
        self._spec = spec
        self._stage = stage
        self._lineage = lineage
        self._report = report
        loss = stage.spec.loss
        self._kind = RESULTS[loss.payload()]
        self._is_rewarded = isinstance(loss, PolicyGradientLoss) and loss.reward is not None
        self._prompts: dict[int, bytes] = {}
        """Row -> hash of its prompt ids."""
        self._completions: dict[int, bytes] = {}
        """Row -> hash of its own completion, as trained on."""
        self._names: dict[tuple[int, int], str] = {}
        """(epoch, policy version) -> sha256 of its weights."""

    def check(self, score: rollout_pb2.Score, epoch: int, step: int) -> None:
        """Everything about one sample of a step."""
        rollout = score.rollout
        where: dict[str, Any] = {"epoch": epoch, "step": step, "sample": rollout.sample_id}
        self._check_identity(rollout, where)
        self._check_row(rollout, where)
        self._check_origin(rollout, where)
        result = score.WhichOneof("result")
        if result is None:
            self._report.violate("complete", f"sample {rollout.sample_id} has neither a score nor a failure", **where)
        elif result == "failed":
            if not (score.failed.reason and score.failed.service):
                self._report.violate("reason", f"sample {rollout.sample_id} failed, and nothing says why", **where)
        else:
            self._check_teachers(score, result, where)
            num_tokens = [self._check_values(each, where) for each in scores_apart(score)]
            self._check_answers(score, where)
            if rollout.origin in STUDENTS:
                self._check_spans(rollout, num_tokens[0], epoch, step, where)

    def _check_identity(self, rollout: rollout_pb2.Rollout, where: dict[str, Any]) -> None:
        name = rollout.sample_id
        group_id, _, index = name.partition("/")
        if name != f"{rollout.group}/{rollout.index}":
            message = f"sample {name} says it is sample {rollout.index} of group {rollout.group}"
            self._report.violate("complete", message, **where)
        expected = seed_of(self._spec.seed, group_id, index)
        if rollout.seed != expected:
            self._report.violate("seed", f"sample {name} was drawn with seed {rollout.seed}, not {expected}", **where)
        if rollout.purpose != rollout_pb2.PURPOSE_TRAIN:
            self._report.violate("complete", f"sample {name} was not for training: purpose {rollout.purpose}", **where)
        if rollout.epoch > where["epoch"]:
            message = f"sample {name} of epoch {rollout.epoch} lies in a journal of epoch {where['epoch']}"
            self._report.violate("lineage", message, **where)

    def _check_row(self, rollout: rollout_pb2.Rollout, where: dict[str, Any]) -> None:
        expected = self._stage.row(rollout.group)
        if expected is not None and rollout.row != expected:
            message = (
                f"group {rollout.group} is row {expected} of the data, sample {rollout.sample_id} is of {rollout.row}"
            )
            self._report.violate("rows", message, **where)
            return
        prompt = hashlib.sha256(rollout.prompt_ids.data).digest()
        if rollout.prompt_ids.data and self._prompts.setdefault(rollout.row, prompt) != prompt:
            message = f"sample {rollout.sample_id}: row {rollout.row} had another prompt before"
            self._report.violate("rows", message, **where)

    def _check_origin(self, rollout: rollout_pb2.Rollout, where: dict[str, Any]) -> None:
        """Who wrote it, and that nothing of a policy is said of what the student did not write."""
        name, found = rollout.sample_id, rollout.origin or rollout_pb2.ORIGIN_STUDENT
        expected = origin_of(self._spec.seed, rollout.group, self._stage.spec)
        if found != expected:
            mine, theirs = rollout_pb2.Origin.Name(found), rollout_pb2.Origin.Name(expected)
            self._report.violate("origin", f"sample {name} is {mine}, by the job's seed it is {theirs}", **where)
        if rollout.origin in STUDENTS:
            return
        if rollout.spans or rollout.weights_sha256 or rollout.HasField("rollout_logprobs"):
            message = (
                f"sample {name}, which the student did not write, names weights or log-probabilities of its policy"
            )
            self._report.violate("origin", message, **where)
        text = hashlib.sha256(rollout.completion_ids.data).digest()
        if found == rollout_pb2.ORIGIN_DATA and self._completions.setdefault(rollout.row, text) != text:
            message = f"sample {name}: row {rollout.row} had another completion before"
            self._report.violate("rows", message, **where)

    def _check_teachers(self, score: rollout_pb2.Score, result: str, where: dict[str, Any]) -> None:
        """Each teacher of its row has said its word, once; where none is asked, there is none beside the first."""
        expected = self._stage.rows.teachers_of(score.rollout.row)
        if expected is None:
            return
        expected = expected[:1] if result == "none" else expected
        found = [each.rollout.teacher for each in scores_of(score) if each.rollout.teacher]
        if found != expected:
            message = f"sample {score.rollout.sample_id} was judged by {found}, its row names {expected}"
            self._report.violate("teachers", message, **where)

    def _check_answers(self, score: rollout_pb2.Score, where: dict[str, Any]) -> None:
        """What teachers and verifier were asked for is there, and nothing else."""
        name = score.rollout.sample_id
        for result in {each.WhichOneof("result") for each in scores_of(score)} - {self._kind}:
            self._report.violate(
                "kind", f"sample {name} has a score '{result}', the loss needs '{self._kind}'", **where
            )
        if score.HasField("reward") != self._is_rewarded:
            has, wants = ("a", "none") if score.HasField("reward") else ("no", "one")
            self._report.violate("reward", f"sample {name} has {has} reward, the loss asks for {wants}", **where)
        elif self._is_rewarded and not 0 <= score.reward <= 1:
            self._report.violate("reward", f"sample {name}: its reward is {score.reward}, not 0 to 1", **where)

    def _check_values(self, score: rollout_pb2.Score, where: dict[str, Any]) -> int:
        """Lengths and numbers of what one teacher said; returns T."""
        rollout, result = score.rollout, getattr(score, score.WhichOneof("result") or "none")
        arrays = {}
        try:
            ids = np.atleast_1d(from_tensor(rollout.completion_ids))
            if rollout.origin in STUDENTS:
                arrays["rollout_logprobs"] = from_tensor(rollout.rollout_logprobs)
            # a score too big for the queue stays with the teacher, all of it; of hidden states these are never left out
            if isinstance(result, rollout_pb2.TopKScore) and result.HasField("teacher_topk_logprobs"):
                num_ids, num_logprobs = result.teacher_topk_ids.shape, result.teacher_topk_logprobs.shape
                if list(num_ids) != list(num_logprobs) or list(num_ids[:1]) != [len(ids)]:
                    raise WireError(f"top k ids {list(num_ids)} and {list(num_logprobs)} for {len(ids)} tokens")
            lengths = {}
            if isinstance(result, rollout_pb2.NoScore):
                pass
            elif isinstance(result, rollout_pb2.SpansScore):
                arrays["teacher_logprobs"] = from_tensor(result.teacher_logprobs)
                lengths["teacher_logprobs"] = _check_ends(result, len(ids))
            elif result.HasField("teacher_logprobs") or score.WhichOneof("result") in ("sampled", "hidden"):
                arrays["teacher_logprobs"] = from_tensor(result.teacher_logprobs)
            elif not result.blob.key:
                raise WireError("neither teacher_logprobs nor the key of a payload")
            mask = from_tensor(rollout.loss_mask) if rollout.HasField("loss_mask") else None
            if odd := [array.shape for array in (ids, *arrays.values()) if array.ndim != 1]:
                raise WireError(f"an array of shape {odd[0]}, expected [T]")
        except WireError as error:
            self._report.violate("values", f"sample {rollout.sample_id}: {error.message}", **where)
            return 0
        problems = []
        limit = self._stage.spec.sampling.max_tokens
        if not 1 <= len(ids) <= limit or ids.dtype != np.dtype("<i4") or (len(ids) and ids.min() < 0):
            problems.append(f"{len(ids)} completion tokens of {ids.dtype}, expected 1 to {limit} ids")
        if mask is not None and len(mask) != len(ids):
            problems.append(f"a loss mask of {len(mask)} for {len(ids)} tokens")
        if rollout.finish_reason == rollout_pb2.FINISH_REASON_ABORT:
            problems.append("the completion was aborted: training on it would favour short ones")
        for name, array in arrays.items():
            if len(array) != lengths.get(name, len(ids)):
                problems.append(f"{len(array)} {name} for {lengths.get(name, len(ids))} tokens")
            elif (odd := _odd(name, array)) is not None:
                problems.append(f"{name} holds {odd}")
            elif len(array) and array.max() > EPSILON:
                problems.append(f"{name} holds {array.max():g}, a log-probability is at most 0")
        for problem in problems:
            self._report.violate("values", f"sample {rollout.sample_id}: {problem}", **where)
        return len(ids)

    def _check_spans(
        self, rollout: rollout_pb2.Rollout, num_tokens: int, epoch: int, step: int, where: dict[str, Any]
    ) -> None:
        starts = [span.first_token for span in rollout.spans]
        is_covering = (
            bool(starts) and starts[0] == 0 and sorted(set(starts)) == starts and starts[-1] < max(num_tokens, 1)
        )
        if not is_covering:
            message = f"sample {rollout.sample_id}: spans begin at tokens {starts} of {num_tokens}"
            self._report.violate("spans", message, **where)
        before = (0, 0)
        for span in rollout.spans:
            version = (span.epoch, span.policy_version)
            if version < before:
                message = f"sample {rollout.sample_id}: version {version} after version {before}"
                self._report.violate("spans", message, **where)
            before = version
            if span.epoch > epoch or span.epoch not in self._lineage.epochs:
                message = (
                    f"sample {rollout.sample_id}, journalled in epoch {epoch}, was written by weights of epoch "
                    f"{span.epoch}; on the lineage are {sorted(self._lineage.epochs)}"
                )
                self._report.violate("spans", message, **where)
            self._check_staleness(rollout.sample_id, step, span.policy_version, where)
        self._check_weights(rollout, where)

    def _check_staleness(self, name: str, step: int, version: int, where: dict[str, Any]) -> None:
        bound, first = self._stage.spec.schedule.max_staleness, self._stage.first_step
        if version < first:
            message = f"sample {name} of a stage that begins at step {first} was written by policy version {version}"
            self._report.violate("stage", message, **where)
        elif not 0 <= step - version <= bound:
            message = f"sample {name}: step {step} trains on policy version {version}; the bound is {bound}"
            self._report.violate("staleness", message, **where)
        elif self._spec.deterministic and version != max(first, step - bound):
            message = f"sample {name}: policy version {version}, a deterministic job takes {max(first, step - bound)}"
            self._report.violate("staleness", message, **where)

    def _check_weights(self, rollout: rollout_pb2.Rollout, where: dict[str, Any]) -> None:
        if not rollout.spans or not rollout.weights_sha256:
            return
        last = rollout.spans[-1]
        # a deterministic job has one history: its versions are the same in every epoch
        key = (0 if self._spec.deterministic else last.epoch, last.policy_version)
        known = self._names.setdefault(key, rollout.weights_sha256)
        if known != rollout.weights_sha256:
            message = (
                f"sample {rollout.sample_id}: policy version {last.policy_version} of epoch {last.epoch} are weights "
                f"{rollout.weights_sha256[:12]}, elsewhere {known[:12]}"
            )
            self._report.violate("weights", message, **where)


def origin_of(job_seed: int, group: int, stage: StageSpec) -> int:
    """Who must have written a group: the student if the first 53 bits of sha256("job seed/origin/group"), as a fraction
    of 2^53, are below the stage's on_policy_fraction; else the stage's source."""
    digest = hashlib.sha256(f"{job_seed}/origin/{group}".encode()).digest()
    if int.from_bytes(digest[:8], "big") // 2**11 < stage.on_policy_fraction * 2**53:
        return rollout_pb2.ORIGIN_STUDENT
    return rollout_pb2.ORIGIN_TEACHER if stage.off_policy_source == "teacher" else rollout_pb2.ORIGIN_DATA


def _check_ends(score: rollout_pb2.SpansScore, num_tokens: int) -> int:
    """The teacher's own tokens, after a look at the spans: none empty, all within both texts.

    Raises:
        WireError: they are not.
    """
    num_read = len(from_tensor(score.teacher_ids))
    ends = [from_tensor(tensor).astype(np.int64) for tensor in (score.student_ends, score.teacher_ends)]
    marks = len(from_tensor(score.is_canonical)) if score.HasField("is_canonical") else len(ends[0])
    if not len(ends[0]) == len(ends[1]) == marks:
        raise WireError(f"{len(ends[0])} spans of the student, {len(ends[1])} of the teacher, {marks} marks of them")
    for numbers, length in zip(ends, (num_tokens, num_read), strict=True):
        if (np.diff(numbers, prepend=0) <= 0).any() or (len(numbers) and numbers[-1] > length):
            raise WireError(f"spans end at {numbers[:8].tolist()} of {length} tokens")
    return num_read


def _odd(name: str, array: np.ndarray) -> Any:
    """The first number that cannot be a log-probability of a token that was said; a teacher may forbid one (-inf)."""
    is_fine = np.isfinite(array) | (np.isneginf(array) if name == "teacher_logprobs" else False)
    return None if is_fine.all() else array[~is_fine][0]


def seed_of(job_seed: int, group_id: str, index: str) -> int:
    """The seed that a sample must have: the first 8 bytes of sha256("job seed/group/index"), big-endian."""
    digest = hashlib.sha256(f"{job_seed}/{group_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")

"""The learner of a job: one call is one optimizer step. Says what a step is; the engine computes it.

No torch here. Leaves out queues, journal and publishing: see loop.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from stillhouse.core.errors import NonFiniteError, WeightsError, WireError
from stillhouse.core.spec import OptimizerSpec, StageSpan, StageSpec, TeacherSpec
from stillhouse.core.spec_base import NO_TEACHER
from stillhouse.trainer.batch import RowMeasures, TeacherHead, TrainSample, Update
from stillhouse.trainer.metrics import StepMeasures
from stillhouse.trainer.packing import (
    MicroBatch,
    collate,
    loss_weights,
    padding_fraction,
    plan_micro_batches,
    trains,
)
from stillhouse.trainer.requirements import require_hidden, require_lists, require_spans

MAX_NAMED: Final = 8
"""Samples that an error names, at most."""


class Computes(Protocol):
    """What the learner needs of an engine; the methods are described in engine.py."""

    num_ranks: int
    vocab_size: int

    @property
    def packs(self) -> bool: ...

    def train(self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead]) -> list[RowMeasures]: ...
    def exact_kl(
        self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead], temperature: float
    ) -> list[np.ndarray]: ...
    def probe(
        self, batches: Sequence[MicroBatch], temperatures: Sequence[float], top_k: int
    ) -> list[dict[str, Any]]: ...
    def begin_stage(self, stage: StageSpec) -> None: ...
    def clear_gradients(self) -> None: ...
    def gradient_norm(self) -> float: ...
    def update(self, lr: float) -> Update: ...
    def show_average(self, on: bool) -> None: ...
    def hold(self, on: bool) -> None: ...
    def show_held(self, on: bool) -> None: ...
    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]: ...
    def move_followed(self) -> None: ...
    def followed_arrays(self) -> list[tuple[str, np.ndarray, str]]: ...
    def export(self, source_dir: Path, folder: Path, card: Mapping[str, Any]) -> None: ...
    def save(self, folder: Path, facts: Mapping[str, Any]) -> None: ...
    def load(self, folder: Path) -> dict[str, Any]: ...


class Learner:
    """A student that learns. Not thread-safe: one call at a time."""

    def __init__(
        self, engine: Computes, *, span: StageSpan, teachers: Mapping[str, TeacherSpec], total_steps: int
    ) -> None:
        self.engine = engine
        self.span = span
        """The stage that trains."""
        self.teachers = dict(teachers)
        self.total_steps = total_steps
        """Of all stages."""
        self.policy_version = 0
        """Optimizer steps behind the weights."""
        self._is_holding = False
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every micro-batch."""

    @property
    def stage(self) -> StageSpec:
        return self.span.stage

    def begin_stage(self, span: StageSpan) -> None:
        """Go on from the weights as they are under another stage, with a fresh optimizer; see `Parameters`."""
        self.engine.begin_stage(span.stage)
        self.span = span

    def end_at(self, step: int) -> None:
        """The job ends after so many steps, fewer than planned; learning rates go on as planned."""
        self.total_steps = step

    @property
    def is_done(self) -> bool:
        """The last step is behind it: what is published, evaluated and exported now is the average, if there is one."""
        return self.policy_version >= self.total_steps

    def plan(self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> list[list[int]]:
        """Micro-batches as indices into `samples`; those of one head together."""
        budget = self.stage.schedule.micro_batch_tokens
        return plan_micro_batches(samples, budget, is_packed=self.engine.packs, heads=heads)

    def step(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], plan: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """One optimizer step on `samples`, run in the micro-batches of `plan`.

        `heads` holds each teacher's head by the teacher's name; only payloads of hidden states need them.

        Raises:
            NonFiniteError: loss or gradient is not finite; names the samples. Weights and optimizer are as before.
            WireError: a sample lacks what the objective needs, or does not fit the vocabulary.
        """
        loss = self.stage.loss
        if loss.payload() == "hidden":
            require_hidden(samples, heads)
        else:
            heads = {}
        require_lists(samples, loss)
        if loss.crosses_tokenizers():
            require_spans(samples)
        weights = loss_weights(
            samples, [self._weight(sample) for sample in samples], loss.reduction, per_teacher=loss.per_teacher
        )
        measures = StepMeasures(samples, self.teachers, counts_forbidden=loss.payload() not in ("hidden", "spans"))
        bad: dict[str, str] = {}
        self.engine.clear_gradients()
        try:
            for batches in self._batches(samples, plan, weights, heads):
                for batch, rows in zip(batches, self.engine.train(batches, heads), strict=True):
                    bad |= _bad_losses(batch, rows, samples)
                    measures.add(batch, rows)
                self.on_progress()
            self._check_losses(bad)
        except BaseException:
            self.engine.clear_gradients()
            raise
        span, step = self.span, self.policy_version - self.span.first_step
        lr = learning_rate(span.stage.optimizer, step, span.stop_step - span.first_step)
        update = self.engine.update(lr)
        if not math.isfinite(update.norm):
            self._refuse_gradient(update, self._culprits(samples, plan, weights, heads))
        self._check_weights(update)
        self._count()
        return {
            **measures.summary(self.policy_version - 1),
            "grad/norm": update.norm,
            "lr": lr,
            "step/skipped": 0.0,
            "heads/loaded": float(_head_loads(samples, plan, heads)),
            "tokens/padding_fraction": padding_fraction(samples, plan, is_packed=self.engine.packs),
        }

    def skip(self) -> dict[str, float]:
        """Count a step whose gradient was not finite: the schedule goes on, weights and optimizer stay."""
        self._count()
        return {"step/skipped": 1.0}

    def _count(self) -> None:
        """A step is behind the weights; the average that teachers follow moves when it is due."""
        self.policy_version += 1
        ema = next((teacher.ema_of_student for teacher in self.teachers.values() if teacher.ema_of_student), None)
        if ema is not None and self.policy_version % ema.every == 0:
            self.engine.move_followed()

    def hold(self, on: bool) -> None:
        """Keep a copy of the weights as they are now, which `evaluate` then measures; or drop it."""
        self.engine.hold(on)
        self._is_holding = on

    def evaluate(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], *, temperature: float | None = None
    ) -> list[dict[str, Any]]:
        """Exact KL(student || teacher) of each sample, from its hidden states; summed over its trained tokens, nats.

        One dict per sample: `sample_id`, `teacher`, `reverse_kl_sum`, `num_tokens`. The temperature is the stage's
        unless given. Of the weights that are held, if some are.
        """
        require_hidden(samples, heads)
        temperature = self.stage.sampling.temperature if temperature is None else temperature
        if not self._is_holding:
            self.engine.show_average(self.is_done)
            sums = self._kl_sums(samples, heads, temperature)
        else:
            self.engine.show_held(True)
            try:
                sums = self._kl_sums(samples, heads, temperature)
            finally:
                self.engine.show_held(False)
        return [
            {
                "sample_id": sample.sample_id,
                "teacher": sample.teacher,
                "reverse_kl_sum": float(total),
                "num_tokens": sample.num_loss_tokens,
            }
            for sample, total in zip(samples, sums, strict=True)
        ]

    def _kl_sums(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], temperature: float
    ) -> np.ndarray:
        """[samples] exact KL of each, summed over its trained tokens, nats."""
        sums = np.zeros(len(samples))
        for batches in self._batches(samples, self.plan(samples, heads), [0.0] * len(samples), heads):
            for batch, kls in zip(batches, self.engine.exact_kl(batches, heads, temperature), strict=True):
                np.add.at(sums, batch.sample_of_row, kls)
            self.on_progress()
        return sums

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """(name, array, element type) of all weights, a copy; see `Parameters.state_arrays`."""
        self.engine.show_average(self.is_done)
        return self.engine.state_arrays()

    def followed_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """The average that teachers follow, as `state_arrays`."""
        return self.engine.followed_arrays()

    def export(self, source_dir: Path, folder: Path, card: Mapping[str, Any]) -> None:
        """Write the student to the new or empty `folder`; see export.py."""
        self.engine.show_average(self.is_done)
        self.engine.export(source_dir, folder, card)

    def save(self, folder: Path) -> None:
        """Write everything a bit-exact continuation needs; see checkpoint.py."""
        self.engine.save(folder, {"policy_version": self.policy_version, "total_steps": self.total_steps})

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CorruptError: it does not read, or is of another student.
        """
        self._is_holding = False
        self.policy_version = int(self.engine.load(folder)["policy_version"])

    def _weight(self, sample: TrainSample) -> float:
        """Weight of the teacher that a sample is routed to."""
        return 1.0 if sample.teacher == NO_TEACHER else self.teachers[sample.teacher].weight

    def _batches(
        self,
        samples: Sequence[TrainSample],
        plan: Sequence[Sequence[int]],
        weights: Sequence[float],
        heads: Mapping[str, TeacherHead],
    ) -> Iterator[list[MicroBatch]]:
        """The plan as micro-batches that have rows, as many at once as there are ranks; made when they are needed."""
        together: list[MicroBatch] = []
        for indices in plan:
            batch = collate(samples, indices, weights, is_packed=self.engine.packs)
            if not len(batch.ids):
                continue
            self._check_batch(batch, heads.get(batch.teacher), samples)
            together.append(batch)
            if len(together) == self.engine.num_ranks:
                yield together
                together = []
        if together:
            yield together

    # --- checks ---

    def _check_batch(self, batch: MicroBatch, head: TeacherHead | None, samples: Sequence[TrainSample]) -> None:
        """Refuse tokens that student and teacher do not both know, and hidden states that are not of the head."""
        vocab_size = self.engine.vocab_size
        if head is not None:
            vocab_size = min(vocab_size, head.vocab_size)
            if batch.hidden is not None and batch.hidden.shape[1] != head.weight.shape[1]:
                raise WireError(
                    f"teacher '{batch.teacher}': hidden states of width {batch.hidden.shape[1]} for a head of width "
                    f"{head.weight.shape[1]}"
                )
        bad = np.flatnonzero((batch.ids < 0) | (batch.ids >= vocab_size))
        if len(bad):
            sample = samples[int(batch.sample_of_row[bad[0]])]
            raise WireError(
                f"sample {sample.sample_id}: token id {batch.ids[bad[0]]} is outside the vocabulary of {vocab_size} "
                f"that student and teacher '{sample.teacher}' share"
            )
        named = batch.topk_ids
        if named is not None and named.size and not 0 <= named.min() <= named.max() < vocab_size:
            raise WireError(
                f"token ids {named.min()} to {named.max()} are among the likeliest of student or teacher "
                f"'{batch.teacher}'; the vocabulary they share has {vocab_size}"
            )

    def _check_losses(self, bad: Mapping[str, str]) -> None:
        if bad:
            raise NonFiniteError(
                f"step {self.policy_version}: the loss is {next(iter(bad.values()))}, not finite in {len(bad)} "
                f"samples: {_names(list(bad))}; check the teacher's scores, or lower the learning rate",
                sample_ids=list(bad)[:MAX_NAMED],
            )

    def _refuse_gradient(self, update: Update, culprits: Sequence[str]) -> None:
        bad = update.bad_gradients
        where = f"not finite in {len(bad)} tensors, the first is {bad[0]}" if bad else "its sum of squares overflows"
        of = f"from the samples {_names(culprits)}" if culprits else "no sample's alone is: their sum overflows"
        raise NonFiniteError(
            f"step {self.policy_version}: the gradient norm is {update.norm}; {where}; {of}; lower the learning rate",
            sample_ids=culprits,
        )

    def _culprits(
        self,
        samples: Sequence[TrainSample],
        plan: Sequence[Sequence[int]],
        weights: Sequence[float],
        heads: Mapping[str, TeacherHead],
    ) -> list[str]:
        """Up to `MAX_NAMED` samples whose gradient alone is not finite, from the micro-batches whose gradient is not.

        Computes the step once more; a step that is skipped may cost that.
        """

        def is_finite(part: Sequence[Sequence[int]]) -> bool:
            for batches in self._batches(samples, part, weights, heads):
                self.engine.train(batches, heads)
                self.on_progress()
            norm = self.engine.gradient_norm()
            self.engine.clear_gradients()
            return math.isfinite(norm)

        found: list[str] = []
        for indices in plan:
            if len(found) < MAX_NAMED and not is_finite([indices]):
                found += [samples[index].sample_id for index in indices if not is_finite([[index]])]
        return list(dict.fromkeys(found))[:MAX_NAMED]

    def _check_weights(self, update: Update) -> None:
        """Refuse to go on with weights that are no numbers: they would be published and committed."""
        if update.bad_weights:
            raise WeightsError(
                f"step {self.policy_version}: the update made {len(update.bad_weights)} tensors non-finite, the first "
                f"is {update.bad_weights[0]}; the last checkpoint is as it was; lower the learning rate"
            )


def _head_loads(samples: Sequence[TrainSample], plan: Sequence[Sequence[int]], heads: Mapping[str, TeacherHead]) -> int:
    """Heads that a step brings to a device that has none yet.

    Not what was really loaded: a step that is run again after a crash must report the same.
    """
    teachers = [samples[batch[0]].teacher for batch in plan if trains(samples, batch)]
    return sum(1 for _ in itertools.groupby(heads[name].sha256 for name in teachers if name in heads))


def _bad_losses(batch: MicroBatch, rows: RowMeasures, samples: Sequence[TrainSample]) -> dict[str, str]:
    """Id of each sample with a loss that is not finite -> where that is first."""
    found: dict[str, str] = {}
    for row in np.flatnonzero(~np.isfinite(rows.values)):
        sample = samples[int(batch.sample_of_row[row])]
        where = f"at token {batch.token_of_row[row]} of sample {sample.sample_id} (teacher '{sample.teacher}')"
        found.setdefault(sample.sample_id, f"{rows.values[row]} {where}")
    return found


def _names(sample_ids: Sequence[str]) -> str:
    shown = ", ".join(sample_ids[:MAX_NAMED])
    return shown if len(sample_ids) <= MAX_NAMED else f"{shown} and others"


def learning_rate(spec: OptimizerSpec, step: int, total_steps: int) -> float:
    """Rate of a stage's step, from 0: linear warm-up, then `decay` down to its end at the last of `total_steps`."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    span = total_steps - 1 - spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / span) if span > 0 else 0.0
    match spec.decay:
        case "constant":
            return spec.lr
        case "linear":
            remaining = 1 - progress
        case "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * remaining)

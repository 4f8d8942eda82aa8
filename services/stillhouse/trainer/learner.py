"""The learner: student, loss and optimizer of a job. One call is one optimizer step.

Everything of the student is recomputed under the current weights; from sampler and teacher come only facts about fixed
tokens. Nothing here is random. Leaves out queues, journal and publishing: see loop.py.

Letters: R trained completion tokens of a micro-batch, D width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.errors import NonFiniteError, WeightsError, WireError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.spec import OptimizerSpec, StageSpec, TeacherSpec
from stillhouse.core.spec_base import NO_TEACHER
from stillhouse.trainer import checkpoint
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.losses import PackedLoss, exact_reverse_kl, make_objective, packed_loss
from stillhouse.trainer.metrics import StepMeasures
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.packing import MicroBatch, collate, loss_weights, plan_micro_batches
from stillhouse.trainer.student import load_student, student_head, student_hidden, teacher_head, tokenizer_size


class Learner:
    """A student that learns. Not thread-safe: one call at a time."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        stage: StageSpec,
        teachers: Mapping[str, TeacherSpec],
        total_steps: int,
        seed: int,
        threads: int = 0,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        # nothing here draws from them; seeded, two runs of a job commit the same states
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        self.stage = stage
        self.teachers = dict(teachers)
        self.total_steps = total_steps
        self.policy_version = 0
        """Optimizer steps behind the weights."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every micro-batch."""
        self.model = load_student(model_dir, dtype, self.device)
        self._tokenizer_size = tokenizer_size(model_dir)
        self._objective = make_objective(stage.loss)
        self._params = dict(self.model.named_parameters())  # tied tensors once
        # In bfloat16 a step of 1e-5 is lost to rounding: the optimizer moves float32 copies, the model follows.
        self._masters = {
            name: param if param.dtype == torch.float32 else param.detach().float().requires_grad_()
            for name, param in self._params.items()
        }
        self._optimizer = _adamw(self._masters, stage.optimizer)
        self._resident_head: tuple[str, Head] | None = None

    def step(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], plan: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """One optimizer step on `samples`, run in the micro-batches of `plan` (`plan_micro_batches`).

        `heads` holds each teacher's head by the teacher's name; the policy gradient needs none.

        Raises:
            NonFiniteError: loss or gradient is not finite; names where. The weights are as before.
            WireError: a sample lacks what the objective needs, or does not fit the vocabulary.
        """
        if self.stage.loss.objective == "full_vocabulary":
            _require_hidden(samples, heads)
        elif self.stage.loss.objective == "top_k":
            _require_topk(samples, self.stage.loss.k)
        weights = loss_weights(samples, [self._weight(sample) for sample in samples], self.stage.loss.reduction)
        measures = StepMeasures(samples)
        self._clear_gradients()
        try:
            for indices in plan:
                batch = collate(samples, indices, weights)
                if len(batch.ids):
                    result = self._loss(batch, samples, heads)
                    result.loss.backward()
                    failpoint("trainer.mid_backward")
                    self._collect_gradients()
                    measures.add(batch, result)
                    self.on_progress()
            norm = self._gradient_norm()
        except BaseException:
            self._clear_gradients()
            raise
        lr = self._update()
        return {**measures.summary(self.policy_version - 1), "grad/norm": norm, "lr": lr, "step/skipped": 0.0}

    def skip(self) -> dict[str, float]:
        """Count a step whose gradient was not finite: the schedule goes on, weights and optimizer stay."""
        self.policy_version += 1
        return {"step/skipped": 1.0}

    @torch.no_grad()
    def evaluate(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], *, temperature: float | None = None
    ) -> list[dict[str, Any]]:
        """Exact KL(student || teacher) of each sample, from its hidden states; summed over its trained tokens, nats.

        One dict per sample: `sample_id`, `teacher`, `reverse_kl_sum`, `num_tokens`. The temperature is the stage's
        unless given.
        """
        _require_hidden(samples, heads)
        temperature = self.stage.sampling.temperature if temperature is None else temperature
        sums = np.zeros(len(samples))
        for indices in plan_micro_batches(samples, self.stage.schedule.micro_batch_tokens):
            batch = collate(samples, indices, [0.0] * len(samples))
            if not len(batch.ids):
                continue
            signals = self._signals(batch, heads, full=True)
            head = self._student_head(signals)
            self._check_ids(batch, head, samples)
            kls = exact_reverse_kl(self._hidden_rows(batch), head, signals, temperature)
            np.add.at(sums, batch.sample_of_row, kls.double().cpu().numpy())
            self.on_progress()
        return [
            {
                "sample_id": sample.sample_id,
                "teacher": sample.teacher,
                "reverse_kl_sum": float(total),
                "num_tokens": sample.num_loss_tokens,
            }
            for sample, total in zip(samples, sums, strict=True)
        ]

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """(name, array, element type) of all weights: a copy, contiguous, tied tensors once, bfloat16 as uint16 bits.

        Names are those of `state_dict`.
        """
        arrays = []
        for name, param in self._params.items():
            # one copy, whatever the device: `.cpu()` of a CPU tensor would share its memory
            tensor = torch.empty(param.shape, dtype=param.dtype).copy_(param.detach())
            if tensor.dtype == torch.bfloat16:
                arrays.append((name, tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"))
            else:
                arrays.append((name, tensor.numpy(), str(tensor.dtype).removeprefix("torch.")))
        return arrays

    def save(self, folder: Path) -> None:
        """Write everything a bit-exact continuation needs; see checkpoint.py."""
        facts = {"policy_version": self.policy_version, "dtype": self.dtype, "total_steps": self.total_steps}
        checkpoint.save_state(folder, self._masters, self._optimizer, facts)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CorruptError: it does not read, or is of another student.
        """
        facts = checkpoint.load_state(folder, self._masters, self._optimizer)
        self.policy_version = int(facts["policy_version"])
        self._follow_masters()

    def load_weights(self, folder: Path) -> None:
        """Start from the weights of a checkpoint, with a fresh optimizer and policy version 0."""
        checkpoint.load_weights(folder, self._masters)
        self._follow_masters()

    def _weight(self, sample: TrainSample) -> float:
        """Weight of the teacher that a sample is routed to."""
        return 1.0 if sample.teacher == NO_TEACHER else self.teachers[sample.teacher].weight

    # --- forward ---

    def _loss(self, batch: MicroBatch, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> PackedLoss:
        signals = self._signals(batch, heads, full=self.stage.loss.objective == "full_vocabulary")
        head = self._student_head(signals)
        self._check_ids(batch, head, samples)
        result = packed_loss(
            self._objective,
            self._hidden_rows(batch),
            head,
            self._tensor(batch.ids),
            self._tensor(batch.weights),
            signals,
            self.stage.sampling.temperature,
        )
        bad = (~torch.isfinite(result.values)).nonzero().flatten().tolist()
        if bad:
            row = bad[0]
            sample = samples[int(batch.sample_of_row[row])]
            raise NonFiniteError(
                f"step {self.policy_version}: the loss is {result.values[row].item()} at token "
                f"{batch.token_of_row[row]} of sample {sample.sample_id} (teacher '{sample.teacher}'), not finite at "
                f"{len(bad)} of {len(batch.ids)} tokens of its micro-batch; check the teacher's scores, or lower the "
                "learning rate"
            )
        return result

    def _hidden_rows(self, batch: MicroBatch) -> Tensor:
        """[R, D] the student's hidden states that predict the rows' tokens."""
        hidden_BLD = student_hidden(self.model, self._tensor(batch.input_ids))
        return hidden_BLD.flatten(0, 1).index_select(0, self._tensor(batch.positions))

    def _signals(self, batch: MicroBatch, heads: Mapping[str, TeacherHead], *, full: bool) -> Signals:
        if not full:
            return Signals(
                logprobs=self._tensor(batch.teacher_logprobs),
                rollout_logprobs=self._tensor(batch.rollout_logprobs),
                sample=self._tensor(batch.sample_of_row),
                topk_ids=None if batch.topk_ids is None else self._tensor(batch.topk_ids),
                topk_logprobs=None if batch.topk_logprobs is None else self._tensor(batch.topk_logprobs),
            )
        assert batch.hidden is not None, "checked by _require_hidden"
        head = self._teacher_head(batch.teacher, heads[batch.teacher])
        if batch.hidden.shape[1] != head.weight.shape[1]:
            raise WireError(
                f"teacher '{batch.teacher}': hidden states of width {batch.hidden.shape[1]} for a head of width "
                f"{head.weight.shape[1]}"
            )
        return Signals(hidden=self._tensor(batch.hidden), head=head.first(self._tokenizer_size))

    def _teacher_head(self, teacher: str, head: TeacherHead) -> Head:
        """The head as tensors; only the last one used stays in memory."""
        if self._resident_head is None or self._resident_head[0] != head.sha256:
            self._resident_head = None  # free the old one first
            self._resident_head = (head.sha256, teacher_head(head, self.device))
        return self._resident_head[1]

    def _student_head(self, signals: Signals) -> Head:
        """The live head, without tokens that are padding on either side."""
        size = self._tokenizer_size if signals.head is None else signals.head.weight.shape[0]
        return student_head(self.model).first(min(size, self._tokenizer_size))

    def _check_ids(self, batch: MicroBatch, head: Head, samples: Sequence[TrainSample]) -> None:
        vocab_size = head.weight.shape[0]
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
                f"teacher '{batch.teacher}' names token ids {named.min()} to {named.max()} among its likeliest; the "
                f"student's vocabulary has {vocab_size}"
            )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    # --- update ---

    def _collect_gradients(self) -> None:
        """Add the model's gradients to the masters', in float32."""
        for name, param in self._params.items():
            master = self._masters[name]
            if master is param or param.grad is None:
                continue
            master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
            param.grad = None

    def _clear_gradients(self) -> None:
        for tensor in (*self._params.values(), *self._masters.values()):
            tensor.grad = None

    def _gradient_norm(self) -> float:
        """Clip the gradients; gives the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self.stage.optimizer.max_grad_norm).item()
        if not math.isfinite(norm):
            bad = [n for n, m in self._masters.items() if m.grad is not None and not torch.isfinite(m.grad).all()]
            raise NonFiniteError(
                f"step {self.policy_version}: the gradient norm is {norm}; not finite in {len(bad)} tensors, "
                f"the first is {bad[0] if bad else 'none (overflow of the sum)'}; lower the learning rate"
            )
        return norm

    def _update(self) -> float:
        lr = learning_rate(self.stage.optimizer, self.policy_version, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._clear_gradients()
        self._check_weights()
        self._follow_masters()
        self.policy_version += 1
        return lr

    def _check_weights(self) -> None:
        """Refuse to go on with weights that are no numbers: they would be published and committed."""
        bad = [name for name, master in self._masters.items() if not bool(torch.isfinite(master).all())]
        if bad:
            raise WeightsError(
                f"step {self.policy_version}: the update made {len(bad)} tensors non-finite, the first is {bad[0]}; "
                "the last checkpoint is as it was; lower the learning rate"
            )

    @torch.no_grad()
    def _follow_masters(self) -> None:
        """Round the masters into the model."""
        for name, param in self._params.items():
            if self._masters[name] is not param:
                param.copy_(self._masters[name])


def _require_hidden(samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> None:
    """Refuse samples without what the exact divergences need."""
    for sample in samples:
        if sample.hidden is None:
            raise WireError(
                f"sample {sample.sample_id}: no hidden states of teacher '{sample.teacher}'; the full vocabulary needs "
                "scores of kind hidden"
            )
        if sample.teacher not in heads:
            raise WireError(
                f"sample {sample.sample_id}: no output head of teacher '{sample.teacher}'; got those of {sorted(heads)}"
            )


def _require_topk(samples: Sequence[TrainSample], k: int) -> None:
    """Refuse samples without the teacher's k likeliest tokens."""
    for sample in samples:
        found = 0 if sample.topk_ids is None else sample.topk_ids.shape[1]
        if found != k:
            raise WireError(
                f"sample {sample.sample_id}: {found} likeliest tokens of teacher '{sample.teacher}' per position, the "
                f"objective needs {k}"
            )


def learning_rate(spec: OptimizerSpec, step: int, total_steps: int) -> float:
    """Rate of the update from policy version `step`: linear warm-up, then `decay` down to its end at the last step."""
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


def _adamw(masters: Mapping[str, Tensor], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices, not on norms and biases."""
    groups = [
        {"params": [m for m in masters.values() if m.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [m for m in masters.values() if m.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)

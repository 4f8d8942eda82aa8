"""The engine: the student on this device. Micro-batches in, gradients and measures of their rows out.

Everything of the student is recomputed under the current weights; from sampler and teacher come only facts about fixed
tokens. Nothing here is random. Leaves out what a step is: see learner.py.

Letters: R trained completion tokens of a micro-batch, D width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.core.errors import CorruptError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.spec import EmaSpec, LoraSpec, StageSpec, StudentSpec
from stillhouse.trainer import checkpoint
from stillhouse.trainer.batch import RowMeasures, TeacherHead, Update
from stillhouse.trainer.export import export_model
from stillhouse.trainer.lora import add_adapter
from stillhouse.trainer.losses import PackedLoss, exact_reverse_kl, make_objective, packed_loss
from stillhouse.trainer.objectives.base import Head, Signals
from stillhouse.trainer.objectives.liger import faster_on
from stillhouse.trainer.packing import MicroBatch
from stillhouse.trainer.parameters import Parameters
from stillhouse.trainer.probe_rows import probe_rows
from stillhouse.trainer.student import (
    Packing,
    checkpoint_activations,
    choose_packing,
    load_student,
    student_head,
    student_hidden,
    teacher_head,
    tokenizer_size,
)


class Passes(nn.Module):
    """Body, head and loss as one module: what shards weights has to know where a pass begins and ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], Any]) -> Any:
        return work(self.model)


class Engine:
    """A student with its loss and optimizer, whole, on one device. Not thread-safe."""

    num_ranks = 1
    """Micro-batches that a call takes at once."""

    def __init__(
        self,
        model_dir: Path,
        *,
        student: StudentSpec,
        stage: StageSpec,
        seed: int,
        threads: int = 0,
        deterministic: bool = False,
        ema: EmaSpec | None = None,
        packings: Sequence[Packing] = (),
    ) -> None:
        """Begins with `stage`; `packings` are the wishes of all stages, so that one which cannot be is refused now."""
        if threads:
            torch.set_num_threads(threads)
        # nothing here draws from them; seeded, two runs of a job commit the same states
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = student
        self.stage = stage
        self._ema = ema
        """Of the average that teachers follow."""
        self.model = load_student(model_dir, student.dtype, self.device)
        wishes: set[Packing] = {*packings, stage.schedule.packing}
        self._packing = {wish: choose_packing(self.model, wish) for wish in sorted(wishes)}
        """By the wish: (whether samples are packed, why)."""
        if student.lora is not None:
            add_adapter(self.model, student.lora, seed)
        if student.activation_checkpointing:
            checkpoint_activations(self.model)
        self.vocab_size = min(tokenizer_size(model_dir), student_head(self.model).weight.shape[0])
        """Tokens that are no padding of the student's head."""
        self._passes = Passes(self.model)
        self.parameters = self._hold_parameters()
        self._deterministic = deterministic
        self._take_up(stage)
        self._resident_head: tuple[str, Head] | None = None
        self.heads_loaded = 0
        """Teachers' heads that were brought to the device."""

    def begin_stage(self, stage: StageSpec) -> None:
        """Go on under another stage, from the weights as they are, with a fresh optimizer."""
        self.parameters.begin_stage(stage.optimizer)
        self._take_up(stage)

    def _take_up(self, stage: StageSpec) -> None:
        """What follows from a stage alone."""
        self.stage = stage
        self.packs, self.packing_reason = self._packing[stage.schedule.packing]
        self._objective = make_objective(stage.loss)
        if not self._deterministic:  # a choice by the clock may turn out otherwise after a crash
            self._objective = faster_on(self.device, self._objective)

    def facts(self) -> dict[str, Any]:
        """What was loaded, for people: numbers of parameters, whether samples are packed, and why or why not."""
        return {
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "learning_parameters": sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad),
            "packing": self.packs,
            "packing_reason": self.packing_reason,
        }

    def _hold_parameters(self) -> Parameters:
        return Parameters(self.model, self.stage.optimizer, self._ema)

    def train(self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead]) -> list[RowMeasures]:
        """Add the micro-batches' gradients to those of the step; `heads` are needed with hidden states only."""
        return [self._train(batch, heads) for batch in batches]

    @torch.no_grad()
    def exact_kl(
        self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead], temperature: float
    ) -> list[np.ndarray]:
        """Each micro-batch's [R] float64 KL(student || teacher) over the whole vocabulary, nats."""
        return [self._exact_kl(batch, heads[batch.teacher], temperature) for batch in batches]

    @torch.no_grad()
    def probe(self, batches: Sequence[MicroBatch], temperatures: Sequence[float], top_k: int) -> list[dict[str, Any]]:
        """What a pre-flight wants to know of each micro-batch's rows, by name; see probe_rows.py."""
        return [self._probe(batch, temperatures, top_k) for batch in batches]

    def clear_gradients(self) -> None:
        """Forget the gradients of the step."""
        self.parameters.clear_gradients()

    def gradient_norm(self) -> float:
        """Global norm of the step's gradients so far."""
        return self.parameters.gradient_norm()

    def update(self, lr: float) -> Update:
        """Clip the gradients and step the optimizer."""
        return self.parameters.update(lr)

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """(name, array, element type) of all weights, a copy; see `Parameters.state_arrays`."""
        return self.parameters.state_arrays()

    def show_average(self, on: bool) -> None:
        """Compute with the moving average of the weights, if the job keeps one, or again with those that learn."""
        self.parameters.show_average(on)

    def hold(self, on: bool) -> None:
        """Keep a copy of the weights as they are now, or drop it; of an adapter its own weights alone."""
        self.parameters.hold(on)

    def show_held(self, on: bool) -> None:
        """Compute with that copy, or again with the weights that learn."""
        self.parameters.show_held(on)

    def move_followed(self) -> None:
        """Move the average that teachers follow towards the weights that learn."""
        self.parameters.move_followed()

    def followed_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        """That average, as `state_arrays`."""
        return self.parameters.followed_arrays()

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write everything a bit-exact continuation needs; see checkpoint.py."""
        lora = self.student.lora.model_dump(mode="json") if self.student.lora else None
        self.parameters.save(folder, {"dtype": self.student.dtype, "lora": lora, **facts})

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from what `save` wrote; gives the facts."""
        self._check_lora(folder)
        return self.parameters.load(folder)

    def export(self, source_dir: Path, folder: Path, card: Mapping[str, Any]) -> None:
        """Write the student as transformers loads it, and an adapter beside it as peft does."""
        export_model(self.model, self.state_arrays(), source_dir, folder, card)
        if self.student.lora is not None:
            self.parameters.save_adapter(folder / "adapter", card.get("init_from") or self.student.model)

    def _check_lora(self, folder: Path) -> None:
        """Refuse the checkpoint of a student that learns something else."""
        found = checkpoint.read_facts(folder).get("lora")
        theirs = LoraSpec.model_validate(found) if found else None
        if theirs != self.student.lora:
            raise CorruptError(
                f"{folder} holds {_learns(theirs)}, the job trains {_learns(self.student.lora)}; was the job's "
                "student.lora changed?"
            )

    # --- one pass ---

    def _train(self, batch: MicroBatch, heads: Mapping[str, TeacherHead]) -> RowMeasures:
        head = heads[batch.teacher] if self.stage.loss.payload() == "hidden" else None

        def work(model: PreTrainedModel) -> tuple[Tensor, PackedLoss]:
            signals = self._signals(batch, head)
            result = packed_loss(
                self._objective,
                self._hidden_rows(model, batch),
                self._student_head(model, signals),
                self._tensor(batch.ids),
                self._tensor(batch.weights),
                signals,
                self.stage.sampling.temperature,
            )
            return result.loss, result

        loss, result = self._passes(work)
        loss.backward()
        failpoint("trainer.mid_backward")
        self.parameters.collect_gradients()
        names = [field.name for field in fields(RowMeasures) if field.name != "loss"]
        return RowMeasures(loss=loss.item(), **{name: _array(getattr(result, name)) for name in names})

    def _exact_kl(self, batch: MicroBatch, head: TeacherHead, temperature: float) -> np.ndarray:
        def work(model: PreTrainedModel) -> Tensor:
            signals = self._signals(batch, head)
            hidden_RD = self._hidden_rows(model, batch)
            return exact_reverse_kl(hidden_RD, self._student_head(model, signals), signals, temperature)

        return self._passes(work).double().cpu().numpy()

    def _probe(self, batch: MicroBatch, temperatures: Sequence[float], top_k: int) -> dict[str, Any]:
        def work(model: PreTrainedModel) -> dict[str, Tensor]:
            hidden_RD, head = self._hidden_rows(model, batch), student_head(model).first(self.vocab_size)
            return probe_rows(hidden_RD, head, self._tensor(batch.ids), temperatures, top_k)

        return {name: rows.cpu().numpy() for name, rows in self._passes(work).items()}

    def _hidden_rows(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """[R, D] the student's hidden states that predict the rows' tokens."""
        hidden_BLD = student_hidden(model, self._tensor(batch.input_ids), batch.lengths)
        return hidden_BLD.flatten(0, 1).index_select(0, self._tensor(batch.positions))

    def _signals(self, batch: MicroBatch, head: TeacherHead | None) -> Signals:
        """What the objective is told about the rows; with a head also the teacher's whole distribution."""
        arrays = {
            "logprobs": batch.teacher_logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "outcome": batch.outcome,
            "sample": batch.sample_of_row,
            "span": batch.span,
            "topk_ids": batch.topk_ids,
            "topk_logprobs": batch.topk_logprobs,
            "topk_mask": batch.topk_mask,
            "hidden": None if head is None else batch.hidden,
        }
        tensors: dict[str, Any] = {name: self._tensor(a) for name, a in arrays.items() if a is not None}
        return Signals(head=None if head is None else self._teacher_head(head).first(self.vocab_size), **tensors)

    def _teacher_head(self, head: TeacherHead) -> Head:
        """The head as tensors; only the last one used stays in memory."""
        if self._resident_head is None or self._resident_head[0] != head.sha256:
            self._resident_head = None  # free the old one first
            self._resident_head = (head.sha256, teacher_head(head, self.device))
            self.heads_loaded += 1
        return self._resident_head[1]

    def _student_head(self, model: PreTrainedModel, signals: Signals) -> Head:
        """The live head, without tokens that are padding on either side."""
        size = self.vocab_size if signals.head is None else signals.head.weight.shape[0]
        return student_head(model).first(min(size, self.vocab_size))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _learns(lora: LoraSpec | None) -> str:
    if lora is None:
        return "all weights"
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return f"a LoRA adapter of rank {lora.rank}, alpha {lora.alpha:g} on {targets}"


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()

"""What the tests of the learner share: tiny students and teachers, rollouts and honest scores of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.spec import EmaSpec, StageSpan, StageSpec, StudentSpec, TeacherSpec
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.engine import Engine
from stillhouse.trainer.learner import Learner
from stillhouse.trainer.packing import plan_micro_batches
from tests.tiny import TOKENIZER_SIZE

FULL = {"objective": "full_vocabulary", "hidden_dtype": "float32"}
FORWARD = {**FULL, "divergence": "forward_kl"}
POLICY_GRADIENT = {"objective": "policy_gradient"}


def stage(loss: dict, *, temperature: float = 1.0, lr: float = 1e-3, packing: str = "auto", **optimizer) -> StageSpec:
    return StageSpec.model_validate(
        {
            "data": {"rows": [{"prompt": "hi"}]},
            "sampling": {"temperature": temperature},
            "loss": loss,
            "optimizer": {"lr": lr, **optimizer},
            "schedule": {"steps": 100, "micro_batch_tokens": 64, "packing": packing},
        }
    )


def learner(
    model: Path,
    spec: StageSpec,
    *,
    teachers=("t",),
    weights=None,
    seed: int = 0,
    total_steps: int = 100,
    ema: EmaSpec | None = None,
    **student,
) -> Learner:
    """`student` are fields of `StudentSpec`; with `ema` the teachers follow it."""
    specs = {
        name: TeacherSpec(model="m", weight=(weights or {}).get(name, 1.0), ema_of_student=ema) for name in teachers
    }
    engine = Engine(model, student=StudentSpec(model="m", **student), stage=spec, seed=seed, ema=ema)
    return Learner(engine, span=StageSpan(0, spec, 0, total_steps, 0), teachers=specs, total_steps=total_steps)


def engine_of(student: Learner) -> Engine:
    assert isinstance(student.engine, Engine)
    return student.engine


class Teacher:
    """A frozen model that scores in the plainest way: one sequence at a time, float32, no cache, no padding."""

    def __init__(self, model: Path, name: str = "t") -> None:
        self.name = name
        self.model = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
        self.head = TeacherHead(
            sha256=f"{name:0>64}",
            weight=self.model.lm_head.weight.detach().numpy(),
            dtype="float32",
            bias=None,
            vocab_size=TOKENIZER_SIZE,
            logit_scale=1.0,
            logit_soft_cap=0.0,
        )

    @torch.no_grad()
    def log_probs(self, ids: list[int], temperature: float) -> torch.Tensor:
        """[L, V] log-probabilities after each position."""
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :, :TOKENIZER_SIZE].double()
        return (logits / temperature).log_softmax(-1)

    @torch.no_grad()
    def score(
        self, rollouts: list[tuple[list[int], list[int]]], temperature: float = 1.0, first: int = 0, **fields
    ) -> list[TrainSample]:
        """Samples of (prompt, completion) pairs, groups from `first` on; `fields` replace fields of all of them."""
        samples = []
        for index, (prompt, completion) in enumerate(rollouts, first):
            ids = prompt + completion
            rows = slice(len(prompt) - 1, len(ids) - 1)
            logprobs = self.log_probs(ids, temperature)[rows].gather(1, torch.tensor(completion)[:, None])[:, 0]
            hidden = self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, rows]
            values = {
                "sample_id": f"{index}/0",
                "teacher": self.name,
                "prompt_ids": np.asarray(prompt, dtype=np.int32),
                "completion_ids": np.asarray(completion, dtype=np.int32),
                "loss_mask": np.ones(len(completion), dtype=np.uint8),
                "rollout_logprobs": np.full(len(completion), -1.0, dtype=np.float32),
                "teacher_logprobs": logprobs.numpy().astype(np.float32),
                "hidden": hidden.numpy(),
                "weight": 1.0,
                "oldest_policy_version": 0,
                "finish_reason": 1,
            }
            samples.append(TrainSample(**{**values, **fields}))
        return samples


def rollouts(seed: int = 0, count: int = 5) -> list[tuple[list[int], list[int]]]:
    """Random (prompt, completion) pairs of different lengths."""
    draw = np.random.default_rng(seed)
    return [
        (draw.integers(4, TOKENIZER_SIZE, draw.integers(2, 8)).tolist(), draw.integers(4, TOKENIZER_SIZE, n).tolist())
        for n in draw.integers(1, 13, count)
    ]


def train(student: Learner, samples: list[TrainSample], *teachers: Teacher, max_tokens: int = 64) -> dict[str, float]:
    heads = {teacher.name: teacher.head for teacher in teachers}
    return student.step(samples, heads, plan_micro_batches(samples, max_tokens, is_packed=student.engine.packs))


def weights_of(student: Learner) -> dict[str, np.ndarray]:
    return {name: array for name, array, _ in student.state_arrays()}


def captured_gradients(student: Learner, samples: list[TrainSample], *teachers: Teacher, max_tokens: int = 64):
    """(metrics, gradients) of a step, as AdamW gets them; clipping is out of the way in the specs used here."""
    seen: dict[str, torch.Tensor] = {}

    engine = engine_of(student)

    def keep(optimizer, *_) -> None:
        seen.update({name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None})

    hook = engine.parameters.optimizer.register_step_pre_hook(keep)
    metrics = train(student, samples, *teachers, max_tokens=max_tokens)
    hook.remove()
    return metrics, seen

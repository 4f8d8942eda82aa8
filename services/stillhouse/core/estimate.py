"""What a job will cost: tokens, bytes, from its spec and the registered facts of its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from stillhouse.core.models import ModelEntry
from stillhouse.core.schemas import Estimate, Tokens
from stillhouse.core.spec import FullVocabularyLoss, JobSpec, LoraSpec, PolicyGradientLoss, StageSpec, TopKLoss

WORDS: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
LAYERS_WITH_ADAPTER: Final = 7
"""Linear layers of a decoder layer: four of the attention, three of the rest."""


def estimate(
    spec: JobSpec,
    student: ModelEntry,
    teachers: Mapping[str, ModelEntry],
    *,
    length_share: float | None = None,
    seconds_per_token: float | None = None,
) -> Estimate:
    """The cost of a job; `length_share` = mean completion / max_tokens, as probes measured it."""
    trained = sum(stage_tokens(stage) for stage in spec.stages)
    given = sum(stage_tokens(stage) for stage in spec.stages if not stage.asks_samplers())
    judged = sum(stage_tokens(stage) * judges(spec, stage) for stage in spec.stages if stage.asks_teachers())
    measured = evaluation_tokens(spec)

    def tokens(number: int) -> Tokens:
        return Tokens(at_most=number, expected=None if length_share is None else round(number * length_share))

    sampled = tokens(trained - given + measured)
    seconds = None
    if seconds_per_token is not None and sampled.expected is not None:
        seconds = round(seconds_per_token * sampled.expected, 1)
    return Estimate(
        sampled_tokens=sampled,
        scored_tokens=tokens(judged + measured * bool(teachers)),
        trained_tokens=tokens(trained),
        bytes={
            "scores": sum(
                stage_tokens(stage) * judges(spec, stage) * score_bytes(stage, teachers) for stage in spec.stages
            ),
            "weights": (spec.stop_step() + 1) * student.num_parameters * WORDS[spec.student.dtype],
            "checkpoints": checkpoints_kept(spec) * checkpoint_bytes(spec, student),
        },
        seconds=seconds,
    )


def stage_tokens(stage: StageSpec) -> int:
    """Completion tokens of a stage, at most."""
    schedule = stage.schedule
    return schedule.steps * schedule.prompts_per_step * schedule.group_size * stage.sampling.max_tokens


def tokens_in_flight(stage: StageSpec) -> int:
    """Completion tokens that are planned and not trained yet, at most."""
    return stage_tokens(stage) // stage.schedule.steps * (stage.schedule.max_staleness + 1)


def judges(spec: JobSpec, stage: StageSpec) -> int:
    """Teachers that judge one sample, at most."""
    return max((len(row.mixture(spec.teachers)) for row in stage.data.rows or ()), default=min(1, len(spec.teachers)))


def score_bytes(stage: StageSpec, teachers: Mapping[str, ModelEntry]) -> int:
    """What a teacher answers to a token, bytes."""
    loss = stage.loss
    match loss.payload():
        case "none":
            return 0
        case "hidden":
            assert isinstance(loss, FullVocabularyLoss | PolicyGradientLoss)
            width = max((entry.hidden_size for entry in teachers.values()), default=0)
            return 4 + WORDS[loss.hidden_dtype] * width
        case "top_k":
            assert isinstance(loss, TopKLoss | PolicyGradientLoss)
            return 8 + 8 * loss.k + 4 * loss.record_top_k()
        case "targets":
            return 4 + 4 * loss.record_top_k()
        case "spans":
            return 12
        case _:
            return 4


def evaluation_tokens(spec: JobSpec) -> int:
    """Completion tokens of all held-out measurements, at most: a sampled and a greedy text of every prompt."""
    evaluation = spec.evaluation
    if evaluation.data is None:
        return 0
    ends = {0, *(span.stop_step for span in spec.spans())}
    every = evaluation.every_steps
    times = len(ends | set(range(every, spec.stop_step(), every) if every else ()))
    texts = 2 if spec.teachers else 1
    rows = evaluation.num_prompts if evaluation.data.rows is None else len(evaluation.data.rows)
    return times * min(evaluation.num_prompts, rows) * texts * evaluation.max_tokens


def learning_parameters(spec: JobSpec, student: ModelEntry) -> int:
    """Parameters with a gradient; of an adapter about."""
    lora = spec.student.lora
    return student.num_parameters if lora is None else adapter_parameters(lora, student)


def adapter_parameters(lora: LoraSpec, student: ModelEntry) -> int:
    """Two factors of `rank` at every linear layer, each about as wide as the model."""
    layers = LAYERS_WITH_ADAPTER if lora.target_modules == "all-linear" else len(lora.target_modules)
    return student.num_layers * layers * 2 * lora.rank * student.hidden_size


def checkpoint_bytes(spec: JobSpec, student: ModelEntry) -> int:
    """What learns and its two moments, float32."""
    return 3 * 4 * learning_parameters(spec, student)


def checkpoints_kept(spec: JobSpec) -> int:
    """Checkpoints on disk at the end, at most: the last, the best, and the end of every stage."""
    policy = spec.checkpoint
    best = policy.keep_best if spec.evaluation.data is not None else 0
    made = -(-spec.stop_step() // policy.every_steps) + len(spec.stages)
    return min(made, max(2, policy.keep_last) + best + len(spec.stages) - 1)

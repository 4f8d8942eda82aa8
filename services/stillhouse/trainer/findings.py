"""What measurements mean: each function takes numbers and gives a check with verdict, evidence and fix.

The limits are in nats per token. float32: prefill and decoding differ by about 5e-5 in a logit; bfloat16: by up to 0.74
in one, a few hundredths on average (measured; docs/preflight.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from stillhouse.core.schemas import Check
from stillhouse.core.spec import JobSpec
from stillhouse.trainer.batch import TrainSample
from stillhouse.v1.rollout_pb2 import FINISH_REASON_LENGTH

GAP_WARNING: Final = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean difference of two computations of the same log-probabilities that rounding does not explain, by element type."""
GAP_ERROR: Final = 0.5
"""And one with which nothing can be learned: a teacher's usual correction of a token is smaller."""
EXPLAINED: Final = 0.1
"""A temperature explains a gap if less than this part of it is left."""
KL_HIGH: Final = 3.0
"""Initial reverse KL above it: the student writes what the teacher would never say. The quickstart's damaged student
begins at 2.9; models of one family mostly below 1."""
KL_LOW: Final = 1e-3
"""Below it there is next to nothing to learn."""
KL_ZERO: Final = {"float32": 1e-4, "bfloat16": 0.05}
"""A model's KL to itself, at most."""
OVERLAP_LOW: Final = 0.4
"""Share of the student's likeliest tokens that are the teacher's, too: below it they use other words."""
TRUNCATED: Final = 0.2
"""Share of completions without an end."""
UNIFORM_NATS: Final = 0.02
"""Mean and spread of a uniform teacher's log-probabilities around -ln V."""

Facts = Mapping[str, Any]


def _check(name: str, verdict: Any, message: str, evidence: Facts, fix: str = "", param: str | None = None) -> Check:
    rounded = {key: _rounded(value) for key, value in evidence.items()}
    return Check(name=name, verdict=verdict, message=message, evidence=rounded, fix=fix, param=param)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if not isinstance(value, float | np.floating):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def skipped(name: str, reason: str) -> Check:
    """What could not be measured."""
    return Check(name=name, verdict="skipped", message=reason)


def sampler_gap(sampler: str, mean: float, highest: float, dtype: str, temperature: float) -> Check:
    """Sampler and trainer give the same log-probabilities at equal weights and the job's temperature."""
    facts = {"sampler": sampler, "mean_nats": mean, "max_nats": highest, "temperature": temperature, "dtype": dtype}
    message = f"log-probabilities of {sampler} and of the trainer at equal weights and temperature {temperature:g} "
    message += f"differ by {mean:.3g} nats on average, by {highest:.3g} at most"
    if mean <= GAP_WARNING[dtype]:
        return _check("sampler_gap", "ok", message, facts)
    verdict = "error" if not mean <= GAP_ERROR else "warning"
    fix = (
        f"{dtype} explains {GAP_WARNING[dtype]:g} on average: usually another temperature, template, kernel or element "
    )
    fix += "type in the sampler, or weights that did not arrive; give samplers and trainer the same dtype and versions"
    return _check("sampler_gap", verdict, message, facts, fix)


def temperature(sampler: str, wanted: float, gaps: Mapping[float, float], dtype: str) -> Check:
    """The sampler obeys the job's temperature. `gaps` = mean |log p| difference if it had sampled at each."""
    best = min(gaps, key=lambda each: gaps[each])
    facts = {"sampler": sampler, "wanted": wanted, "fits_best": best, "gap_nats": gaps[wanted], "left_nats": gaps[best]}
    is_fine = gaps[wanted] <= GAP_WARNING[dtype]
    if is_fine or best == wanted or not gaps[best] <= EXPLAINED * gaps[wanted]:
        # a gap of another cause is said by the check of the gap
        verdict = "ok" if is_fine else "skipped"
        message = f"{sampler} records log-probabilities at the job's temperature {wanted:g}"
        if not is_fine:
            message = f"no temperature explains what {sampler} records; see sampler_gap"
        return _check("temperature", verdict, message, facts)
    message = f"temperature mismatch: {sampler} records log-probabilities of temperature {best:g}, the job samples at "
    message += f"{wanted:g}: that alone explains {gaps[wanted]:.3g} nats per token down to {gaps[best]:.3g}"
    fix = "have its engine return processed log-probabilities (of logits / temperature), or set sampling.temperature: "
    return _check("temperature", "error", message, facts, f"{fix}{best:g}", "stages.0.sampling.temperature")


def truncation(truncated: int, number: int, max_tokens: int, limit: int) -> Check:
    """Completions come to their end. `limit` = longest that was let be written."""
    facts = {"truncated": truncated, "completions": number, "tokens": limit, "max_tokens": max_tokens}
    message = f"{truncated} of {number} completions had not ended after {limit} tokens"
    if limit < max_tokens:
        return _check("truncation", "ok", f"{message}; the job lets them go on to {max_tokens}", facts)
    if truncated <= TRUNCATED * number:
        return _check("truncation", "ok", message, facts)
    fix = "raise sampling.max_tokens; if they are long because they never end, see that the student's template and "
    fix += "eos_token_id belong together (sampling.stop_token_ids ends them, too)"
    return _check("truncation", "warning", message, facts, fix, "stages.0.sampling.max_tokens")


def uniform(teacher: str, logprobs: np.ndarray, vocab_size: int) -> Check:
    """A teacher has an opinion. `logprobs` [N] of the completions' tokens, at the job's temperature."""
    name = f"teacher '{teacher}'"
    flat, param = -math.log(vocab_size), f"teachers.{teacher}.model"
    mean, spread = float(logprobs.mean()), float(logprobs.std())
    facts = {"teacher": teacher, "mean_logprob": mean, "spread": spread, "minus_ln_vocabulary": flat}
    if not np.isfinite(logprobs).all():
        message = f"{name} gives log-probabilities that are no numbers"
        return _check("uniform", "error", message, facts, "its weights or its engine are damaged", param)
    if abs(mean - flat) > UNIFORM_NATS or spread > UNIFORM_NATS:
        return _check("uniform", "ok", f"{name} prefers some tokens: {mean:.3g} nats on average", facts)
    message = (
        f"uniform teacher: {name} gives every token {mean:.4g} nats, which is -ln {vocab_size:,}: it knows nothing"
    )
    fix = (
        "its output head is zero or was never loaded (a tied head that is missing, weights that were freed): register "
    )
    fix += "the model again from a good copy, and start its service again"
    return _check("uniform", "error", message, facts, fix, param)


def repeats(teacher: str, instance: str, again: np.ndarray, alone: np.ndarray, dtype: str) -> Check:
    """One teacher process says the same twice. [N] differences of a second batch, and of each rollout alone."""
    name, param = f"teacher '{teacher}' in {instance}", f"teachers.{teacher}"
    facts: dict[str, Any] = {"teacher": teacher, "instance": instance, "again_max_nats": _highest(again)}
    facts |= {"alone_max_nats": _highest(alone), "alone_mean_nats": _mean(alone)}
    worst = max(_mean(again), _mean(alone))
    if worst <= GAP_WARNING[dtype]:
        message = (
            f"{name} scores the same rollouts the same again, in a batch and alone (at most {_highest(alone):.2g} nats)"
        )
        return _check("repeats", "ok", message, facts)
    verdict = "error" if not worst <= 10 * GAP_WARNING[dtype] else "warning"
    if _mean(again) > GAP_WARNING[dtype]:
        message = (
            f"{name} is not deterministic: the same batch scored twice differs by {_mean(again):.3g} nats per token"
        )
        fix = (
            "dropout or sampling noise in its engine, or memory that is overwritten: start it again; if it stays, its "
        )
        fix += "engine or its device is faulty"
    else:
        message = f"what {name} says of a rollout depends on its batch: {_mean(alone):.3g} nats per token from it alone"
        fix = "padding or attention between rows of a batch: report it, and set teacher_batch_tokens to 16 meanwhile"
    return _check("repeats", verdict, message, facts, fix, param)


def replicas(teacher: str, said: Mapping[str, np.ndarray], unsteady: Sequence[str], dtype: str) -> Check:
    """All processes with one teacher say the same. `said`: instance -> [N] log-probabilities of the same tokens;
    `unsteady` = those that do not even agree with themselves."""
    param, facts = f"teachers.{teacher}", {"teacher": teacher, "instances": sorted(said)}
    if len(said) < 2:
        only = next(iter(said), "none")
        return _check("replicas", "ok", f"only {only} serves teacher '{teacher}'", facts)
    steady = [name for name in sorted(said) if name not in unsteady] or sorted(said)
    middle = np.median([said[name] for name in steady], axis=0)
    # of two that differ nobody knows which is right; beside an unsteady one a steady one is taken for right
    reference = middle if len(steady) > 2 else said[steady[0]]
    gaps = {name: _mean(np.abs(logprobs - reference)) for name, logprobs in said.items()}
    facts["mean_nats"] = gaps
    odd = [name for name, gap in gaps.items() if not gap <= GAP_WARNING[dtype]]
    if not odd:
        return _check("replicas", "ok", f"{len(said)} processes agree on teacher '{teacher}'", facts)
    named = " and ".join(f"{name} ({_why(name, unsteady)}{gaps[name]:.3g} nats per token off)" for name in odd)
    message = f"replicas of teacher '{teacher}' disagree: {named}, compared with "
    message += "the median of all" if len(steady) > 2 else steady[0]
    fix = "give all the same engine, dtype and version, and start the odd one again; until then samples mean something "
    fix += "else depending on who scored them"
    verdict = "error" if not max(gaps.values()) <= 10 * GAP_WARNING[dtype] else "warning"
    return _check("replicas", verdict, message, facts, fix, param)


def _why(name: str, unsteady: Sequence[str]) -> str:
    return "not deterministic, " if name in unsteady else ""


def initial_kl(teacher: str, kl: float, *, is_same: bool, dtype: str) -> Check:
    """How far the student begins from a teacher. `is_same`: the same weights read the same prompts."""
    param = f"teachers.{teacher}.model"
    facts = {"teacher": teacher, "reverse_kl_nats": kl, "is_the_student": is_same}
    message = f"initial KL(student || teacher '{teacher}') is {kl:.3g} nats per token"
    if is_same and not kl <= KL_ZERO[dtype]:
        fix = "both are the same weights, so it should be 0: trainer and teacher compute differently (dtype, kernel, "
        fix += "template, temperature); see sampler_gap and repeats"
        return _check("initial_kl", "error", message, facts, fix, param)
    if is_same:
        fix = "the teacher is the student itself: give it another model, or a system_prompt to learn from"
        return _check("initial_kl", "warning", f"{message}: there is nothing to learn", facts, fix, param)
    if not kl <= KL_HIGH:
        fix = f"above {KL_HIGH:g} usually means another chat template, a base model, or a student that needs fine-"
        fix += "tuning on the teacher's texts first (a stage with on_policy_fraction: 0)"
        return _check("initial_kl", "warning", message, facts, fix, param)
    if kl < KL_LOW:
        fix = "next to nothing to learn: usually the teacher is the student, or a copy that was hardly trained"
        return _check("initial_kl", "warning", message, facts, fix, param)
    return _check("initial_kl", "ok", message, facts)


def overlap(teacher: str, share: float, k: int) -> Check:
    """Student and teacher take the same tokens for likely."""
    facts = {"teacher": teacher, "share": share, "k": k}
    message = f"of the student's {k} likeliest tokens {share:.0%} are among those of teacher '{teacher}'"
    if share >= OVERLAP_LOW:
        return _check("overlap", "ok", message, facts)
    fix = f"below {OVERLAP_LOW:.0%} the teacher mostly judges words that it would not use: usually another template or "
    fix += "family; fine-tune the student on the teacher's texts first, or take a nearer teacher"
    return _check("overlap", "warning", message, facts, fix, f"teachers.{teacher}.model")


def first_step(
    spec: JobSpec, samples: Sequence[TrainSample], metrics: Mapping[str, float], vocabularies: Mapping[str, int]
) -> Iterator[Check]:
    """What the first step of a job says beside training; `vocabularies` = tokens that each teacher knows."""
    stage, dtype = spec.stages[0], spec.student.dtype
    own = [sample for sample in samples if sample.is_on_policy]
    if (mean := metrics.get("mismatch/logprob_abs_mean")) is not None and own:
        highest = metrics["mismatch/logprob_abs_max"]
        yield sampler_gap("the samplers", mean, highest, dtype, stage.sampling.temperature)
    if own:
        cut = sum(sample.finish_reason == FINISH_REASON_LENGTH for sample in own)
        yield truncation(cut, len(own), stage.sampling.max_tokens, stage.sampling.max_tokens)
    for name, vocab_size in vocabularies.items():
        said = [sample.teacher_logprobs for sample in samples if sample.teacher == name and sample.spans is None]
        logprobs = np.concatenate(said) if said else np.empty(0)
        if np.isfinite(logprobs).any():
            yield uniform(name, logprobs[np.isfinite(logprobs)], vocab_size)
    kl = metrics.get("loss/reverse_kl/mean")
    if kl is not None and len(vocabularies) == 1 and spec.ema_of_student() is None and np.isfinite(kl):
        is_exact = stage.loss.payload() in ("hidden", "top_k")
        if is_exact or kl > KL_LOW:
            yield initial_kl(next(iter(vocabularies)), kl, is_same=False, dtype=dtype)
        else:  # of few tokens it may be negative, whatever the KL is
            yield skipped("initial_kl", f"the estimate from the first step's tokens is {kl:.3g}: too few to say")


def _mean(gaps: np.ndarray) -> float:
    return float(np.abs(gaps).mean(dtype=np.float64)) if len(gaps) else 0.0


def _highest(gaps: np.ndarray) -> float:
    return float(np.abs(gaps).max(initial=0.0))

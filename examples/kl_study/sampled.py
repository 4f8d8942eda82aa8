"""What one sampled token says about a gradient: its noise, and what a wrong temperature adds.

The example is that of topk_bias.py, the gradients are those of the trainer's policy gradient. Each of the V tokens is
one row, weighted by its probability p under the student: means and variances are exact, nothing is drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

import torch
from topk_bias import Example, V

from stillhouse.trainer.objectives.full_vocabulary import ReverseKL
from stillhouse.trainer.objectives.sampled import PolicyGradient

COLD: Final = 0.7
"""Sampling temperature of the student beside a teacher that is read at 1."""


def noise(baseline: Literal["none", "full_vocabulary"]) -> tuple[float, float]:
    """(variance of the gradient of one sampled token, distance of its mean from the gradient of the reverse KL)."""
    example = Example()
    chunk, signals = example.chunk(example.student.expand(V, -1))
    p = chunk.p[0].clone()
    full = ReverseKL()(*example.chunk(example.student[None]), 1.0).grad[0]
    every = torch.arange(V)
    chunk = chunk._replace(ids=every, logprobs=chunk.log_p[0].clone())
    grads = PolicyGradient(baseline=baseline)(chunk, replace(signals, logprobs=example.q.log()), 1.0).grad
    mean = p @ grads
    variance = p @ (grads - mean).square().sum(1)
    return float(variance), float((mean - full).norm())


def spurious_kl() -> float:
    """Reverse KL that a student shows beside itself as teacher, sampled at COLD and read at 1, nats."""
    logits = Example().student
    cold, warm = (logits / COLD).log_softmax(0), logits.log_softmax(0)
    return float((cold.exp() * (cold - warm)).sum())

"""Objectives on the sampled token alone: 4 bytes of teacher signal a token."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.trainer.objectives.base import ChunkLoss, StudentChunk, TeacherRows


@dataclass(frozen=True)
class PolicyGradient:
    """Reverse KL at the sampled token as a policy gradient: -A log p(y), A = clip(log q(y) - log p(y)) held fixed.

    Its gradient averaged over y ~ p is that of the full reverse KL (without clip). `reverse_kl` is the one-sample
    estimate log p - log q. Source: Thinking Machines, "On-Policy Distillation" (2025).
    """

    advantage_clip: float | None = None

    def __call__(self, student: StudentChunk, teacher: TeacherRows, temperature: float) -> ChunkLoss:
        assert teacher.logprobs is not None, "the policy gradient needs the teacher's log-probabilities"
        advantage_C = teacher.logprobs.to(student.logprobs.dtype) - student.logprobs
        reverse_kl_C = -advantage_C
        if self.advantage_clip is not None:
            advantage_C = advantage_C.clamp(-self.advantage_clip, self.advantage_clip)
        grad_CV = student.p.mul_(advantage_C[:, None])
        grad_CV.scatter_add_(1, student.ids[:, None], -advantage_C[:, None])
        return ChunkLoss(-advantage_C * student.logprobs, grad_CV, reverse_kl_C)

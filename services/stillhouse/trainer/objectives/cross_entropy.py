"""Cross-entropy on given texts: the data's (fine-tuning) or the teacher's (sequence-level distillation).

    L = -log p(y)                                              d/dz_j = p_j - 1[j = y]

On texts of the teacher its average is the forward KL(teacher || student) between whole texts, up to the teacher's own
entropy (arXiv:1606.07947). It has no zero at p = q: the texts say what to learn, no distribution does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stillhouse.trainer.objectives.base import ChunkLoss, Signals, StudentChunk


@dataclass(frozen=True)
class CrossEntropy:
    """-log p of the token that stands there. It knows no teacher: `reverse_kl` is NaN."""

    def __call__(self, student: StudentChunk, signals: Signals, temperature: float) -> ChunkLoss:
        grad_CV = student.p
        grad_CV[torch.arange(len(student.ids), device=grad_CV.device), student.ids] -= 1
        return ChunkLoss(-student.logprobs, grad_CV, torch.full_like(student.logprobs, torch.nan))

"""Parity with TRL 1.16.0: the generalised JSD of its DistillationTrainer and ours, on the same hidden states and heads.

Compares loss and both gradients in float32, with scale, soft-cap, bias and temperature, for beta 0 (forward KL), 1
(reverse KL) and between. The reference for both is a float64 computation of the definition by autograd, so that the
table also says who is nearer. Exit status 1 above 1e-5, absolute or relative; a relative difference that is TRL's own
distance from the definition does not count.

    python benchmarks/parity_trl.py        # makes an environment for TRL under build/ the first time
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import TRL

TRL.enter()

import torch  # noqa: E402
from loss_problem import objective  # noqa: E402
from torch import Tensor  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402

from stillhouse.trainer.losses import packed_loss  # noqa: E402
from stillhouse.trainer.objectives.base import Head, Signals  # noqa: E402

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TOLERANCE = 1e-5
ROWS, VOCAB, WIDTH, TEACHER_WIDTH = 456, 34_000, 32, 48
"""More rows and tokens than one of our chunks and one of TRL's tiles hold."""
VARIANTS = {
    "plain": {},
    "temperature 0.7": {"temperature": 0.7},
    "bias, scale 0.5, soft-cap 20, temperature 1.3": {
        "temperature": 1.3,
        "bias": True,
        "scale": 0.5,
        "soft_cap": 20.0,
    },
}


class Case:
    """Leaves of student and teacher."""

    def __init__(self, *, temperature: float = 1.0, bias: bool = False, scale: float = 1.0, soft_cap: float = 0.0):
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.temperature, self.scale, self.soft_cap = temperature, scale, soft_cap
        self.hidden = normal(ROWS, WIDTH)
        self.weight = normal(VOCAB, WIDTH) * 3 / WIDTH**0.5
        self.bias = normal(VOCAB) if bias else None
        self.teacher_hidden = normal(ROWS, TEACHER_WIDTH)
        self.teacher_weight = normal(VOCAB, TEACHER_WIDTH) * 3 / TEACHER_WIDTH**0.5
        self.teacher_bias = normal(VOCAB) if bias else None

    def leaves(self, kind: torch.dtype) -> list[Tensor]:
        return [t.to(kind).requires_grad_() for t in (self.hidden, self.weight, self.bias) if t is not None]

    def ours(self, beta: float) -> list[Tensor]:
        leaves = self.leaves(torch.float32)
        head = Head(leaves[1], leaves[2] if len(leaves) > 2 else None, self.scale, self.soft_cap)
        teacher = Head(self.teacher_weight, self.teacher_bias, self.scale, self.soft_cap)
        signals = Signals(hidden=self.teacher_hidden, head=teacher)
        ids, weights = torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS,), 1 / ROWS)
        loss = packed_loss(objective(beta), leaves[0], head, ids, weights, signals, self.temperature).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def trl(self, beta: float) -> list[Tensor]:
        leaves = self.leaves(torch.float32)
        bias = leaves[2] if len(leaves) > 2 else None
        cap = self.soft_cap or None
        divergence, _ = ChunkedDivergenceFunction.apply(
            *leaves[:2], bias, self.teacher_hidden, self.teacher_weight, self.teacher_bias,
            beta, self.temperature, self.scale, cap, self.scale, cap,
        )  # fmt: skip
        loss = divergence.sum() / ROWS
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def definition(self, beta: float) -> list[Tensor]:
        """In float64, a few rows at a time, all of [rows, V] at once."""
        leaves = self.leaves(torch.float64)
        total = [torch.zeros((), dtype=torch.float64), *(torch.zeros_like(leaf) for leaf in leaves)]
        for start in range(0, ROWS, 100):
            rows = slice(start, start + 100)
            log_p = self._log_softmax(leaves[0][rows], leaves[1], leaves[2] if len(leaves) > 2 else None)
            log_q = self._log_softmax(self.teacher_hidden[rows], self.teacher_weight, self.teacher_bias)
            loss = _divergence(log_p, log_q, beta).sum() / ROWS
            for sum_, part in zip(total, [loss.detach(), *torch.autograd.grad(loss, leaves)], strict=True):
                sum_ += part
        return [value.detach() for value in total]

    def _log_softmax(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = hidden.double() @ weight.double().T
        logits = self.scale * (logits if bias is None else logits + bias.double())
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return (logits / self.temperature).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (q * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to the norm."""
    a, b = a.double(), b.double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def main() -> int:
    worst = 0.0
    print(f"{ROWS} rows, {VOCAB} tokens, student {WIDTH}, teacher {TEACHER_WIDTH} wide, float32")
    print(
        "largest difference of ours and TRL's / difference in norm, relative; (ours, TRL's to the float64 definition)"
    )
    for variant, options in VARIANTS.items():
        case = Case(**options)
        for beta in BETAS:
            ours, theirs, exact = case.ours(beta), case.trl(beta), case.definition(beta)
            cells = []
            for name, a, b, c in zip(("loss", "d hidden", "d weight", "d bias"), ours, theirs, exact, strict=False):
                absolute, relative = float((a - b).abs().max()), distance(a, b)
                is_rounding = relative <= 1.5 * distance(b, c)  # TRL itself is that far from the definition
                worst = max(worst, absolute, 0.0 if is_rounding else relative)
                cells.append(f"{name} {absolute:.0e} / {relative:.0e} ({distance(a, c):.0e}, {distance(b, c):.0e})")
            print(f"{variant:45s} beta {beta:<3g} " + "  ".join(cells), flush=True)
    print(f"worst {worst:.1e}, allowed {TOLERANCE:.0e}: {'equal' if worst <= TOLERANCE else 'DIFFERENT'}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

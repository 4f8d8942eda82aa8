"""How the student runs changes nothing but cost: packed or padded samples, activations kept or computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillhouse.core.errors import SpecError
from stillhouse.trainer import attention
from stillhouse.trainer.attention import packed_hidden, packing_obstacle
from stillhouse.trainer.student import checkpoint_activations, choose_packing, student_hidden
from tests.tiny import make_tiny_model
from tests.unit.learner_cases import FULL, POLICY_GRADIENT, Teacher, engine_of, learner, rollouts, stage, train

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LENGTHS = (7, 1, 12, 2, 5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_tiny_model(root / "student", seed=1),
        "teacher": make_tiny_model(root / "teacher", seed=3, hidden_size=16),
        "other": make_tiny_model(root / "other", seed=4),
    }


def small(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = kind(config)
    nn.Module.to(model, dtype)
    return model.eval()


def sequences() -> list[Tensor]:
    draw = np.random.default_rng(0)
    return [torch.from_numpy(draw.integers(0, 64, (1, length))) for length in LENGTHS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)], ids=["llama", "qwen3"]
)
def test_packed_hidden_states_equal_separate_ones(kind, config, dtype: torch.dtype) -> None:
    model = small(kind, config(**SMALL), dtype)
    assert choose_packing(model, "on") == (True, "the model keeps packed samples apart exactly")
    parts = sequences()
    packed = packed_hidden(model, torch.cat(parts, dim=1), LENGTHS)
    separate = torch.cat([student_hidden(model, ids) for ids in parts], dim=1)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 0.05)
    torch.testing.assert_close(packed, separate, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: small(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=16)), "looks back 16 tokens only"),
        (lambda: small(Gemma2ForCausalLM, Gemma2Config(**SMALL)), "layers of kind sliding_attention"),
        (lambda: small(LlamaForCausalLM, LlamaConfig(**{**SMALL, "attn_implementation": "eager"})), "is 'eager', not"),
    ],
    ids=["mistral", "gemma2", "eager"],
)
def test_a_model_that_does_not_keep_samples_apart_is_padded(model, reason: str) -> None:
    made = model()
    before = made.config._attn_implementation
    packs, why = choose_packing(made, "auto")
    assert not packs
    assert reason in why
    assert made.config._attn_implementation == before
    with pytest.raises(SpecError, match=f"{type(made).__name__} does not keep .* apart exactly: .*{reason}"):
        choose_packing(made, "on")
    assert choose_packing(made, "off") == (False, "the job says so")


def test_the_probe_notices_samples_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, sequence_lengths: Any = None, **kwargs: Any) -> Any:
        return attention.sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("forgetful", forgetful)
    monkeypatch.setattr(attention, "PACKED", "forgetful")
    for dtype in (torch.float32, torch.bfloat16):
        model = small(LlamaForCausalLM, LlamaConfig(**SMALL), dtype)
        assert "packed sequences differ from separate ones" in packing_obstacle(model)
        assert model.config._attn_implementation == "sdpa"


def gradients(model: Path, teachers: list[Teacher], loss: dict, max_tokens: int, packing: str, **student: Any):
    """(metrics, gradients) of one step."""
    made = learner(model, stage(loss, packing=packing, max_grad_norm=1e6), teachers=("t", "u"), **student)
    samples = [s for t, seed in zip(teachers, (0, 1), strict=True) for s in t.score(rollouts(seed), first=10 * seed)]
    seen: dict[str, Tensor] = {}

    def keep(optimizer: Any, *_: Any) -> None:
        for name, param in engine_of(made).model.named_parameters():
            if param.grad is not None:
                seen[name] = param.grad.clone()

    engine_of(made).parameters.optimizer.register_step_pre_hook(keep)
    metrics = train(made, samples, *teachers, max_tokens=max_tokens)
    assert engine_of(made).heads_loaded == metrics["heads/loaded"]
    return metrics, seen


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("loss", [FULL, POLICY_GRADIENT], ids=["reverse_kl", "policy_gradient"])
def test_packing_split_and_checkpointing_give_the_same_gradients(models: dict[str, Path], loss: dict, lora) -> None:
    teachers = [Teacher(models["teacher"], "t"), Teacher(models["other"], "u")]
    expected_metrics, expected = gradients(models["student"], teachers, loss, 1, "off", lora=lora)
    norm = expected_metrics["grad/norm"]
    assert norm > 0.1
    for packing, max_tokens, again in [
        ("on", 20, True),
        ("on", 10_000, False),
        ("off", 20, False),
        ("off", 10**4, True),
    ]:
        metrics, grads = gradients(
            models["student"], teachers, loss, max_tokens, packing, lora=lora, activation_checkpointing=again
        )
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert (grad - expected[name]).abs().max() <= 1e-5 * norm, (packing, max_tokens, again, name)
        assert metrics["loss/total"] == pytest.approx(expected_metrics["loss/total"], rel=1e-5, abs=1e-6)
        assert metrics["heads/loaded"] == (2 if loss == FULL else 0), "each head once a step"
        assert (metrics["tokens/padding_fraction"] == 0) == (packing == "on")


def saved_bytes(model: PreTrainedModel, ids: Tensor) -> tuple[int, Tensor]:
    """(bytes that a forward pass keeps for the backward pass, gradient of the embedding)."""
    kept: dict[int, int] = {}
    weights = {param.data_ptr() for param in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = student_hidden(model, ids).square().mean()
    loss.backward()
    grad: Any = model.get_input_embeddings().weight
    return sum(kept.values()), grad.grad


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_activations_take_less_memory_and_give_the_same_bits(dropout: float) -> None:
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 6}, attention_dropout=dropout)
    plain, again = (small(LlamaForCausalLM, config) for _ in range(2))
    checkpoint_activations(again)
    ids = torch.arange(60).reshape(2, 30)
    kept, expected = saved_bytes(plain, ids)
    kept_again, grad = saved_bytes(again, ids)
    assert kept_again < 0.3 * kept
    assert torch.equal(grad, expected), "dropout stays off: the student that learns is the student that sampled"
    assert not any(module.training for module in again.modules())


def test_a_model_without_marked_layers_is_refused() -> None:
    class Bare(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(2, 2)

    with pytest.raises(SpecError, match="Bare does not mark layers"):
        checkpoint_activations(Bare(LlamaConfig(**SMALL)))

"""Attention over packed sequences: each attends to itself alone, by the kernel that serves a sequence on its own.

transformers can keep packed sequences apart with a block-diagonal mask, too; that costs the square of the whole row,
this costs what the sequences cost one by one. It replaces the attention of a model whose layers all look back without
a limit; for every other model `packing_obstacle` says why not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED: Final = "stillhouse_packed"
"""Name of the attention in transformers. It has no mask function there, so no mask is made."""
PROBE_LENGTHS: Final = (5, 1, 9, 3)
"""Sequences that are compared packed and one by one; the short one could borrow from a neighbour."""
TOLERANCE: Final[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference accepted, relative to the largest hidden state: products of other shapes sum in another order. A
sequence that sees its neighbour is off by as much as the state itself."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [B, H, L, d] queries: [B, L, H, d]. With lengths (B = 1) each sequence sees itself only."""
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = (tensor.split(list(sequence_lengths), dim=2) for tensor in (query, key, value))
    outs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outs, dim=1), None


AttentionInterface.register(PACKED, packed_attention)


def packed_hidden(model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """[1, L, D] hidden states after the final norm of sequences that lie one after the other in [1, L] ids."""
    position_ids = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])[None]
    body: Any = model.base_model
    out = body(input_ids=input_ids, position_ids=position_ids, use_cache=False, sequence_lengths=tuple(lengths))
    return out.last_hidden_state


def packing_obstacle(model: PreTrainedModel) -> str:
    """Let the model take packed sequences; empty if it keeps them apart exactly, else why it does not.

    A model that does not is left as it was.
    """
    config: Any = model.config
    kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if kinds:
        return f"it has layers of kind {', '.join(kinds)}"
    if getattr(config, "sliding_window", None) is not None:
        return f"its attention looks back {config.sliding_window} tokens only"
    before = config._attn_implementation
    if before == PACKED:
        return ""
    if before != "sdpa":
        return f"its attention is '{before}', not sdpa"
    model.set_attn_implementation(PACKED)
    gap, limit = _probe(model), TOLERANCE[model.dtype]
    if gap <= limit:
        return ""
    model.set_attn_implementation(before)
    return f"packed sequences differ from separate ones by {gap:.2g} of the largest hidden state, {limit:g} is rounding"


@torch.no_grad()
def _probe(model: PreTrainedModel) -> float:
    """Largest difference between packed and separate hidden states, relative to the largest of them."""
    device, vocab_size = model.device, cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    parts = [(torch.arange(n, device=device) * 7 + 11 * n)[None] % vocab_size for n in PROBE_LENGTHS]
    try:
        packed = packed_hidden(model, torch.cat(parts, dim=1), PROBE_LENGTHS)
    except (TypeError, ValueError):  # its forward does not take position_ids or further arguments
        return float("inf")
    body: Any = model.base_model
    separate = torch.cat([body(input_ids=ids, use_cache=False).last_hidden_state for ids in parts], dim=1)
    return ((packed - separate).abs().max() / separate.abs().max()).item()

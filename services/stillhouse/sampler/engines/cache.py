"""Keys and values of the completions being written: per layer one rectangle, in it one row per completion.

Axes: B rows in a forward pass, Q tokens of each, L columns, H query heads, K key heads, G = H / K, D head size.
The token at position p of a completion has its key in column p, whatever its neighbours do. So completions of any
lengths share a forward pass, with "columns up to my own position" as mask, and prompts, parts of prompts and single
tokens are all written the same way. What stands behind the end of a row is old, finite and masked.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache

from stillhouse.core.errors import ConfigError

ATTENTION: Final = "stillhouse_rows"
"""Name of `attend` among the attention functions of transformers."""
BLOCK: Final = 128
"""Columns by which the rectangle grows. Growing copies what is there, once in so many tokens."""


class RowCache(Cache):
    """What a model's layers write their keys and values to, and where `attend` finds the masks."""

    def __init__(self, max_rows: int) -> None:
        super().__init__(layers=[])
        self._max_rows = max_rows
        self._keys: list[Tensor] = []
        """Per layer [rows, K, columns, D]; so are the values."""
        self._values: list[Tensor] = []
        self._rows = self._columns = 0
        self.max_cells: int | None = None
        """Most rows x columns; None = no limit."""

    @property
    def bytes_per_token(self) -> int:
        """In all layers; known once something was written."""
        return sum(tensor[0, :, 0].nbytes for tensor in [*self._keys, *self._values])

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a rectangle of this size is within the limit."""
        return self.max_cells is None or rows * columns <= self.max_cells

    def clear(self) -> None:
        """Free the memory. What is computed next does not depend, by layout or content, on what was before."""
        self._keys, self._values = [], []
        self._rows = self._columns = 0

    def reserve(self, rows: int, columns: int) -> None:
        """Have a rectangle of at least this size; what is in it stays. It may lose what is beyond, so `columns` are
        those of the longest row that there is, not of a new one only.
        """
        if rows <= self._rows and columns <= self._columns:
            return
        tall = max(self._rows, min(self._max_rows, 1 << (rows - 1).bit_length()))
        wide = max(self._columns, -(-columns // BLOCK) * BLOCK)
        if not self.fits(tall, wide):  # no room to spare
            tall, wide = rows, -(-columns // BLOCK) * BLOCK
        if self.max_cells is not None and not self.fits(tall, wide):
            wide = max(columns, self.max_cells // rows)
        self._rows, self._columns = min(tall, self._rows), min(wide, self._columns)  # should there be no memory
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):  # one by one: only one layer is there twice
                tensors[layer] = old.new_zeros(tall, old.shape[1], wide, old.shape[3])
                kept = old[:tall, :, :wide]
                tensors[layer][: kept.shape[0], :, : kept.shape[2]] = kept
        self._rows, self._columns = tall, wide

    def open(self, first_row: int, positions_BQ: Tensor, longest: int) -> None:
        """Announce a forward pass: rows from `first_row` on, tokens at these positions, all below `longest`."""
        end = first_row + positions_BQ.shape[0]
        self.reserve(end, longest)
        self._span, self._length, self._positions = slice(first_row, end), longest, positions_BQ
        self._index = torch.arange(first_row, end, device=positions_BQ.device)[:, None]
        self._masks: dict[int | None, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [B, K, Q, D] at the positions; gives all that the rows may look at, [B, K, L, D] each."""
        if layer_idx == len(self._keys):
            for tensors, states in ((self._keys, key_states), (self._values, value_states)):
                tensors.append(states.new_zeros(self._rows, states.shape[1], self._columns, states.shape[3]))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._index, :, self._positions] = key_states.transpose(1, 2)
        values[self._index, :, self._positions] = value_states.transpose(1, 2)
        return keys[self._span, :, : self._length], values[self._span, :, : self._length]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, Q, L] added to scores: 0 where a query may look, else -inf. `window`: columns it looks back, its own
        included."""
        if window not in self._masks:
            own_BQ1 = self._positions[:, :, None]
            columns_L = torch.arange(self._length, device=own_BQ1.device)
            seen_BQL = columns_L <= own_BQ1
            if window is not None:
                seen_BQL &= columns_L > own_BQ1 - window
            mask_BQL = torch.zeros_like(seen_BQL, dtype=dtype).masked_fill_(~seen_BQL, -torch.inf)
            self._masks[window] = mask_BQL[:, None]
        return self._masks[window]

    def snapshot(self, row: int, length: int) -> list[Tensor]:
        """Copies of the first `length` columns of a row, [K, length, D]: keys of all layers, then values."""
        return [tensor[row, :, :length].clone() for tensor in [*self._keys, *self._values]]

    def restore(self, first_row: int, end_row: int, snapshot: list[Tensor]) -> None:
        """Put a snapshot at the beginning of rows, for which there is room."""
        for tensor, saved in zip([*self._keys, *self._values], snapshot, strict=True):
            tensor[first_row:end_row, :, : saved.shape[1]] = saved

    def move(self, source: int, target: int, length: int) -> None:
        """Let the first `length` columns of one row be those of another one."""
        for tensor in [*self._keys, *self._values]:
            tensor[target, :, :length] = tensor[source, :, :length]

    def wipe(self, row: int) -> None:
        """Zero a row with NaNs in it: a mask does not hide them."""
        for tensor in [*self._keys, *self._values]:
            tensor[row].zero_()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    row_cache: RowCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, H, Q, D] queries to a `RowCache`; gives [B, Q, H, D].

    No key is copied for each of the G query heads that share it: with one query per row, the G heads are G queries of
    one head; with more, they take turns.
    """
    if row_cache is None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ConfigError(f"{type(module).__name__} attends in a way that this engine does not know; use vllm")
    rows, heads, queries, size = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], queries, size)
    mask = row_cache.mask(sliding_window, query.dtype)
    if queries == 1:
        output = _attend(grouped[:, :, :, 0], key, value, mask, scaling, softcap)
    else:
        turns = [_attend(each, key, value, mask, scaling, softcap) for each in grouped.unbind(2)]
        output = torch.stack(turns, dim=2)
    return output.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """[B, K, N, D] for N queries per key head, scores capped to +-softcap (Gemma 2) before the mask."""
    if softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(ATTENTION, attend)

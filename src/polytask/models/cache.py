"""Keys and values of tokens already seen, so that generation costs one token per step.

Rows may have different lengths: each row's new tokens go to its own next free slots, so a padded
prompt leaves no hole. Decoding with the cache equals a full forward pass (tested).

Legend: S sequences, K key heads, C slots, E head width, N new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Grows as needed. `length` (S,) counts the valid tokens of each row; `width` bounds it."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.memory: list[tuple[Tensor, Tensor]] = []  # cross-attention: computed once
        self.length: Tensor | None = None
        self.width = 0
        self.ragged = False
        self._position: Tensor | None = None

    def begin(self, rows: int, new: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """Absolute positions (S, N) of `new` tokens per row, of which `valid` (S,) count."""
        if self.length is None:
            self.length = torch.zeros(rows, dtype=torch.long, device=device)
        if self.length.shape[0] != rows:
            raise ValueError(f"the cache holds {self.length.shape[0]} rows, the input has {rows}")
        position = self.length[:, None] + torch.arange(new, device=device)
        self.ragged = self.ragged or valid is not None
        self._position = position
        return position

    def write(self, layer: int, key_SKNE: Tensor, value_SKNE: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all of them up to the new width."""
        assert self._position is not None
        end = self.width + key_SKNE.shape[2]
        if layer == len(self.keys):
            self.keys.append(key_SKNE.new_empty(0))
            self.values.append(value_SKNE.new_empty(0))
        self.keys[layer] = self._put(self.keys[layer], key_SKNE, end)
        self.values[layer] = self._put(self.values[layer], value_SKNE, end)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def finish(self, new: int, valid: Tensor | None) -> None:
        """All layers have written: count the new tokens."""
        assert self.length is not None
        self.length = self.length + (new if valid is None else valid)
        self.width += new

    def select(self, rows: Tensor) -> None:
        """Keep some rows (int64), in that order; a row may be taken twice."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.memory = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.memory]
        if self.length is not None:
            self.length = self.length.index_select(0, rows)

    def _put(self, store: Tensor, new_SKNE: Tensor, end: int) -> Tensor:
        capacity = store.shape[2] if store.dim() == 4 else 0
        if end > capacity:
            rows, heads, _, width = new_SKNE.shape
            grown = new_SKNE.new_zeros(rows, heads, max(end, 2 * capacity, 16), width)
            if capacity:
                grown[:, :, :capacity] = store
            store = grown
        if not self.ragged:
            store[:, :, self.width : end] = new_SKNE
            return store
        assert self._position is not None
        slot = self._position[:, None, :, None].expand_as(new_SKNE)
        return store.scatter_(2, slot, new_SKNE)

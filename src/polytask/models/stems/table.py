"""Table rows to tokens, one per column (FT-Transformer, Gorishniy et al. 2021, 2106.11959)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polytask.models.batch import Batch
from polytask.models.stems.entries import Entries


class TableStem(nn.Module):
    """Number column: value * weight[column] + bias[column]; a learned token where it is missing.
    Category: an embedding per category of each column, missing being a category of its own."""

    def __init__(self, numbers: int, categories: int, dim: int) -> None:
        super().__init__()
        # No parameter is empty: a table may have no number or no category column at all.
        self.weight = nn.Embedding(max(1, numbers), dim)
        self.bias = nn.Embedding(max(1, numbers), dim)
        self.missing = nn.Embedding(max(1, numbers), dim)
        self.category = nn.Embedding(max(1, categories), dim)

    def forward(self, batch: Batch) -> Entries:
        tokens: list[Tensor] = []
        valid: list[np.ndarray] = []
        if "table.number" in batch.fields:
            tokens.append(
                self._numbers(batch.fields["table.number"], batch.fields["table.number_id"])
            )
            valid.append(batch.known("table.number_id") >= 0)
        if "table.category" in batch.fields:
            tokens.append(self.category(batch.fields["table.category"].clamp(min=0)))
            valid.append(batch.known("table.category") >= 0)
        real = np.concatenate(valid, 1)
        return Entries(
            torch.cat(tokens, 1),
            batch.known("table.sequence"),
            valid=None if real.all() else real,
        )

    def _numbers(self, value: Tensor, column: Tensor) -> Tensor:
        column = column.clamp(min=0)
        unknown = value.isnan()[..., None]
        known = value.nan_to_num(0.0)[..., None] * self.weight(column)
        tokens: Tensor = torch.where(unknown, self.missing(column), known) + self.bias(column)
        return tokens

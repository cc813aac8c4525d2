"""Features computed elsewhere (embeddings, descriptors) to tokens: one per time step."""

from __future__ import annotations

from torch import nn

from polytask.models.batch import Batch
from polytask.models.stems.entries import Entries


class FeatureStem(nn.Module):
    """Layer norm, then one linear layer; narrower features are padded with zeros."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)

    def forward(self, batch: Batch) -> Entries:
        values = batch.fields["features.values"]
        values = nn.functional.pad(values, (0, self.width - values.shape[-1]))
        tokens = self.project(self.norm(values.to(self.norm.weight.dtype)))
        return Entries(tokens, batch.known("features.sequence"), batch.known("features.length"))

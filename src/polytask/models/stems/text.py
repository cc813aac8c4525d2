"""Token ids to embeddings."""

from __future__ import annotations

from torch import nn

from polytask.models.batch import Batch
from polytask.models.stems.entries import Entries


class TextStem(nn.Module):
    """A table of embeddings. Generation scores tokens against the same table when tied."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)

    def forward(self, batch: Batch) -> Entries:
        tokens = self.embedding(batch.fields["text.ids"])
        return Entries(tokens, batch.known("text.sequence"), batch.known("text.length"))

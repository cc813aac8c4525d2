"""The micro-batches of one step, and what can be counted about them on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class StepBatches:
    """The micro-batches of a step; moved to the device one at a time, in every pass over them."""

    def __init__(self, batches: Sequence[Any], device: torch.device) -> None:
        self.batches = batches
        self.device = device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.device.type == "cpu":
            return iter(self.batches)
        return (batch.to(self.device, non_blocking=True) for batch in self.batches)

    @property
    def rows(self) -> int:
        return sum(getattr(batch, "rows", 0) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Positions that the stems see: the sum of all lengths."""
        return sum(
            int(value.sum())
            for batch in self.batches
            for name, value in getattr(batch, "fields", {}).items()
            if name.endswith(".length")
        )

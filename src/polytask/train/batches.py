"""The micro-batches of one step, and what can be counted about them on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


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
        """Positions that the stems see: the sum of all lengths; a batch may say itself."""
        return sum(getattr(batch, "tokens", 0) for batch in self.batches) + sum(
            int(value.sum())
            for batch in self.batches
            for name, value in getattr(batch, "fields", {}).items()
            if name.endswith(".length")
        )

    def seen(self) -> tuple[Array, Array]:
        """For the ledger: the task of each labelled pair (pairs,), and (2, entries) task and
        tokens of each entry with a length; an entry counts for the first task of its row."""
        pairs: list[Array] = []
        tokens: list[Array] = [np.zeros((2, 0), np.int64)]
        for batch in self.batches:
            if hasattr(batch, "booked"):
                ids, counts = batch.booked()
                pairs.append(ids)
                tokens.append(counts)
                continue
            pairs += [target.task.numpy() for target in batch.targets.values()]
            for name, value in batch.fields.items():
                modality, _, part = name.partition(".")
                if part == "length":
                    owner = batch.task[batch.fields[f"{modality}.sequence"]]
                    tokens.append(np.stack([owner.numpy(), value.numpy()]))
        ids = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
        return ids, np.concatenate(tokens, axis=1)

"""Losses on validation rows for mixtures that follow them: never rows that are trained on.

for each row group: its first `limit` rows of the split, encoded once and kept as batches
losses(model) = per task, mean over its labelled rows of the sum of its loss terms
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from polytask.data.rows import RowSource
from polytask.models.collate import Collator
from polytask.train.gradients import Objective, StepSums, model_terms
from polytask.train.loader import Loader

Array = npt.NDArray[Any]


class Validation(Protocol):
    """What the trainer asks of it."""

    def due(self, step: int) -> bool:
        """Whether the mixture wants validation losses before this step."""

    def measure(self, model: nn.Module, step: int) -> Array:
        """Mean loss per task (tasks,), NaN where no row is labelled; the model is in evaluation
        mode."""

    def tell(self, step: int, losses: Array) -> Mapping[str, Any]:
        """Give the mixture the losses (of every process the same); what there is to log."""


class MixtureValidation:
    """Validation losses for a loader's mixture.

    Args:
        loader: whose policy asks, and whose task set has the rows.
        split: where they are from.
        limit: rows per row group, at most.
        batch_size: rows of a forward pass.
        objective: as the trainer's.
    """

    def __init__(
        self,
        loader: Loader,
        split: str = "valid",
        limit: int = 512,
        batch_size: int = 256,
        objective: Objective = model_terms,
    ) -> None:
        self.loader = loader
        self.split, self.limit, self.batch_size = split, limit, batch_size
        self.objective = objective
        self._batches: list[Any] = []

    def due(self, step: int) -> bool:
        return self.loader.wants_validation(step)

    def tell(self, step: int, losses: Array) -> Mapping[str, Any]:
        shares = self.loader.validated(step, losses)
        known = {
            name: float(loss) for name, loss in zip(self.loader.tasks, losses) if not np.isnan(loss)
        }
        return {"after": step, "shares": dict(shares), "losses": known}

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int = 0) -> Array:
        if not self._batches:
            self._batches = list(self._read())
        device = next(model.parameters()).device
        sums = StepSums.empty(len(self.loader.tasks), device)
        for batch in self._batches:
            sums.add(self.objective(model, batch if device.type == "cpu" else batch.to(device)))
        found: Array = (sums.losses.double() / sums.pairs.double()).cpu().numpy()  # 0 / 0 is NaN
        return found

    def _read(self) -> Iterator[Any]:
        taskset, processor = self.loader.taskset, self.loader.processor
        collate = Collator.of(taskset, int(getattr(processor, "pad_id", 0) or 0))
        for number, group in enumerate(taskset.groups):
            source = group.splits[self.split]
            if isinstance(source, RowSource):
                rows = source.take(range(min(self.limit, len(source))))
            else:
                rows = list(islice(source.read_from(0), self.limit))
            for first in range(0, len(rows), self.batch_size):
                some = rows[first : first + self.batch_size]
                places = range(first, first + len(some))
                examples = processor.encode(
                    number, some, _places(source, first), indices=list(places)
                )
                yield collate(examples, [number] * len(examples))


def _places(source: Any, first: int) -> Callable[[int], str]:
    """Where a row of a batch stands, for messages."""
    return lambda i: str(source.where(first + i))

"""What all heads share: their inputs (`Pairs`), their result (`Output`) and which labels count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask.models.batch import Batch, Target
from polytask.models.features import Features
from polytask.models.specs import HeadSpec, ModelConfig, ObjectiveConfig
from polytask.models.task_linear import HostArray


@dataclass(frozen=True)
class Pairs:
    """The pairs of one kind in a batch; `slot` counts tasks within the kind."""

    target: Target
    slot: HostArray  # (P,) host
    sequence: HostArray  # (P, k) host
    value: HostArray | None = None  # (P, T) host labels of token kinds
    index: HostArray | None = (
        None  # (P,) host: each pair's place in the batch, if some are left out
    )

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(frozen=True)
class Output:
    """A head's result: one row per pair, or per token with `pair` saying whose token it is."""

    value: Tensor
    task: Tensor  # (P,)
    row: Tensor  # (P,)
    pair: Tensor | None = None  # (N,)
    position: Tensor | None = None  # (N,) index into text.ids
    loc: Tensor | None = None  # (P, channels) forecasts
    scale: Tensor | None = None


class Head(nn.Module, ABC):
    """Base: knows the specs of its tasks. Subclasses say how labels are scored."""

    def __init__(self, specs: Sequence[HeadSpec], config: ModelConfig) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.objective: ObjectiveConfig = config.objective

    @abstractmethod
    def forward(self, features: Features, pairs: Pairs) -> Output:
        """Scores of the pairs."""

    @abstractmethod
    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        """Terms, each (P,) float32."""

    @abstractmethod
    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """Predictions in the user's units, one row per pair."""

    def terms(self, features: Features, pairs: Pairs) -> dict[str, Tensor]:
        """`losses` straight from features."""
        return self.losses(self(features, pairs), pairs)

    def task_rows(self, slot: int) -> dict[str, slice]:
        """Parameter name -> the rows that belong to one task; a parameter that is not listed is
        shared by all tasks of the kind."""
        return {}


def pooled(features: Features, pairs: Pairs) -> Tensor:
    """(P, D) the vectors of the pairs' first sequences."""
    return features.pooled.index_select(0, pairs.target.sequence[:, 0])


def on_device(array: HostArray, like: Tensor) -> Tensor:
    """A host index array as a tensor beside `like`."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)


def known_pairs(kind: str, target: Target) -> Tensor:
    """(P,) bool: whether a pair has any known label."""
    value = target.value
    if kind in ("classify", "choice", "match"):
        return value >= 0
    if kind in ("tag", "generate"):
        return (value != -100).any(1)
    return ~value.isnan().flatten(1).all(1)


def pairs_of(kind: str, batch: Batch, slot_of: HostArray, keep: Tensor | None) -> Pairs:
    """The pairs of a kind (at `keep`, if given). `slot_of` maps task ids to slots of the kind."""
    target = batch.targets[kind]
    task, sequence = batch.known(f"{kind}.task"), batch.known(f"{kind}.sequence")
    value = batch.known(f"{kind}.value") if kind in ("tag", "generate") else None
    index = None
    if keep is not None:
        target = target.select(keep)
        index = keep.cpu().numpy()
        task, sequence = task[index], sequence[index]
        value = None if value is None else value[index]
    return Pairs(target, slot_of[task], sequence, value, index)

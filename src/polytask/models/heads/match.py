"""Matching: which b belongs to an a. Both go through one projection to the unit sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask import objectives
from polytask.models.features import Features
from polytask.models.heads.base import Head, Output, Pairs, on_device
from polytask.models.heads.vectors import to_numpy
from polytask.models.specs import HeadSpec, ModelConfig

# Temperatures below this make the loss so sharp that training diverges (CLIP stops at 0.01).
_COLDEST = 0.01


class MatchHead(Head):
    """A projection shared by all matching tasks, and a learned temperature per task."""

    def __init__(self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int) -> None:
        super().__init__(specs, config)
        self.project = nn.Linear(dim, config.match_dim, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(s.temperature) for s in specs]))

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, 2, match_dim) unit vectors of a and b."""
        sequence = pairs.target.sequence
        x = self.project(features.pooled.index_select(0, sequence[:, :2].flatten()))
        unit = nn.functional.normalize(x.float(), dim=-1)
        return Output(unit.view(len(pairs), 2, -1), pairs.target.task, pairs.target.row)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        temperature = self.log_temperature.float().exp().clamp(min=_COLDEST)
        a, b = output.value.unbind(1)
        target = pairs.target
        of_pair = temperature[on_device(pairs.slot, a)]
        return {"match": objectives.info_nce(a, b, target.task, target.value, of_pair)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, 2, match_dim) unit vectors: similarity is their product."""
        return to_numpy(output.value)

    def task_rows(self, slot: int) -> dict[str, slice]:
        return {"log_temperature": slice(slot, slot + 1)}

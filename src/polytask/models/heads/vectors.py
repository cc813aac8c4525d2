"""Heads that read one vector per sequence: classify, multilabel, regress, choice.

Legend: P pairs, C classes, O outputs, K candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask import objectives
from polytask.models.features import Features
from polytask.models.heads.base import Head, Output, Pairs, on_device, pooled
from polytask.models.specs import HeadSpec, ModelConfig
from polytask.models.task_linear import TaskLinear


def to_numpy(x: Tensor) -> npt.NDArray[Any]:
    """A detached host copy; bfloat16, which NumPy lacks, as float32."""
    x = x.detach()
    return (x.float() if x.is_floating_point() else x).cpu().numpy()


def widened(value: Tensor, width: int, fill: float) -> Tensor:
    """Columns added at the end up to `width`."""
    missing = width - value.shape[1]
    return torch.nn.functional.pad(value, (0, missing), value=fill) if missing > 0 else value


class ClassifyHead(Head):
    """One of C classes."""

    def __init__(self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int) -> None:
        super().__init__(specs, config)
        self.linear = TaskLinear(dim, [s.task for s in specs], [s.outputs for s in specs])

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, C) logits, minus infinity beyond a task's own classes."""
        logits = self.linear(pooled(features, pairs), pairs.slot)
        width = self.linear.width(pairs.slot)
        if (width != logits.shape[1]).any():
            logits = objectives.mask_classes(logits, on_device(width, logits))
        return Output(logits, pairs.target.task, pairs.target.row)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        smoothing = self.objective.label_smoothing
        return {"classify": objectives.cross_entropy(output.value, pairs.target.value, smoothing)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, C) probabilities; 0 beyond a task's own classes."""
        return to_numpy(output.value.float().softmax(-1))

    def task_rows(self, slot: int) -> dict[str, slice]:
        rows = self.linear.rows(slot)
        return {"linear.weight": rows, "linear.bias": rows}


class MultiLabelHead(ClassifyHead):
    """Any of C classes; unknown ones are NaN."""

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, C) logits; columns beyond a task's own classes have no meaning."""
        logits = self.linear(pooled(features, pairs), pairs.slot)
        return Output(logits, pairs.target.task, pairs.target.row)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        target = widened(pairs.target.value, output.value.shape[1], float("nan"))
        return {"multilabel": objectives.binary_cross_entropy(output.value, target)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, C) probabilities; NaN beyond a task's own classes."""
        return _own_columns(output.value.float().sigmoid(), self.linear, pairs)


class RegressHead(ClassifyHead):
    """O numbers, learned in standardised units."""

    def __init__(self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int) -> None:
        super().__init__(specs, config, dim)
        width = max(s.outputs for s in specs)
        table = np.zeros((2, len(specs), width), np.float32)
        table[1] = 1.0
        for i, s in enumerate(specs):
            table[0, i, : s.outputs] = s.mean or 0.0
            table[1, i, : s.outputs] = s.std or 1.0
        self.mean: Tensor
        self.std: Tensor
        # Part of the specification, not of the state: a checkpoint need not repeat it.
        self.register_buffer("mean", torch.from_numpy(table[0]), persistent=False)
        self.register_buffer("std", torch.from_numpy(table[1]), persistent=False)

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, O) in standardised units."""
        value = self.linear(pooled(features, pairs), pairs.slot)
        return Output(value, pairs.target.task, pairs.target.row)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        mean, std = self._units(output.value, pairs)
        target = widened(pairs.target.value, output.value.shape[1], float("nan"))
        shape = self.objective.regress
        return {"regress": objectives.regression(output.value, target, mean, std, shape)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, O) in raw units; NaN beyond a task's own outputs."""
        mean, std = self._units(output.value, pairs)
        return _own_columns(output.value.float() * std + mean, self.linear, pairs)

    def _units(self, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        slot = on_device(pairs.slot, value)
        width = value.shape[1]
        return self.mean[slot, :width].float(), self.std[slot, :width].float()


class ChoiceHead(Head):
    """One score per candidate sequence; candidates differ from row to row."""

    def __init__(self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int) -> None:
        super().__init__(specs, config)
        self.linear = TaskLinear(dim, [s.task for s in specs], [1] * len(specs))

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, K) scores, minus infinity where a row has fewer candidates."""
        sequence = pairs.target.sequence
        rows, width = sequence.shape
        x = features.pooled.index_select(0, sequence.clamp(min=0).flatten())
        score = self.linear(x, np.repeat(pairs.slot, width)).view(rows, width)
        score = score.masked_fill(sequence < 0, float("-inf"))
        return Output(score, pairs.target.task, pairs.target.row)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        smoothing = self.objective.label_smoothing
        return {"choice": objectives.cross_entropy(output.value, pairs.target.value, smoothing)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, K) probabilities; 0 where a row has fewer candidates."""
        return to_numpy(output.value.float().softmax(-1))

    def task_rows(self, slot: int) -> dict[str, slice]:
        rows = self.linear.rows(slot)
        return {"linear.weight": rows, "linear.bias": rows}


def _own_columns(value: Tensor, linear: TaskLinear, pairs: Pairs) -> npt.NDArray[Any]:
    found = to_numpy(value)
    column = np.arange(found.shape[1])
    return np.where(column < linear.width(pairs.slot)[:, None], found, np.float32(np.nan))

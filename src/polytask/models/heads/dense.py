"""Dense prediction: every image patch predicts its own pixels; the grid is then resized to the
label's.

Legend: P pairs, C classes (or 1), T patches, Y label height, X label width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask import objectives
from polytask.models.features import Features
from polytask.models.heads.base import Head, Output, Pairs, on_device
from polytask.models.heads.vectors import to_numpy
from polytask.models.specs import HeadSpec, ModelConfig
from polytask.models.stems.image import fold
from polytask.models.task_linear import TaskLinear


class DenseHead(Head):
    """A class or a value per pixel of the label's grid."""

    def __init__(
        self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int, patches: int, patch: int
    ) -> None:
        super().__init__(specs, config)
        self.patches = patches
        self.patch = patch
        names = [s.task for s in specs]
        self.linear = TaskLinear(dim, names, [s.outputs * patch * patch for s in specs])
        self.shape = np.array([(s.height, s.width) for s in specs], np.int64)
        self.classes = np.array([s.classes for s in specs], np.int64)

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, C, Y, X) logits or values (channel 0), padded to the largest grid in the batch."""
        place = features.places(pairs.sequence[:, 0], "image", np.arange(self.patches)[None])
        hidden = features.hidden.flatten(0, 1)
        x = hidden.index_select(0, on_device(place.reshape(-1), hidden))
        flat = self.linear(x, np.repeat(pairs.slot, self.patches))
        grid = fold(flat.view(len(pairs), self.patches, -1), self.patch)
        channels = np.maximum(1, self.classes[pairs.slot])
        if (channels != grid.shape[1]).any():
            column = torch.arange(grid.shape[1], device=grid.device)
            beyond = column >= on_device(channels, grid)[:, None]
            grid = grid.masked_fill(beyond[:, :, None, None], float("-inf"))
        grid = self._resized(grid, pairs)
        return Output(grid, pairs.target.task, pairs.target.row)

    def _resized(self, grid: Tensor, pairs: Pairs) -> Tensor:
        """Each pair's grid at its task's height and width, bilinearly."""
        shape = self.shape[pairs.slot]
        sizes = np.unique(shape, axis=0)
        if len(sizes) == 1:
            return self._resize(grid, sizes[0])
        tallest, widest = (int(n) for n in shape.max(0))
        out = grid.new_zeros(len(pairs), grid.shape[1], tallest, widest)
        for size in sizes:
            index = on_device(np.nonzero((shape == size).all(1))[0], grid)
            part = self._resize(grid.index_select(0, index), size)
            right, below = widest - int(size[1]), tallest - int(size[0])
            out = out.index_copy(0, index, nn.functional.pad(part, (0, right, 0, below)))
        return out

    @staticmethod
    def _resize(grid: Tensor, size: npt.NDArray[Any]) -> Tensor:
        wanted = (int(size[0]), int(size[1]))
        if tuple(grid.shape[2:]) == wanted:
            return grid
        # Padding channels hold minus infinity; interpolation would make them NaN (0 * inf).
        finite = grid.clamp(min=-1e30)
        return nn.functional.interpolate(finite, wanted, mode="bilinear", align_corners=False)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        value, target = output.value, pairs.target.value
        grow = (0, value.shape[3] - target.shape[2], 0, value.shape[2] - target.shape[1])
        target = nn.functional.pad(target, grow, value=float("nan"))
        has_classes = self.classes[pairs.slot] > 0
        loss = value.new_zeros(len(pairs), dtype=torch.float32)
        for chosen, measure in ((has_classes, _classes), (~has_classes, _values)):
            if chosen.any():
                index = on_device(np.nonzero(chosen)[0], value)
                part = measure(value.index_select(0, index), target.index_select(0, index))
                loss = loss.index_copy(0, index, part)
        return {"dense": loss}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, Y, X) float32 class numbers or values; NaN beyond a task's own grid."""
        value = output.value.float()
        has_classes = on_device(self.classes[pairs.slot] > 0, value)
        best = value.argmax(1).float()
        found = to_numpy(torch.where(has_classes[:, None, None], best, value[:, 0]))
        shape = self.shape[pairs.slot]
        y, x = np.arange(found.shape[1])[:, None], np.arange(found.shape[2])
        real = (y < shape[:, 0, None, None]) & (x < shape[:, 1, None, None])
        return np.where(real, found, np.float32(np.nan))

    def task_rows(self, slot: int) -> dict[str, slice]:
        rows = self.linear.rows(slot)
        return {"linear.weight": rows, "linear.bias": rows}


def _classes(logits: Tensor, target: Tensor) -> Tensor:
    return objectives.dense_cross_entropy(logits, target)


def _values(value: Tensor, target: Tensor) -> Tensor:
    return objectives.dense_absolute(value[:, 0], target)

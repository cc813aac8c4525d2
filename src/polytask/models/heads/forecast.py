"""Forecasts: the last patches of a series, flattened, or its summary, through one linear layer.

The layer works in the series' own units (loc 0, scale 1), so one task serves all scales.

Legend: P pairs, H horizon, C channels, T patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import pad

from polytask import objectives
from polytask.models.features import Features
from polytask.models.heads.base import Head, Output, Pairs, on_device, pooled
from polytask.models.heads.vectors import to_numpy
from polytask.models.specs import HeadSpec, ModelConfig
from polytask.models.task_linear import TaskLinear


class ForecastHead(Head):
    """H steps of C channels per pair."""

    def __init__(
        self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int, patches: int
    ) -> None:
        super().__init__(specs, config)
        self.patches = patches if config.forecast_from == "patches" else 0
        self.level = int(config.series_level)
        names, outputs = [s.task for s in specs], [s.outputs for s in specs]
        self.linear = TaskLinear(dim * max(1, self.patches), names, outputs)
        self.shape = np.array([(s.horizon, s.channels) for s in specs], np.int64)

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(P, H, C) in each series' own units; 0 beyond a task's own horizon and channels."""
        entry = features.entry(pairs.sequence[:, 0], "series")
        x = self._last_patches(features, pairs, entry) if self.patches else pooled(features, pairs)
        value = self._arranged(self.linear(x, pairs.slot), pairs)
        series = features.entries["series"]
        assert series.loc is not None and series.scale is not None
        index = on_device(entry, value)
        missing = value.shape[2] - series.loc.shape[1]
        loc = pad(series.loc[index], (0, max(0, missing)))[:, : value.shape[2]]
        scale = pad(series.scale[index], (0, max(0, missing)), value=1.0)[:, : value.shape[2]]
        return Output(value, pairs.target.task, pairs.target.row, loc=loc, scale=scale)

    def _last_patches(self, features: Features, pairs: Pairs, entry: npt.NDArray[Any]) -> Tensor:
        """(P, T D): older patches that a short series lacks are 0."""
        count = features.layout.count["series"][entry]
        step = (count - self.patches)[:, None] + np.arange(self.patches)
        real = step >= self.level
        place = features.places(pairs.sequence[:, 0], "series", np.where(real, step, 0))
        hidden = features.hidden.flatten(0, 1)
        x = hidden.index_select(0, on_device(place.reshape(-1), hidden))
        x = x.view(len(pairs), self.patches, -1)
        if not real.all():
            x = x * on_device(real, x)[..., None]
        return x.flatten(1)

    def _arranged(self, flat: Tensor, pairs: Pairs) -> Tensor:
        """(P, outputs) to (P, H, C) with the largest H and C among the pairs' tasks."""
        shape = self.shape[pairs.slot]
        horizon, channels = (int(n) for n in shape.max(0))
        if (shape == (horizon, channels)).all():
            return flat[:, : horizon * channels].reshape(len(pairs), horizon, channels)
        h, c = np.arange(horizon)[:, None], np.arange(channels)
        real = (h < shape[:, 0, None, None]) & (c < shape[:, 1, None, None])
        index = np.where(real, h * shape[:, 1, None, None] + c, 0)
        value = flat.gather(1, on_device(index.reshape(len(pairs), -1), flat)).view(real.shape)
        return value * on_device(real, flat)

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        assert output.loc is not None and output.scale is not None
        value, target = output.value, pairs.target.value
        grow = (0, value.shape[2] - target.shape[2], 0, value.shape[1] - target.shape[1])
        target = pad(target, grow, value=float("nan"))
        shape = self.objective.forecast
        return {"forecast": objectives.forecast(value, target, output.loc, output.scale, shape)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, H, C) in raw units; NaN beyond a task's own horizon and channels."""
        assert output.loc is not None and output.scale is not None
        raw = to_numpy(output.value.float() * output.scale[:, None] + output.loc[:, None])
        shape = self.shape[pairs.slot]
        h, c = np.arange(raw.shape[1])[:, None], np.arange(raw.shape[2])
        real = (h < shape[:, 0, None, None]) & (c < shape[:, 1, None, None])
        return np.where(real, raw, np.float32(np.nan))

    def task_rows(self, slot: int) -> dict[str, slice]:
        rows = self.linear.rows(slot)
        return {"linear.weight": rows, "linear.bias": rows}

"""What an evaluation hands back: a `TaskScore` per task, with what a paired bootstrap needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.evaluate.intervals import resampled, resampled_indices
from polytask.evaluate.metric import Floats, Metric, find_metric

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskScore:
    """The scores of one task on one split.

    metrics      value by name, over all labelled rows; NaN where undefined
    primary      the metric that stands for the task
    per_example  (n,) the primary metric of each row by itself (accuracy: right or wrong; RMSE:
                 |error|); NaN throughout for a metric of ranks, which one row does not have
    rows, n      row numbers within the split (ascending), and how many
    group        name of the row group: tasks of one group are scored on the same rows
    statistics   metric -> (n, k) summands; raw: arrays of the metrics that are not sums
    skipped      metrics that were asked for and need written texts, which were not generated
    """

    task: str
    head: str
    metrics: dict[str, float]
    primary: str
    per_example: Floats
    rows: Ints
    group: str = ""
    statistics: Mapping[str, Floats] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]

    @property
    def higher_is_better(self) -> bool:
        return self.metric(self.primary).higher_is_better

    def metric(self, name: str) -> Metric:
        """The metric by its name in `metrics`."""
        return find_metric(name, self.head)

    def draws(self, name: str, resamples: int, seed: int) -> Floats:
        """(resamples,) the metric on bootstrap resamples of the rows."""
        if name in self.statistics:
            finish = self.metric(name).finish
            assert finish is not None
            return resampled(self.statistics[name], finish, resamples, seed)
        return np.fromiter(self._recomputed(name, resamples, seed), np.float64, resamples)

    def _recomputed(self, name: str, resamples: int, seed: int) -> Iterator[float]:
        metric = self.metric(name)
        for index in resampled_indices(self.n, resamples, seed):
            yield metric(self.raw["prediction"][index], self.raw["target"][index])


def primary_of(schema: Any, names: Sequence[str]) -> str:
    """The schema's own primary metric where it was computed, else the first that was."""
    primary = str(schema.primary)
    return primary if primary in names or not names else names[0]


def table(scores: Mapping[str, TaskScore]) -> list[dict[str, Any]]:
    """A row per task, ready to print: task, rows, primary metric, value, and all other metrics."""
    return [
        {
            "task": name,
            "rows": score.n,
            "metric": score.primary,
            "value": score.value,
            "higher_is_better": score.higher_is_better,
            "metrics": dict(score.metrics),
        }
        for name, score in scores.items()
    ]

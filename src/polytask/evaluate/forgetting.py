"""What happens to old tasks while new ones are learned: the task x step score matrix.

R[k, t] is the score of task t at step k (step 0 = before any training), always higher = better;
`learned[t]` is the step at which training on t ended (0 for a task known from the start).

    average(k)          mean of R[k, t] over tasks learned by k              (Lopez-Paz 2017: ACC)
    backward transfer   mean over t learned before the end of R[K, t] - R[learned_t, t]    (BWT)
    forward transfer    mean over t >= 2 of R[began_t, t] - baseline_t                     (FWT)
    forgetting(k)       mean over t learned before k of max_{l<k} R[l, t] - R[k, t]  (Chaudhry 2018)
    accumulation(k)     mean of R[k, t] over the tasks of the stream; retention(k) over held-out
                        ones                                     (Roth et al. 2024, FoMo-in-Flux)
    stability gap       of one curve after a change at its first point: depth = R(0) - min R,
                        recovery = first step at or after the minimum with R >= R(0),
                        area = sum max(0, R(0) - R) dt           (De Lange et al. 2023; Guo et al.)

Sources: arXiv 1706.08840, 1801.10112, 2205.13452, 2406.14833, 2408.14471.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.errors import UserError, suggestion
from polytask.evaluate.metric import Floats


@dataclass(frozen=True)
class Gap:
    """One stability gap; `recovery` None: it never came back within the curve."""

    depth: float
    recovery: float | None
    area: float


def stability_gap(curve: npt.ArrayLike, steps: npt.ArrayLike | None = None) -> Gap:
    """The gap of a curve of scores (higher is better) whose first point is before the change.

    `steps` (points,) ascending positions of the points (tokens, say); None: 0, 1, 2, ... The area
    weighs each point by the distance from the one before.
    """
    y = np.asarray(curve, np.float64)
    x = np.arange(len(y), dtype=np.float64) if steps is None else np.asarray(steps, np.float64)
    if y.ndim != 1 or y.shape != x.shape or len(y) < 2:
        raise ValueError(
            f"a gap needs at least two points with positions, got {y.shape}, {x.shape}"
        )
    if not np.isfinite(y).all() or (np.diff(x) <= 0).any():
        raise ValueError("a gap needs finite scores at ascending positions")
    below = np.maximum(0.0, y[0] - y)
    lowest = int(y.argmin())
    back = np.flatnonzero(y[lowest:] >= y[0])
    recovery = float(x[lowest + back[0]] - x[0]) if len(back) else None
    return Gap(float(below.max()), recovery, float((below[1:] * np.diff(x)).sum()))


class ScoreMatrix:
    """R (steps, tasks) with when each task was learned; NaN where a task was not judged.

    `began[t]` is the last step before training on t began (default: the step before `learned`).
    `held_out`: tasks never trained on, for retention. `higher_is_better` flips the sign of
    metrics such as loss, so that every number below reads 'more is better'.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        scores: npt.ArrayLike,
        learned: Mapping[str, int],
        held_out: Sequence[str] = (),
        baseline: Mapping[str, float] | None = None,
        higher_is_better: Mapping[str, bool] | None = None,
        began: Mapping[str, int] | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        values = np.asarray(scores, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.tasks) or len(values) < 1:
            raise UserError(f"scores {values.shape} should be (steps, {len(self.tasks)} tasks)")
        for name in (*learned, *held_out, *(baseline or {}), *(began or {})):
            if name not in self.tasks:
                raise UserError(f"there is no task '{name}'.{suggestion(name, self.tasks)}")
        missing = [t for t in self.tasks if t not in learned and t not in held_out]
        if missing:
            raise UserError(f"say when '{missing[0]}' was learned, or that it is held out")
        up = higher_is_better or {}
        self.sign = np.array([1.0 if up.get(t, True) else -1.0 for t in self.tasks])
        self.R = values * self.sign
        self.learned = {name: int(step) for name, step in learned.items()}
        for name, step in self.learned.items():
            if not 0 <= step < len(values):
                raise UserError(f"'{name}' is learned at step {step} of {len(values) - 1}")
        before = {name: max(step - 1, 0) for name, step in self.learned.items()}
        self.began = before | {name: int(step) for name, step in (began or {}).items()}
        self.held_out = tuple(held_out)
        self.baseline = dict(baseline or {})

    @property
    def last(self) -> int:
        """Number of the last step."""
        return len(self.R) - 1

    def of(self, task: str) -> Floats:
        """(steps,) a task's scores, higher = better."""
        column: Floats = self.R[:, self.tasks.index(task)]
        return column

    def _learned_by(self, step: int) -> list[str]:
        return [t for t in self.tasks if t in self.learned and self.learned[t] <= step]

    def average(self, step: int | None = None) -> float:
        """Mean score over the tasks learned by `step` (default: the last)."""
        k = self.last if step is None else step
        return _mean(self.of(t)[k] for t in self._learned_by(k))

    def backward_transfer(self) -> float:
        """Positive: learning later tasks improved earlier ones."""
        old = [t for t in self.tasks if t in self.learned and self.learned[t] < self.last]
        return _mean(self.of(t)[self.last] - self.of(t)[self.learned[t]] for t in old)

    def forward_transfer(self) -> float:
        """Positive: earlier tasks helped later ones before these were trained on.

        `baseline` is the score of a fresh model; a task without one uses its score at step 0. The
        first task learned is left out.
        """
        order = sorted(
            (t for t in self.learned if self.learned[t] > 0), key=self.learned.__getitem__
        )
        gains = []
        for t in order[1:]:
            start = self.baseline.get(t)
            base = self.of(t)[0] if start is None else start * self.sign[self.tasks.index(t)]
            gains.append(self.of(t)[self.began[t]] - base)
        return _mean(gains)

    def forgetting(self, step: int | None = None) -> float:
        """How far tasks learned before `step` are below their best since they were learned."""
        k = self.last if step is None else step
        old = [t for t in self._learned_by(k) if self.learned[t] < k]
        return _mean(np.nanmax(self.of(t)[self.learned[t] : k]) - self.of(t)[k] for t in old)

    def accumulation(self, step: int | None = None) -> float:
        """Mean score over all tasks of the stream, learned yet or not."""
        k = self.last if step is None else step
        return _mean(self.of(t)[k] for t in self.learned)

    def retention(self, step: int | None = None) -> float:
        """Mean score over the held-out tasks."""
        k = self.last if step is None else step
        return _mean(self.of(t)[k] for t in self.held_out)

    def trade_off(self, step: int | None = None) -> float:
        """Geometric mean of accumulation and retention, both relative to step 0."""
        gained = self.accumulation(step) / self.accumulation(0)
        kept = self.retention(step) / self.retention(0)
        return float(np.sqrt(gained * kept)) if gained > 0 and kept > 0 else float("nan")

    def gap(self, task: str, start: int, stop: int | None = None) -> Gap:
        """Stability gap of a task from step `start` (before the change) up to `stop`."""
        return stability_gap(self.of(task)[start : None if stop is None else stop + 1])

    def worst(self, task: str) -> float:
        """Lowest score after the task was learned (De Lange: min-ACC is the mean of these)."""
        after = self.of(task)[self.learned[task] + 1 :]
        return float(np.nanmin(after)) if len(after) else float("nan")

    def summary(self) -> dict[str, Any]:
        """All of the above at the last step, as plain JSON values (undefined: None)."""
        values = {
            "average": self.average(),
            "backward_transfer": self.backward_transfer(),
            "forward_transfer": self.forward_transfer(),
            "forgetting": self.forgetting(),
            "accumulation": self.accumulation(),
            "retention": self.retention(),
        }
        return {name: v if np.isfinite(v) else None for name, v in values.items()}


def _mean(values: Any) -> float:
    known = [float(v) for v in values]
    return float(np.mean(known)) if known else float("nan")

"""Tuning that is fair: every arm gets the same grid, the same seeds, the same budget a point.

A method tuned over twenty settings against a baseline at its defaults proves nothing. `tune` runs
the whole grid for every arm, chooses per arm by the mean over tuning seeds, and hands back a
record that `prove` writes into the evidence. Tuning seeds and judging seeds must be disjoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass as record

from polytask.errors import ConfigError
from polytask.study.cache import default_folder
from polytask.study.collect import Executor, collect
from polytask.study.records import STRICT, Arm, Budget

Point = Mapping[str, Any]
ArmFactory = Callable[[Point], Arm]


@record(frozen=True, config=STRICT)
class TunedPoint:
    """One setting of one arm: the metric per tuning seed; mean None if any run diverged."""

    params: dict[str, Any]
    values: list[float | None]
    mean: float | None
    spent: Budget


@record(frozen=True, config=STRICT)
class Tuning:
    """What was tried for whom, and what was chosen."""

    metric: str
    higher_is_better: bool
    seeds: list[int]
    grid: dict[str, list[Any]]  # what every arm got
    own: dict[str, dict[str, list[Any]]]  # axes only one arm has
    points: dict[str, list[TunedPoint]]
    chosen: dict[str, dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def trials(self) -> dict[str, int]:
        """Runs per arm: equal unless an arm has axes of its own."""
        return {arm: len(points) * len(self.seeds) for arm, points in self.points.items()}


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last axis fastest; one empty point for an empty grid."""
    for name, values in grid.items():
        if not values:
            raise ConfigError(f"tuning grid: '{name}' has no values")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tune(
    factories: Mapping[str, ArmFactory],
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
    budget: Budget,
    metric: str,
    *,
    name: str = "tuning",
    higher_is_better: bool = True,
    own: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    executor: Executor | None = None,
    cache: Path | None = None,
    code: str | None = None,
) -> tuple[Tuning, dict[str, Arm]]:
    """Run `grid` for every arm and choose per arm; returns the record and the chosen arms.

    `factories[arm](point)` gives the arm at a point; `metric` should be measured on validation
    rows. `own` adds axes that only one arm has (a radius, say); the record shows how many runs
    each arm got. Ties go to the point that comes first in the grid.
    """
    own = own or {}
    for arm in own:
        if arm not in factories:
            raise ConfigError(f"tuning: own axes are given for '{arm}', which is not tuned")
    arms = {
        (arm, i): _at(factory, arm, i, point)
        for arm, factory in factories.items()
        for i, point in enumerate(grid_points({**grid, **own.get(arm, {})}))
    }
    results = collect(
        name,
        [built for built, _ in arms.values()],
        seeds,
        budget,
        size="tuning",
        folder=cache or default_folder(),
        executor=executor or Executor(),
        code=code,
    )
    points: dict[str, list[TunedPoint]] = {arm: [] for arm in factories}
    for (arm, _), (built, point) in arms.items():
        runs = [results.results[built.name, seed] for seed in seeds]
        missing = [run for run in runs if metric not in run.metrics]
        if missing:
            raise ConfigError(f"tuning: arm '{arm}' reports no metric '{metric}'")
        values = [run.metrics[metric] for run in runs]
        finite = [value for value in values if value is not None]
        mean = sum(finite) / len(finite) if len(finite) == len(values) else None
        spent = runs[0].spent
        for run in runs[1:]:
            spent = spent + run.spent
        points[arm].append(TunedPoint(point, values, mean, spent))
    chosen = {arm: _best(arm, tried, higher_is_better) for arm, tried in points.items()}
    record_ = Tuning(
        metric,
        higher_is_better,
        list(seeds),
        {k: list(v) for k, v in grid.items()},
        {arm: {k: list(v) for k, v in axes.items()} for arm, axes in own.items()},
        points,
        chosen,
    )
    return record_, {arm: factory(chosen[arm]) for arm, factory in factories.items()}


def _at(
    factory: ArmFactory, arm: str, index: int, point: dict[str, Any]
) -> tuple[Arm, dict[str, Any]]:
    built = factory(point)
    named = Arm(f"{arm}@{index}", built.run, {**built.params, **point}, built.note)
    return named, point


def _best(arm: str, points: Sequence[TunedPoint], higher_is_better: bool) -> dict[str, Any]:
    finite = [point for point in points if point.mean is not None]
    if not finite:
        raise ConfigError(f"tuning: every point of arm '{arm}' diverged")
    sign = 1.0 if higher_is_better else -1.0
    return max(finite, key=lambda point: sign * (point.mean or 0.0)).params

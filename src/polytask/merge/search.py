"""Weights of a merge found without gradients: any method, any score, a budget of evaluations.

PCB-Merging's "+ ES" (Du et al. 2024, arXiv 2410.02396) chooses a weight for each task by
validation accuracy with nevergrad's NGOpt: start 1, bounds [0.8, 1.3], 100 evaluations for vision;
[0.5, 3] and 200 for language. Here the searcher is a (1+1) evolution strategy with the one-fifth
rule (Rechenberg 1973): with a hundred evaluations of a noisy step function in a handful of
dimensions a population (differential evolution takes 15 a dimension before its first step) has no
time to move, and nevergrad would pin other packages' versions for this one use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask import rng
from polytask.errors import ConfigError, NonFiniteError
from polytask.merge.method import Method, make_method, merge_state_dicts
from polytask.merge.vectors import StateDict, default_names, merge_keys

Point = tuple[float, ...]
FIRST_STEP = 0.25  # of the width of the bounds
GROW = math.exp(0.8)  # after a success
SHRINK = math.exp(-0.2)  # after a failure: both balance when one in five succeeds


@dataclass(frozen=True)
class Found:
    """Result of a search: the best point, its score, and every (point, score) in their order."""

    best: Point
    score: float
    history: tuple[tuple[Point, float], ...]


def gradient_free(
    score: Callable[[Point], float],
    init: Sequence[float],
    bounds: tuple[float, float],
    budget: int,
    seed: int = 0,
) -> Found:
    """Maximise `score` within bounds by a (1+1) evolution strategy.

    Args:
        score: higher is better. NaN counts as worst, except at the start.
        init: where to start; counts as the first evaluation.
        bounds: of every coordinate. Steps beyond are reflected.
        budget: evaluations in all, at least 1.
        seed: the steps are a function of (seed, number of the evaluation).

    Raises:
        ConfigError: no budget, bounds without room, a start outside of them.
        NonFiniteError: the score of the start is not a number.
    """
    low, high = bounds
    at = np.asarray(init, dtype=np.float64)
    if budget < 1:
        raise ConfigError(f"search: a budget of {budget} evaluations leaves nothing to try")
    if not low < high:
        raise ConfigError(f"search: bounds ({low}, {high}) leave no room")
    if at.ndim != 1 or not at.size or bool(((at < low) | (at > high)).any()):
        raise ConfigError(f"search: the start {list(init)} is not within ({low}, {high})")
    here = float(score(_point(at)))
    if math.isnan(here):
        raise NonFiniteError("search: the score of the start is not a number")
    history = [(_point(at), here)]
    step = FIRST_STEP * (high - low)
    for number in range(1, budget):
        drawn = rng.generator(seed, "search", number).standard_normal(at.size)
        tried = _reflected(at + step * drawn, low, high)
        value = float(score(_point(tried)))
        history.append((_point(tried), value))
        # Accuracy is a staircase: a step to an equal score is taken and leaves the step size as it
        # is, so that the search can walk off a plateau.
        if value != here:
            step = min(step * (GROW if value > here else SHRINK), high - low)
        if value >= here:
            at, here = tried, value
    best, value = max(history, key=lambda entry: -math.inf if math.isnan(entry[1]) else entry[1])
    return Found(best, value, tuple(history))


def search_weights(
    method: str | Method,
    experts: Sequence[StateDict],
    base: StateDict | None,
    score: Callable[[dict[str, Tensor]], float],
    *,
    init: float | Sequence[float] = 1.0,
    bounds: tuple[float, float] = (0.8, 1.3),
    budget: int = 100,
    seed: int = 0,
    names: Sequence[str] | None = None,
    **params: Any,
) -> tuple[dict[str, Tensor], Found]:
    """The merge whose weights, one for each expert, score best: "+ ES" for any method.

    Where a merge is linear in its weights (task arithmetic, PCB-Merging; found out by trying), its
    parts are computed once and every evaluation adds them up; else every evaluation merges anew.

    Args:
        method: a name from `METHODS` with its parameters in `params`, or a `Method`.
        experts: K state dicts.
        base: for methods that need it.
        score: state dict -> what should be high, on validation rows.
        init, bounds, budget, seed: see `gradient_free`.
        names: of the experts.

    Returns:
        The merged state dict and what the search tried.

    Raises:
        ConfigError: a method without weights, or what `gradient_free` refuses.
    """
    made = make_method(method, params) if isinstance(method, str) else method
    if "weight" not in made.per_model:
        raise ConfigError(f"{made.title} has no weight for each model that could be searched for")
    names = default_names(len(experts)) if names is None else tuple(names)
    start = (float(init),) * len(experts) if isinstance(init, int | float) else tuple(init)
    if len(start) != len(experts):
        raise ConfigError(f"search: {len(start)} starting values for {len(experts)} experts")

    def anew(weights: Point) -> dict[str, Tensor]:
        form = made.model_copy(update={"weight": tuple(weights)})
        return merge_state_dicts(form, experts, base, names=names, seed=seed)

    build = anew if base is None else _linear(anew, base, start) or anew
    found = gradient_free(lambda weights: score(build(weights)), start, bounds, budget, seed)
    return anew(found.best), found


def _linear(
    anew: Callable[[Point], dict[str, Tensor]], base: StateDict, start: Point
) -> Callable[[Point], dict[str, Tensor]] | None:
    """A quick form of `anew`, base + sum_k w_k part_k, if that is what the method computes."""
    keys = merge_keys(base)
    single = [anew(tuple(float(i == k) for i in range(len(start)))) for k in range(len(start))]
    parts = {
        key: torch.stack([each[key].double() - base[key].double() for each in single])
        for key in keys
    }

    def quick(weights: Point) -> dict[str, Tensor]:
        merged = dict(base)
        row = torch.tensor(weights, dtype=torch.float64)
        for key in keys:
            total = base[key].double() + torch.tensordot(row, parts[key], 1)
            merged[key] = total.to(base[key].dtype)
        return merged

    # An uneven point: a method that divides by its weights may look linear at equal ones.
    uneven = tuple(value * (1 + 0.1 * k) for k, value in enumerate(start))
    for point in (start, uneven):
        exact, found = anew(point), quick(point)
        if not all(torch.allclose(exact[key], found[key], 1e-4, 1e-6) for key in keys):
            return None
    return quick


def _point(values: np.ndarray) -> Point:
    return tuple(float(value) for value in values)


def _reflected(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Coordinates beyond a bound turned back at it, as often as needed."""
    width = high - low
    folded = np.mod(values - low, 2 * width)
    return low + np.where(folded > width, 2 * width - folded, folded)

"""Search of weights: it finds optima, keeps bounds and budget, and equals plain merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polytask.errors import ConfigError, NonFiniteError
from polytask.merge.method import merge_state_dicts
from polytask.merge.search import Point, gradient_free, search_weights


@pytest.mark.parametrize("seed", range(5))
def test_a_quadratic_is_climbed_within_a_hundred_evaluations(seed: int) -> None:
    aim = np.array([1.1, 0.85, 1.25, 0.9])

    def score(at: Point) -> float:
        return -float(np.square(np.array(at) - aim).sum())

    found = gradient_free(score, [1.0] * 4, (0.8, 1.3), 100, seed)
    assert found.score > -0.003 > score((1.0,) * 4) / 10
    assert found.score == max(value for _, value in found.history)
    assert found.best in [point for point, _ in found.history]


@settings(max_examples=40)
@given(
    st.integers(1, 6),
    st.floats(-3, 3),
    st.floats(0.01, 5),
    st.integers(1, 30),
    st.integers(0, 5),
)
def test_bounds_and_budget_are_kept(
    size: int, low: float, width: float, budget: int, seed: int
) -> None:
    tried: list[Point] = []

    def score(at: Point) -> float:
        tried.append(at)
        return sum(at)

    high = low + width
    found = gradient_free(score, [low + width / 2] * size, (low, high), budget, seed)
    assert len(tried) == budget == len(found.history)
    slack = 1e-9 * max(1, abs(low), abs(high))
    assert all(low - slack <= value <= high + slack for at in tried for value in at)
    assert found.score >= found.history[0][1]


def test_the_same_seed_takes_the_same_steps_and_another_does_not() -> None:
    one, two, other = (
        gradient_free(lambda at: at[0], [0.5], (0, 1), 10, seed).history for seed in (1, 1, 2)
    )
    assert one == two != other


def test_a_plateau_is_crossed() -> None:
    found = gradient_free(lambda at: float(at[0] > 0.9), [0.1], (0, 1), 60, 3)
    assert found.score == 1.0


def test_nan_scores_are_worst_and_a_nan_start_is_refused() -> None:
    found = gradient_free(lambda at: math.nan if at[0] != 0.5 else 1.0, [0.5], (0.0, 1.0), 8)
    assert found.best == (0.5,) and found.score == 1.0
    with pytest.raises(NonFiniteError, match="start"):
        gradient_free(lambda at: math.nan, [0.5], (0.0, 1.0), 8)


@pytest.mark.parametrize(
    ("init", "bounds", "budget"),
    [([0.5], (0, 1), 0), ([0.5], (1, 1), 5), ([2.0], (0, 1), 5), ([], (0, 1), 5)],
)
def test_searches_that_cannot_work_are_refused(
    init: list[float], bounds: tuple[float, float], budget: int
) -> None:
    with pytest.raises(ConfigError, match="search"):
        gradient_free(lambda at: 0.0, init, bounds, budget)


def models(count: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    base = {"w": torch.randn(40, 5), "b": torch.randn(7), "n": torch.tensor(3)}
    experts = [
        {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in base.items()}
        for _ in range(count)
    ]
    return base, experts


@pytest.mark.parametrize("method", ["task_arithmetic", "pcb", "ties", "dare_linear"])
def test_every_scored_state_is_the_methods_own_merge(method: str) -> None:
    base, experts = models()
    seen: list[dict[str, Tensor]] = []

    def score(state: dict[str, Tensor]) -> float:
        seen.append(state)
        return -float(state["w"].square().sum())

    state, found = search_weights(method, experts, base, score, budget=6, seed=4)
    for merged, (weights, _) in zip(seen, found.history, strict=True):
        plain = merge_state_dicts(method, experts, base, weight=weights, seed=4)
        for key in base:
            assert torch.allclose(merged[key].float(), plain[key].float(), atol=1e-5)
    best = merge_state_dicts(method, experts, base, weight=found.best, seed=4)
    assert all(torch.equal(state[key], best[key]) for key in base)


def test_a_known_mixture_is_found_again() -> None:
    base, experts = models(2)
    aim = merge_state_dicts("task_arithmetic", experts, base, weight=(1.2, 0.85))

    def score(state: dict[str, Tensor]) -> float:
        return -float((state["w"] - aim["w"]).square().sum())

    _, found = search_weights("task_arithmetic", experts, base, score, budget=100)
    assert found.best == pytest.approx((1.2, 0.85), abs=0.02)


def test_methods_without_weights_and_wrong_starts_are_refused() -> None:
    base, experts = models()
    with pytest.raises(ConfigError, match="no weight for each model"):
        search_weights("average", experts, base, lambda state: 0.0)
    with pytest.raises(ConfigError, match="2 starting values for 3 experts"):
        search_weights("pcb", experts, base, lambda state: 0.0, init=(1.0, 1.0))

"""Independent ways to say what a mixture must be: brute-force counts, and fluid quotas."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

MARGIN = 1e-6  # fluid quotas are sums of doubles


def counts_of(groups: np.ndarray, total: int) -> np.ndarray:
    """(rows, groups): how many rows of each group are among the first 1, 2, ... rows."""
    one = np.zeros((len(groups), total), dtype=np.int32)
    one[np.arange(len(groups)), groups] = 1
    return np.cumsum(one, axis=0, dtype=np.int32)


def worst_deviation(groups: np.ndarray, weights: np.ndarray) -> float:
    """max over prefixes n and groups i of |count_i(n) - weights_i * n|, group by group."""
    slots = np.arange(1, len(groups) + 1)
    worst = 0.0
    for group, weight in enumerate(weights):
        count = np.cumsum(groups == group)
        worst = max(worst, float(np.abs(count - weight * slots).max()))
    return worst


def fluid(weights: np.ndarray, limits: np.ndarray, rows: int) -> np.ndarray:
    """(rows, groups): quotas if rows could be divided; groups leave at their limit, -1: never."""
    out = np.zeros((rows, len(weights)))
    have = np.zeros(len(weights))
    alive = weights > 0
    for row in range(rows):
        left = 1.0
        while left > 1e-12 and alive.any():
            rate = np.where(alive, weights, 0.0)
            rate /= rate.sum()
            stops = alive & (limits >= 0)
            room = (limits - have)[stops] / rate[stops]
            step = min(left, float(room.min(initial=np.inf)))
            have = have + rate * step
            left -= step
            alive &= ~((limits >= 0) & (have >= limits - 1e-9))
        out[row] = have
    return out


@st.composite
def weight_vectors(draw: st.DrawFn, most: int = 300) -> np.ndarray:
    """Weights of many shapes: equal, tiny, one dominating, steep, with ties, with zeros."""
    groups = draw(st.integers(2, most))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["equal", "even", "steep", "tiny", "dominated", "halves", "ties"]))
    if kind == "equal":
        weights = np.ones(groups)
    elif kind == "even":
        weights = random.random(groups) + 0.01
    elif kind == "steep":
        weights = np.exp(random.normal(0, draw(st.sampled_from([1, 3, 6])), groups))
    elif kind == "tiny":
        weights = np.where(random.random(groups) < 0.5, 1.0, 10.0 ** -random.uniform(3, 9))
    elif kind == "dominated":
        weights = np.append(random.random(groups - 1), groups * 10.0 ** random.uniform(0, 3))
    elif kind == "halves":
        weights = 2.0 ** -np.minimum(np.arange(groups), 45) * (1 + 0.01 * random.random(groups))
    else:
        weights = random.choice([0.1, 0.25, 1 / 3, 7.0], groups)
    if draw(st.booleans()) and groups > 2:
        weights[random.integers(groups)] = 0.0
    return np.asarray(weights / weights.sum())

"""Measures of finding the right one among candidates: retrieval and multiple choice.

Scores (n, candidates), higher is better; the target is the position of the right candidate (n,),
or (n, candidates) of 0 and 1 where several are right. Equal scores are broken at random in
expectation, so a model that scores everything alike gets what guessing would get.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from polytask.evaluate.metric import METRICS, Floats, Metric, mean_sums, same_length, with_weight


def best_rank(prediction: Any, target: Any) -> tuple[Floats, Floats, Floats]:
    """For the best-scored right candidate of each row: how many wrong ones score above it, how
    many score the same, and how many right ones share its score; rows without a right one: NaN."""
    scores, truth = np.asarray(prediction, np.float64), np.asarray(target)
    same_length(scores, truth)
    if np.isnan(scores).any():
        bad = int(np.argwhere(np.isnan(scores))[0][0])
        raise ValueError(f"the scores of example {bad} are not numbers")
    if truth.ndim == 1:
        truth = np.arange(scores.shape[1]) == truth.astype(np.int64)[:, None]
    right = truth > 0.5
    some = right.any(1)
    best = np.where(right, scores, -np.inf).max(1, initial=-np.inf)[:, None]
    above = ((scores > best) & ~right).sum(1)
    level = ((scores == best) & ~right).sum(1)
    shared = ((scores == best) & right).sum(1)

    def masked(count: Any) -> Floats:
        return np.where(some, count.astype(np.float64), np.nan)

    return masked(above), masked(level), masked(shared)


def _first_position_chances(prediction: Any, target: Any) -> tuple[Floats, Floats]:
    """rank (n, most) and chance (n, most) that the first right candidate stands there.

    Among `level` wrong and `shared` right candidates of one score, in random order, the first
    right one is at offset j with chance C(level + shared - 1 - j, shared - 1) / C(level + shared,
    shared), by recursion: p_{j+1} = p_j (level - j) / (level + shared - 1 - j).
    """
    above, level, shared = best_rank(prediction, target)
    known = np.isfinite(above)
    width = int(np.nan_to_num(level).max(initial=0)) + 1
    chance = np.zeros((len(above), width))
    chance[known, 0] = shared[known] / (level[known] + shared[known])
    for j in range(width - 1):
        left = np.maximum(level - j, 0)
        under = np.where(known & (left > 0), level + shared - 1 - j, 1.0)
        chance[:, j + 1] = np.where(known, chance[:, j] * np.where(known, left, 0) / under, 0.0)
    return above[:, None] + 1 + np.arange(width), chance


def _recall_sums(k: int) -> Any:
    def sums(prediction: Any, target: Any) -> Floats:
        rank, chance = _first_position_chances(prediction, target)
        known = np.isfinite(rank[:, 0])
        return with_weight((chance * (rank <= k)).sum(1), known)

    return sums


def _mrr(prediction: Any, target: Any) -> Floats:
    rank, chance = _first_position_chances(prediction, target)
    known = np.isfinite(rank[:, 0])
    return with_weight((chance / np.where(known[:, None], rank, 1.0)).sum(1), known)


@cache
def recall_at(k: int) -> Metric:
    """The share of rows whose best right candidate is among the k highest scores."""
    return Metric(
        f"recall@{k}",
        True,
        _recall_sums(k),
        mean_sums,
        mean_of_scores=True,
        about=f"share of rows with a right candidate among the first {k}",
    )


for entry in (
    *(recall_at(k) for k in (1, 5, 10)),
    Metric(
        "mrr",
        True,
        _mrr,
        mean_sums,
        mean_of_scores=True,
        about="mean of 1 / (rank of the first right candidate)",
    ),
):
    METRICS.add(entry.name, entry)

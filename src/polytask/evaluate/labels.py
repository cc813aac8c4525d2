"""Measures of scores: several labels a row (0, 1, NaN unknown), and how well scores rank.

Labels count as given where the probability is above one half. AUROC is the chance that a positive
outranks a negative, ties counting half (Hanley & McNeil 1982); average precision is the step-wise
area without interpolation. Both as in scikit-learn; a label of which only one kind occurs is left
out of the mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.evaluate.classes import f1_per_class
from polytask.evaluate.metric import (
    METRICS,
    Floats,
    Metric,
    finite,
    mean_defined,
    mean_sums,
    ratio,
    same_length,
)


def _given(prediction: Any, target: Any) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Whether each label is predicted (n, labels), and the target as float64."""
    p, truth = finite(prediction), np.asarray(target, np.float64)
    same_length(p, truth)
    if p.shape != truth.shape or p.ndim != 2:
        raise ValueError(f"predictions {p.shape} and targets {truth.shape} should be (n, labels)")
    return p > 0.5, truth


def label_sums(prediction: Any, target: Any) -> Floats:
    """(n, 3 * labels): true positives, predicted and actual, each 0 or 1; unknown labels are 0."""
    given, truth = _given(prediction, target)
    known = ~np.isnan(truth)
    actual = known & (truth > 0.5)
    parts = (given & actual, given & known, actual)
    return np.concatenate([part.astype(np.float64) for part in parts], axis=1)


def _wrong(prediction: Any, target: Any) -> Floats:
    """(n, 2): wrong and known labels."""
    given, truth = _given(prediction, target)
    known = ~np.isnan(truth)
    wrong = known & (given != (truth > 0.5))
    return np.stack([wrong.sum(1), known.sum(1)], axis=1).astype(np.float64)


def _right(prediction: Any, target: Any) -> Floats:
    sums = _wrong(prediction, target)
    return np.stack([sums[:, 1] - sums[:, 0], sums[:, 1]], axis=1)


def _macro_f1(sums: Floats) -> Floats:
    return mean_defined(f1_per_class(sums))


def _micro_f1(sums: Floats) -> Floats:
    hit, guessed, actual = (part.sum(-1) for part in np.split(sums, 3, axis=-1))
    return ratio(2 * hit, guessed + actual)


def binary_auroc(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """P(score of a positive > score of a negative) + half P(equal); NaN with one kind only."""
    from scipy.stats import rankdata

    yes = np.asarray(positive, np.bool_)
    count = int(yes.sum())
    others = yes.size - count
    if count == 0 or others == 0:
        return float("nan")
    ranks = rankdata(np.asarray(score))
    return float((ranks[yes].sum() - count * (count + 1) / 2) / (count * others))


def binary_average_precision(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Sum over thresholds of (recall step) * precision; NaN without a positive."""
    yes, s = np.asarray(positive, np.bool_), np.asarray(score)
    if not yes.any():
        return float("nan")
    order = np.argsort(-s, kind="stable")
    last = np.append(np.diff(s[order]) != 0, True)  # of each group of equal scores
    hits = np.cumsum(yes[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / yes.sum())


def _columns(prediction: Any, target: Any) -> list[tuple[Floats, npt.NDArray[np.bool_]]]:
    """(scores, positive) per label; a class target becomes one column per class (one vs rest)."""
    p, truth = finite(prediction).astype(np.float64), np.asarray(target)
    same_length(p, truth)
    if truth.ndim == 1:
        known = truth >= 0
        if p.ndim == 1 or p.shape[1] == 2:
            score = p if p.ndim == 1 else p[:, 1]
            return [(score[known], truth[known] == 1)]
        return [(p[known, c], truth[known] == c) for c in range(p.shape[1])]
    if p.shape != truth.shape:
        raise ValueError(f"predictions {p.shape} do not fit targets {truth.shape}")
    columns = []
    for c in range(truth.shape[1]):
        known = ~np.isnan(truth[:, c].astype(np.float64))
        columns.append((p[known, c], truth[known, c] > 0.5))
    return columns


def _auroc(prediction: Any, target: Any) -> float:
    values = [binary_auroc(score, yes) for score, yes in _columns(prediction, target)]
    return float(mean_defined(np.asarray(values, np.float64)))


def _mean_average_precision(prediction: Any, target: Any) -> float:
    values = [binary_average_precision(score, yes) for score, yes in _columns(prediction, target)]
    return float(mean_defined(np.asarray(values, np.float64)))


for entry in (
    Metric(
        "hamming",
        False,
        _wrong,
        mean_sums,
        mean_of_scores=True,
        about="share of labels predicted wrong (Hamming loss)",
    ),
    Metric("multilabel:accuracy", True, _right, mean_sums, about="share of labels predicted right"),
    Metric(
        "multilabel:macro_f1",
        True,
        label_sums,
        _macro_f1,
        about="F1 per label, averaged over the labels that occur",
    ),
    Metric("micro_f1", True, label_sums, _micro_f1, about="F1 over all labels pooled"),
    Metric(
        "auroc",
        True,
        compute=_auroc,
        about="chance that a positive outranks a negative; mean over classes (one vs rest)",
    ),
    Metric(
        "mean_average_precision",
        True,
        compute=_mean_average_precision,
        about="area under precision over recall, averaged over labels",
    ),
):
    METRICS.add(entry.name, entry)

"""Measures where the label is one class: of a row, of a word, of a pixel.

Predictions are scores (n, classes) or class numbers shaped like the target; targets below 0 are
unknown and left out. Sources: F1 and log loss as in scikit-learn; ECE: Naeini et al. 2015, Guo et
al. 2017 (equal-width bins); mIoU: Everingham et al. 2010, over the pooled pixels of all examples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.evaluate.metric import (
    METRICS,
    Floats,
    Metric,
    finite,
    mean_defined,
    mean_sums,
    ratio,
    same_length,
    with_weight,
)

Ints = npt.NDArray[np.int64]
BINS = 15


def chosen(prediction: Any, target: Any) -> tuple[Ints, Ints]:
    """Predicted and true class numbers, both (n, positions); the first wins among equal scores."""
    truth = np.asarray(target)
    truth = np.where(np.isnan(truth), -1, truth) if truth.dtype.kind == "f" else truth
    truth = truth.astype(np.int64)
    guess = finite(prediction)
    same_length(guess, truth)
    if guess.ndim == truth.ndim + 1:
        guess = guess.argmax(-1)
    if guess.shape != truth.shape:
        raise ValueError(f"predictions {guess.shape} do not fit targets {truth.shape}")
    flat = (len(truth), math.prod(truth.shape[1:]))
    return guess.reshape(flat).astype(np.int64), truth.reshape(flat)


def confusion_sums(prediction: Any, target: Any, classes: int | None = None) -> Floats:
    """(n, 3 * classes): per example true positives, predicted and actual counts of each class.

    `classes` None: as many as occur. Batches that are to be added up must state it.
    """
    guess, truth = chosen(prediction, target)
    n = len(truth)
    count = classes or int(max(guess.max(initial=0), truth.max(initial=0))) + 1
    known = truth >= 0
    row = np.broadcast_to(np.arange(n)[:, None], truth.shape)

    def per_class(which: Ints, where: npt.NDArray[np.bool_]) -> Floats:
        flat = row[where] * count + which[where]
        return np.bincount(flat, minlength=n * count).reshape(n, count).astype(np.float64)

    hit = per_class(truth, known & (guess == truth))
    return np.concatenate([hit, per_class(guess, known), per_class(truth, known)], axis=1)


def _split(sums: Floats) -> tuple[Floats, Floats, Floats]:
    hit, guessed, actual = np.split(sums, 3, axis=-1)
    return hit, guessed, actual


def f1_per_class(sums: Floats) -> Floats:
    """2 tp / (predicted + actual) per class; NaN for a class that is neither."""
    hit, guessed, actual = _split(sums)
    return ratio(2 * hit, guessed + actual)


def _macro_f1(sums: Floats) -> Floats:
    return mean_defined(f1_per_class(sums))


def _miou(sums: Floats) -> Floats:
    hit, guessed, actual = _split(sums)
    return mean_defined(ratio(hit, guessed + actual - hit))


def _right(prediction: Any, target: Any) -> Floats:
    """(n, 2): right and known positions of each example."""
    guess, truth = chosen(prediction, target)
    known = truth >= 0
    right = (guess == truth) & known
    return np.stack([right.sum(1), known.sum(1)], axis=1).astype(np.float64)


def probabilities(prediction: Any) -> Floats:
    """Rows that sum to 1, from rows of non-negative scores; a (n,) array is P(class 1)."""
    p = finite(prediction)
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)
    if p.ndim != 2:
        raise ValueError(f"expected probabilities (n, classes), got shape {p.shape}")
    if (p < 0).any():
        raise ValueError("expected probabilities, got a negative one")
    p = p.astype(np.float64)
    total = p.sum(1, keepdims=True)
    return p / np.where(total > 0, total, 1)


def _log_loss(prediction: Any, target: Any) -> Floats:
    """(n, 2): -ln p(true class), clipped at the precision of the scores' type as sklearn does."""
    raw = np.asarray(prediction)
    smallest = np.finfo(raw.dtype if raw.dtype.kind == "f" else np.float64).eps
    p, truth = probabilities(prediction), np.asarray(target).astype(np.int64)
    same_length(p, truth)
    known = truth >= 0
    at = p[np.arange(len(p)), np.where(known, truth, 0)]
    return with_weight(-np.log(np.clip(at, smallest, 1 - smallest)), known)


def calibration_sums(prediction: Any, target: Any, bins: int = BINS) -> Floats:
    """(n, 3 * bins): per example and confidence bin 1, confidence of the top class, right."""
    p, truth = probabilities(prediction), np.asarray(target).astype(np.int64)
    same_length(p, truth)
    n, known = len(p), truth >= 0
    confidence = p.max(1)
    right = (p.argmax(1) == truth).astype(np.float64)
    where = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    out = np.zeros((n, 3, bins))
    index = np.arange(n)[known]
    for k, value in enumerate((np.ones(n), confidence, right)):
        out[index, k, where[known]] = value[known]
    return out.reshape(n, 3 * bins)


def _ece(sums: Floats) -> Floats:
    count, confidence, right = _split(sums)
    return ratio(np.abs(confidence - right).sum(-1), count.sum(-1))


for entry in (
    Metric(
        "accuracy",
        True,
        _right,
        mean_sums,
        mean_of_scores=True,
        about="share of labels predicted right; over words or pixels, pooled",
    ),
    Metric(
        "pixel_accuracy",
        True,
        _right,
        mean_sums,
        about="share of known pixels with the right class",
    ),
    Metric(
        "macro_f1",
        True,
        confusion_sums,
        _macro_f1,
        needs=("classes",),
        about="F1 per class, averaged over the classes that occur",
    ),
    Metric(
        "miou",
        True,
        confusion_sums,
        _miou,
        needs=("classes",),
        about="intersection over union per class, averaged over the classes that occur",
    ),
    Metric(
        "log_loss",
        False,
        _log_loss,
        mean_sums,
        mean_of_scores=True,
        unit="nats",
        about="mean -ln of the probability given to the true class",
    ),
    Metric(
        "ece",
        False,
        calibration_sums,
        _ece,
        about=f"expected calibration error of the top class, {BINS} bins of equal width",
    ),
):
    METRICS.add(entry.name, entry)

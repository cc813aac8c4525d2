"""Is a model as sure as it is right? Reliability diagrams, and models compared over several sets.

ECE of the top class with bins of equal width: Naeini et al. 2015, Guo et al. 2017 (arXiv
1706.04599). The binning is that of the metric 'ece', which has 15 bins; papers differ in the number
(skill grafting, arXiv 2302.06600, reports 10), so it is an argument here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polytask.errors import DataError
from polytask.evaluate.classes import calibration_sums, probabilities
from polytask.evaluate.metric import Floats, same_length


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows, per confidence bin ((i / bins, (i + 1) / bins]).

    count: examples. confidence, accuracy: their means there, NaN for an empty bin.
    """

    count: Floats
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """sum_i count_i / n |accuracy_i - confidence_i|; NaN for no example."""
        n = self.count.sum()
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.count * gap).sum() / n) if n else float("nan")

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy: above 0 where a model is too sure; NaN for no example."""
        n = self.count.sum()
        gap = np.nan_to_num(self.confidence - self.accuracy)
        return float((self.count * gap).sum() / n) if n else float("nan")


def reliability(prediction: Any, target: Any, bins: int = 10) -> Reliability:
    """Bin examples by the probability of their top class.

    Args:
        prediction: (n, classes) probabilities (rows are made to sum to 1), or (n,) P(class 1).
        target: (n,) class numbers; below 0 is unknown and left out.
        bins: of equal width over [0, 1].
    """
    if bins < 1:
        raise DataError(f"a reliability diagram needs at least one bin, got {bins}")
    sums = calibration_sums(prediction, target, bins).sum(0).reshape(3, bins)
    count, confidence, right = sums
    with np.errstate(invalid="ignore"):
        return Reliability(count, confidence / count, right / count)


def agreement(one: Any, other: Any) -> float:
    """Share of rows for which two models' top classes are the same; NaN for no row."""
    a, b = probabilities(one).argmax(1), probabilities(other).argmax(1)
    same_length(a, b)
    return float((a == b).mean()) if len(a) else float("nan")


@dataclass(frozen=True)
class SetScore:
    """One model on one set of rows. agreement: with the reference model; NaN without one."""

    model: str
    set: str
    n: int
    accuracy: float
    ece: float
    overconfidence: float
    agreement: float


def compare_on_sets(
    predictions: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, Any],
    reference: str | None = None,
    bins: int = 10,
) -> list[SetScore]:
    """Judge models on the rows they were made for and on shifted ones, side by side.

    Args:
        predictions: model -> set -> (n, classes) probabilities. Every model needs every set.
        targets: set -> (n,) class numbers, below 0 for unknown ones.
        reference: the model that others should agree with (the fine-tuned one).

    Raises:
        DataError: names the model and the set that is missing, or a set without known labels.
    """
    if reference is not None and reference not in predictions:
        raise DataError(f"there is no model '{reference}' to compare with")
    found = []
    for model, by_set in predictions.items():
        for name, target in targets.items():
            if name not in by_set:
                raise DataError(f"model '{model}' has no predictions for the set '{name}'")
            p, truth = probabilities(by_set[name]), np.asarray(target)
            same_length(p, truth)
            known = truth >= 0
            if not known.any():
                raise DataError(f"set '{name}' has no row with a known label")
            diagram = reliability(p, truth, bins)
            found.append(
                SetScore(
                    model=model,
                    set=name,
                    n=int(known.sum()),
                    accuracy=float((p.argmax(1) == truth)[known].mean()),
                    ece=diagram.ece,
                    overconfidence=diagram.overconfidence,
                    agreement=float("nan")
                    if reference is None
                    else agreement(p, predictions[reference][name]),
                )
            )
    return found

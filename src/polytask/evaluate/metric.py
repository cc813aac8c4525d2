"""What a metric is: a plain function of predictions and targets that also says how it adds up.

Most measures are functions of sums over examples: accuracy of the number right, macro-F1 of the
confusion counts, perplexity of (negative log-likelihood, tokens). `statistics` gives the summands,
one row per example, and `finish` turns their sum into the measure. That one form gives the value,
per-example scores, bounded memory over any number of batches, and a bootstrap that is a matrix
product. Measures of ranks (AUROC, Spearman, average precision) need the whole sample and have
only `compute`.

Predictions and targets, n examples (a target that is unknown is NaN, or below 0 for classes):

    classes      scores (n, classes) or class numbers (n,); target (n,)
    tags         class numbers (n, length); target (n, length)
    labels       probabilities (n, labels); target (n, labels) of 0, 1
    numbers      (n,) or (n, outputs); target alike
    series       (n, horizon, channels); target alike
    maps         class numbers or values (n, height, width); target alike
    texts        n strings; target n strings
    candidates   scores (n, candidates); target (n,) position, or (n, candidates) of 0, 1
    likelihood   (n, 2): negative log-likelihood in nats, tokens; no target
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.errors import ConfigError, suggestion
from polytask.registry import Registry

Floats = npt.NDArray[np.float64]
Sums = Callable[..., Floats]  # (prediction, target, **context) -> (n, k)
Finish = Callable[[Floats], Floats]  # (..., k) -> (...)


@dataclass(frozen=True)
class Metric:
    """A measure by name. Call it with (prediction, target) to get a float; NaN where undefined.

    needs: keywords it takes besides: 'classes' (their number, so that batches add up), 'scale'
    (MASE).
    mean_of_scores: the measure is the mean of the per-example `scores` (weighted by their number
    of words where an example has several).
    streams: the summands of a batch do not depend on the other batches.
    """

    name: str
    higher_is_better: bool
    statistics: Sums | None = None
    finish: Finish | None = None
    compute: Callable[..., float] | None = None
    mean_of_scores: bool = False
    streams: bool = True
    needs: tuple[str, ...] = ()
    unit: str = ""
    about: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if (self.statistics is None) != (self.finish is None):
            raise ValueError(f"metric '{self.name}': statistics and finish come together")
        if (self.statistics is None) == (self.compute is None):
            raise ValueError(f"metric '{self.name}': either sums or compute, not both")

    def __call__(self, prediction: Any, target: Any = None, **context: Any) -> float:
        """The measure over all examples given."""
        if self.compute is not None:
            return float(self.compute(prediction, target, **context))
        assert self.statistics is not None
        return self.of_sums(self.statistics(prediction, target, **context))

    def of_sums(self, rows: Floats) -> float:
        """The measure from the summands of every example (n, k); NaN for no examples."""
        assert self.finish is not None
        if len(rows) == 0:
            return float("nan")
        return float(self.finish(rows.sum(axis=0)))

    def scores(self, prediction: Any, target: Any = None, **context: Any) -> Floats | None:
        """(n,) per-example scores whose mean is the measure (NaN: example without a label).

        None where the measure is not a mean over examples.
        """
        if not self.mean_of_scores or self.statistics is None:
            return None
        return self.scores_of(self.statistics(prediction, target, **context))

    def scores_of(self, rows: Floats) -> Floats:
        """`scores` from the summands."""
        assert self.finish is not None
        return self.finish(rows)


METRICS: Registry[Metric] = Registry("metric")
_HOMES = ("classes", "labels", "numbers", "texts", "candidates")
_AT = re.compile(r"(recall)@([1-9][0-9]*)")


def find_metric(name: str, head: str | None = None) -> Metric:
    """The metric called `name`; 'recall@K' for any K. Unknown names get the nearest known one.

    `head` is a schema's head kind: multi-label F1 counts labels where plain F1 counts rows, so
    'macro_f1' for head 'multilabel' is the metric 'multilabel:macro_f1'.
    """
    names = metric_names()
    at = _AT.fullmatch(name)
    if at is not None:
        from polytask.evaluate.candidates import recall_at

        return recall_at(int(at[2]))
    special = f"{head}:{name}"
    if special in METRICS:
        return METRICS.get(special)
    if name not in METRICS:
        raise ConfigError(f"unknown metric '{name}'.{suggestion(name, names)}")
    return METRICS.get(name)


def metric_names() -> tuple[str, ...]:
    """All metrics by name."""
    for home in _HOMES:
        importlib.import_module(f"polytask.evaluate.{home}")
    return METRICS.names()


def ratio(over: Floats, under: Floats) -> Floats:
    """over / under, NaN where under is 0."""
    over, under = np.broadcast_arrays(over, under)
    out: Floats = np.full(over.shape, np.nan)
    np.divide(over, under, out=out, where=under != 0)
    return out


def mean_sums(rows: Floats) -> Floats:
    """`finish` for (score, weight) summands: their weighted mean."""
    return ratio(rows[..., 0], rows[..., 1])


def mean_defined(values: Floats) -> Floats:
    """Mean over the last axis of the entries that are defined; NaN where none is."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(np.float64))


def with_weight(score: npt.ArrayLike, known: npt.ArrayLike) -> Floats:
    """(n, 2) summands of a weighted mean: score where known, and 1 or 0."""
    weight = np.asarray(known, np.float64)
    return np.stack([np.where(weight > 0, np.asarray(score, np.float64), 0.0), weight], axis=-1)


def finite(values: Any, what: str = "prediction") -> npt.NDArray[Any]:
    """`values` as an array; `ValueError` naming the first example that is NaN or infinite."""
    array = np.asarray(values)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"the {what} of example {bad} is not finite")
    return array


def same_length(prediction: Any, target: Any) -> None:
    """`ValueError` when there are not as many predictions as targets."""
    if len(prediction) != len(target):
        raise ValueError(f"{len(prediction)} predictions for {len(target)} targets")

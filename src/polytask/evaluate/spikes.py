"""How good are generated spikes, decoded behaviour and inferred connections?

Spikes are (unit, time) events, sets of units per window (counts (W, N)), or rates. Definitions
are the plain ones; where the code published with Neuroformer (Antoniades et al., ICLR 2024)
computes something else under the same name, `official=True` gives its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polytask.errors import DataError
from polytask.evaluate.metric import find_metric

Floats = NDArray[np.float64]
GRID = 50  # points of CosMIC's grid per width of a pulse


@dataclass(frozen=True)
class SetScores:
    """Means over windows; `empty` is the share of windows in which nothing fired or was said to.

    Those windows score 1. `windows` counts all that were scored.
    """

    precision: float
    recall: float
    f1: float
    empty: float
    windows: int


def set_scores(true: ArrayLike, generated: ArrayLike, official: bool = False) -> SetScores:
    """Which units fire in a window, as sets: precision, recall and F1, averaged over windows.

    Args:
        true, generated: (W, N) spike counts or flags of the same windows.
        official: as the published code, which skips windows without a true spike, and calls both
            precision and recall 1 in a window with hits that lacks false positives OR misses.

    A window where both sets are empty scores 1; where one is, 0.

    Raises:
        DataError: shapes differ or there is no window.
    """
    a, b = np.asarray(true) > 0, np.asarray(generated) > 0
    if a.ndim != 2 or a.shape != b.shape or not len(a):
        raise DataError(
            f"sets of units must be (windows, units) twice, not {a.shape} and {b.shape}"
        )
    hits, said, real = (a & b).sum(1), b.sum(1), a.sum(1)
    empty = float(((said == 0) & (real == 0)).mean())
    if official:
        walked = real > 0
        if not walked.any():
            raise DataError("no window holds a true spike; the published code scores none")
        hits, said, real = hits[walked], said[walked], real[walked]
        clean = (hits > 0) & ((said == hits) | (real == hits))
        precision = np.where(clean, 1.0, hits / np.maximum(said, 1))
        recall = np.where(clean, 1.0, hits / np.maximum(real, 1))
        both = precision + recall
        f1 = np.where(both > 0, 2 * precision * recall / np.where(both > 0, both, 1.0), 0.0)
    else:
        nothing = (said == 0) & (real == 0)
        precision = np.where(nothing, 1.0, hits / np.maximum(said, 1))
        recall = np.where(nothing, 1.0, hits / np.maximum(real, 1))
        f1 = np.where(nothing, 1.0, 2 * hits / np.maximum(said + real, 1))
    return SetScores(
        float(precision.mean()), float(recall.mean()), float(f1.mean()), empty, len(precision)
    )


def cosmic(true: ArrayLike, generated: ArrayLike, width: float, official: bool = False) -> float:
    """Overlap of two spike trains under triangular pulses of that width (CosMIC).

    y(t) = sum_k max(0, 1 - |t - t_k| / (width / 2)), and likewise for the generated train; the
    score is 2 sum min(y, y') / (sum y + sum y') over a grid of step width / 50 from the first
    spike - width / 2 to the last + width / 2. (Reynolds et al. 2018, eNeuro 5(5), as used for
    Neuroformer.)

    Args:
        true, generated: spike times in any order, in the unit of `width`.
        official: the grid of the published code, first + width to last + width. It leaves the
            first spikes out; NaN where nothing falls on it.

    Returns:
        0 to 1; two empty trains give 1, one empty train 0.
    """
    if not (np.isfinite(width) and width > 0):
        raise DataError(f"the width of CosMIC's pulses must be above 0, not {width}")
    one, two = (np.sort(np.asarray(t, float).ravel()) for t in (true, generated))
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise DataError("spike times must be finite")
    if not one.size or not two.size:
        return float(one.size == two.size)
    first, last = min(one[0], two[0]), max(one[-1], two[-1])
    begin, end = (
        (first + width, last + width) if official else (first - width / 2, last + width / 2)
    )
    step = width / GRID
    points = max(0, int(np.ceil((end - begin) / step - 1e-9)))
    a, b = (_pulses(t, begin, step, points, width) for t in (one, two))
    total = a.sum() + b.sum()
    return float(2 * np.minimum(a, b).sum() / total) if total > 0 else float("nan")


def _pulses(times: Floats, begin: float, step: float, points: int, width: float) -> Floats:
    """Sum of the triangles at begin + i * step; each spike touches only GRID + 1 points."""
    first = np.ceil((times - width / 2 - begin) / step).astype(np.int64)
    place = first[:, None] + np.arange(GRID + 1)
    height = 1 - np.abs(begin + place * step - times[:, None]) / (width / 2)
    inside = (place >= 0) & (place < points) & (height > 0)
    return np.bincount(place[inside], height[inside], minlength=points).astype(np.float64)


def cosmic_by_unit(
    true: tuple[ArrayLike, ArrayLike],
    generated: tuple[ArrayLike, ArrayLike],
    n_units: int,
    width: float,
    official: bool = False,
) -> Floats:
    """(N,) CosMIC of every unit; `true` and `generated` are (unit, time) events."""
    units = [np.asarray(events[0], np.int64) for events in (true, generated)]
    times = [np.asarray(events[1], float) for events in (true, generated)]
    order = [np.argsort(u, kind="stable") for u in units]
    cuts = [np.searchsorted(u[o], np.arange(n_units + 1)) for u, o in zip(units, order)]
    trains = [t[o] for t, o in zip(times, order)]
    found = []
    for i in range(n_units):
        one, two = (t[c[i] : c[i + 1]] for t, c in zip(trains, cuts))
        found.append(cosmic(one, two, width, official))
    return np.array(found)


def psth(unit: ArrayLike, step: ArrayLike, n_units: int, trials: ArrayLike, bin_: int) -> Floats:
    """Spikes per bin and trial: (N, T) means over trials, T the bins of the shortest trial.

    Args:
        unit, step: (S,) events. trials: (R, 2) first and end step. bin_: steps a bin has.
    """
    spans = np.asarray(trials, np.int64)
    if spans.ndim != 2 or spans.shape[1] != 2 or not len(spans) or bin_ < 1:
        raise DataError("a PSTH needs trials (R, 2) and bins of at least one step")
    length = int((spans[:, 1] - spans[:, 0]).min()) // bin_
    if length < 1:
        raise DataError(f"a trial is shorter than one bin of {bin_} steps")
    who, when = np.asarray(unit, np.int64), np.asarray(step, np.int64)
    order = np.argsort(spans[:, 0])
    spans = spans[order]
    trial = np.searchsorted(spans[:, 0], when, side="right") - 1
    place = (when - spans[np.maximum(trial, 0), 0]) // bin_
    inside = (trial >= 0) & (when < spans[np.maximum(trial, 0), 1]) & (place < length)
    flat = who[inside] * length + place[inside]
    return np.bincount(flat, minlength=n_units * length).reshape(n_units, length) / len(spans)


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's r of two lists; NaN where one of them does not vary."""
    return find_metric("pearson")(np.ravel(np.asarray(a, float)), np.ravel(np.asarray(b, float)))


def correlations(a: ArrayLike, b: ArrayLike) -> Floats:
    """(N,) Pearson's r of every row of `a` with that row of `b`; NaN where one does not vary."""
    x, y = (np.asarray(v, float) for v in (a, b))
    if x.ndim != 2 or x.shape != y.shape:
        raise DataError(f"rows to correlate must be two tables alike, not {x.shape} and {y.shape}")
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    under = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    found = np.full(len(x), np.nan)
    np.divide((x * y).sum(1), under, out=found, where=under > 0)
    return found


@dataclass(frozen=True)
class PopulationScores:
    """Generated against true population activity over the same windows.

    rate_r: Pearson's r over units of their mean counts. count_ratio: generated spikes / true
    ones; outside 0.7 to 1.3 a model does not know when to stop. cell_r: r over all cells of the
    (window, unit) tables, None for one window.
    """

    sets: SetScores
    rate_r: float
    count_ratio: float
    cell_r: float


def population_scores(true: ArrayLike, generated: ArrayLike) -> PopulationScores:
    """Sets, rates and counts of (W, N) spike counts."""
    a, b = np.asarray(true, float), np.asarray(generated, float)
    sets = set_scores(a, b)
    total = float(a.sum())
    return PopulationScores(
        sets,
        correlation(a.mean(0), b.mean(0)),
        float(b.sum()) / total if total else float("nan"),
        correlation(a, b),
    )


def decoding(prediction: ArrayLike, target: ArrayLike) -> tuple[float, float]:
    """Pearson's r and R2 of decoded behaviour over windows."""
    guess, truth = (np.ravel(np.asarray(v, float)) for v in (prediction, target))
    return find_metric("pearson")(guess, truth), find_metric("r2")(guess, truth)


@dataclass(frozen=True)
class EdgeScores:
    """AUROC for telling connected pairs from others, off the diagonal.

    `forward` judges the matrix as it is; `transposed` judges it against the reversed arrows. A
    symmetric score cannot tell the direction: its two numbers are equal. `within` is the mean over
    sources of the AUROC among that source's targets: a score that only knows who the hubs are, and
    gives all of a hub's targets the same, has a high `forward` and 0.5 here.
    """

    forward: float
    transposed: float
    within: float

    @property
    def direction(self) -> float:
        return self.forward - self.transposed


def edge_scores(score: ArrayLike, edges: ArrayLike) -> EdgeScores:
    """AUROC of `score` (N, N) for the true `edges` (N, N), both [target, source]; no self edges.

    A score that is NaN (a pair never seen) ranks lowest. Inhibition counts as an edge: give the
    size of a signed score.

    Raises:
        DataError: shapes differ, or no pair, or every pair, is an edge.
    """
    values, truth = np.asarray(score, float), np.asarray(edges) != 0
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.shape != truth.shape:
        raise DataError(
            f"scores {values.shape} and edges {truth.shape} must both be (units, units)"
        )
    off = ~np.eye(len(values), dtype=bool)
    values = np.where(np.isnan(values), -np.inf, values)
    within = [
        auroc(values[off[:, p], p], truth[off[:, p], p])
        for p in range(len(values))
        if 0 < truth[off[:, p], p].sum() < len(values) - 1
    ]
    return EdgeScores(
        auroc(values[off], truth[off]),
        auroc(values[off], truth.T[off]),
        float(np.mean(within)) if within else float("nan"),
    )


def auroc(score: Floats, positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores higher than a negative; ties count half."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    if not 0 < count < len(positive):
        raise DataError("an AUROC needs pairs that are connected and pairs that are not")
    rank = rankdata(score)[positive].sum()
    return float((rank - count * (count + 1) / 2) / (count * (len(positive) - count)))

"""Measures of numbers: regression targets, forecasts, maps of depth.

Predictions and targets (n, ...) of the same shape; NaN targets are unknown and left out. With
several outputs a regression measure is taken per output and averaged, as scikit-learn does.
Forecast measures are per series and averaged over series, as the M competitions do (Makridakis &
Hibon 2000; Hyndman & Koehler 2006 for MASE).
"""

from __future__ import annotations

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


def _pair(prediction: Any, target: Any) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Prediction, target (unknown as 0) and what is known, all (n, outputs)."""
    guess, truth = finite(prediction).astype(np.float64), np.asarray(target, np.float64)
    same_length(guess, truth)
    if guess.size != truth.size:
        raise ValueError(f"predictions {guess.shape} do not fit targets {truth.shape}")
    width = truth.size // len(truth) if len(truth) else 1
    guess, truth = guess.reshape(-1, width), truth.reshape(-1, width)
    known = ~np.isnan(truth)
    return guess, np.where(known, truth, 0.0), known


def _error_sums(power: int) -> Any:
    def sums(prediction: Any, target: Any) -> Floats:
        """(n, 2 * outputs): |error|^power and known, per output."""
        guess, truth, known = _pair(prediction, target)
        error = np.where(known, np.abs(guess - truth) ** power, 0.0)
        return np.concatenate([error, known.astype(np.float64)], axis=1)

    return sums


def _mean_per_output(sums: Floats) -> Floats:
    error, count = np.split(sums, 2, axis=-1)
    return mean_defined(ratio(error, count))


def _root_per_output(sums: Floats) -> Floats:
    error, count = np.split(sums, 2, axis=-1)
    return mean_defined(np.sqrt(ratio(error, count)))


def _pooled(rows: Floats) -> Floats:
    """(n, 2k) sums per output as (n, 2): all positions of an example together."""
    error, count = np.split(rows, 2, axis=-1)
    return np.stack([error.sum(-1), count.sum(-1)], axis=-1)


def _moments(prediction: Any, target: Any) -> Floats:
    """(n, 6 * outputs): 1, x, y, xx, yy, xy with x the prediction, y the target, about y's mean.

    Centring on the sample's mean keeps the sums exact for targets far from 0; it makes the
    summands depend on the whole sample, so these measures do not stream.
    """
    guess, truth, known = _pair(prediction, target)
    centre = ratio(truth.sum(0), known.sum(0).astype(np.float64))
    centre = np.where(np.isfinite(centre), centre, 0.0)
    x, y = np.where(known, guess - centre, 0.0), np.where(known, truth - centre, 0.0)
    return np.concatenate([known.astype(np.float64), x, y, x * x, y * y, x * y], axis=1)


def _spreads(sums: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Per output: squared deviations of x, of y, their product, and the squared error."""
    n, x, y, xx, yy, xy = np.split(sums, 6, axis=-1)
    several = n >= 2
    safe = np.where(several, n, 1.0)

    def about_mean(square: Floats, a: Floats, b: Floats) -> Floats:
        spread = square - a * b / safe
        scale = np.maximum(np.abs(square), np.abs(a * b / safe))
        return np.where(several & (np.abs(spread) > 1e-12 * scale), spread, 0.0)

    return about_mean(xx, x, x), about_mean(yy, y, y), about_mean(xy, x, y), xx - 2 * xy + yy


def _r2(sums: Floats) -> Floats:
    _, y, _, error = _spreads(sums)
    return mean_defined(1 - ratio(error, y))


def _pearson(sums: Floats) -> Floats:
    x, y, xy, _ = _spreads(sums)
    return mean_defined(ratio(xy, np.sqrt(x * y)))


def _spearman(prediction: Any, target: Any) -> float:
    """Pearson's correlation of average ranks, per output."""
    from scipy.stats import rankdata

    guess, truth, known = _pair(prediction, target)
    values = []
    for column in range(guess.shape[1]):
        at = known[:, column]
        ranks = rankdata(guess[at, column]), rankdata(truth[at, column])
        values.append(float(_pearson(_moments(*ranks).sum(0))) if at.any() else np.nan)
    return float(mean_defined(np.asarray(values, np.float64)))


def _per_series(error: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    """(n, 2): mean error of each series over its known steps, and whether it has any."""
    count = known.sum(1)
    mean = np.where(known, error, 0.0).sum(1) / np.maximum(count, 1)
    return with_weight(mean, count > 0)


def _smape(prediction: Any, target: Any) -> Floats:
    """200 |y - f| / (|y| + |f|) per step, 0 where both are 0."""
    guess, truth, known = _pair(prediction, target)
    size = np.abs(guess) + np.abs(truth)
    error = 200 * np.abs(guess - truth) / np.where(size > 0, size, 1.0)
    return _per_series(error, known)


def _mase(prediction: Any, target: Any, scale: npt.ArrayLike) -> Floats:
    """|y - f| over the series' own naive error; series with scale 0 or NaN are left out."""
    guess, truth, known = _pair(prediction, target)
    divisor = np.asarray(scale, np.float64).reshape(len(truth), -1)  # (n, channels)
    if divisor.shape[1] not in (1, guess.shape[1]):
        divisor = np.tile(divisor, (1, guess.shape[1] // divisor.shape[1]))  # steps, then channels
    usable = np.isfinite(divisor) & (divisor > 0)
    error = np.abs(guess - truth) / np.where(usable, divisor, 1.0)
    return _per_series(error, known & usable)


def naive_scale(history: npt.ArrayLike, season: int = 1) -> Floats:
    """MASE's divisor (n, channels): mean |y_t - y_{t-season}| over a history (n, length, channels).

    NaN steps are left out; NaN where no pair is known (a history no longer than a season).
    """
    y = np.asarray(history, np.float64)
    y = y[..., None] if y.ndim == 2 else y
    if season < 1:
        raise ValueError(f"season must be at least 1, got {season}")
    gap = np.abs(y[:, season:] - y[:, :-season])
    known = np.isfinite(gap)
    return ratio(np.where(known, gap, 0.0).sum(1), known.sum(1).astype(np.float64))


def _scaled_sums(prediction: Any, target: Any) -> Floats:
    """(n, 2): summed |error| and summed |target| over known positions."""
    guess, truth, known = _pair(prediction, target)
    error = np.where(known, np.abs(guess - truth), 0.0)
    return np.stack([error.sum(1), np.abs(truth).sum(1)], axis=1)


def _abs_rel(prediction: Any, target: Any) -> Floats:
    """(n, 2): summed |error| / target and count over known positions with a positive target."""
    guess, truth, known = _pair(prediction, target)
    known = known & (truth > 0)
    error = np.abs(guess - truth) / np.where(known, truth, 1.0)
    return np.stack([np.where(known, error, 0.0).sum(1), known.sum(1)], axis=1)


def _pooled_sums(power: int) -> Any:
    per_output = _error_sums(power)
    return lambda prediction, target: _pooled(per_output(prediction, target))


def _root(sums: Floats) -> Floats:
    return np.sqrt(mean_sums(sums))


_TARGET = "units of the target"
for entry in (
    Metric("rmse", False, _error_sums(2), _root_per_output, unit=_TARGET, about="root mean square"),
    Metric(
        "mae",
        False,
        _error_sums(1),
        _mean_per_output,
        mean_of_scores=True,
        unit=_TARGET,
        about="mean absolute error",
    ),
    Metric("r2", True, _moments, _r2, streams=False, about="share of variance explained"),
    Metric("pearson", True, _moments, _pearson, streams=False, about="linear correlation"),
    Metric("spearman", True, compute=_spearman, about="correlation of ranks"),
    Metric(
        "smape",
        False,
        _smape,
        mean_sums,
        mean_of_scores=True,
        unit="%",
        about="symmetric relative error, 0 to 200, mean over series",
    ),
    Metric(
        "mase",
        False,
        _mase,
        mean_sums,
        mean_of_scores=True,
        needs=("scale",),
        about="error over that of repeating the last season, mean over series",
    ),
    Metric(
        "mae_scaled",
        False,
        _scaled_sums,
        mean_sums,
        about="summed error over summed size of target",
    ),
    Metric(
        "abs_rel", False, _abs_rel, mean_sums, about="mean |error| / target over positive targets"
    ),
    Metric("dense:rmse", False, _pooled_sums(2), _root, unit=_TARGET, about="over pooled pixels"),
    Metric(
        "dense:mae", False, _pooled_sums(1), mean_sums, unit=_TARGET, about="over pooled pixels"
    ),
    Metric("forecast:rmse", False, _pooled_sums(2), _root, unit=_TARGET, about="over pooled steps"),
    Metric(
        "forecast:mae", False, _pooled_sums(1), mean_sums, unit=_TARGET, about="over pooled steps"
    ),
):
    METRICS.add(entry.name, entry)
